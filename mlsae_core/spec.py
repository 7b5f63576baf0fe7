"""What a result is a function of: frozen specs, strict YAML, sweeps and canonical JSON.

A spec holds everything that can change a number and nothing that cannot: precision is in it, the
device, the number of workers and the paths of outputs are not. Fields left out of a YAML file get
documented defaults, and derived ones (``None`` in the signature) are resolved when the spec is
built. Exceptions are `aux_k` and `layers: all`, whose values need the model: written out they make
another key.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mlsae_core.fields import (  # noqa: F401 (this is where others take them from)
    Removed,
    Renamed,
    Spec,
    SpecError,
    added,
    build,
    coerce,
    read_yaml,
    reject_unknown,
    shown,
)
from mlsae_core.fields import hints as _hints

HookPoint = Literal["residual", "mlp_input", "mlp_output"]
Split = Literal["train", "validation", "test"]

# Appendix A of the MLSAE paper: 1 B tokens in batches of 131072, so 7629 optimiser steps.
PAPER_TOKENS, PAPER_BATCH_TOKENS, PAPER_LEARNING_RATE = 10**9, 131072, 1e-4


@dataclass(frozen=True)
class ModelSpec(Spec):
    """A frozen causal language model.

    Args:
        path: a name under ``data/models``, a Hugging Face folder, or a hub id. A relative folder is
            looked up from the working directory.
        revision: hub revision; ignored for folders.
        dtype: precision of weights and activations of the language model.
        random_weights: seed of a randomly initialised copy with the same architecture, or none.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    random_weights: int | None = None

    _prefix = "model."

    def __post_init__(self):
        super().__post_init__()
        self._path("path", "a shipped name, a folder or a hub id")
        self._seed("random_weights")


@dataclass(frozen=True)
class DataSpec(Spec):
    """Text, and how it becomes sequences.

    Args:
        path: ``docstrings`` (the embedded corpus), ``docstring-questions`` (questions on it and
            their answers), a file or folder (.jsonl, .json, .txt, .parquet, and all but the last
            also compressed as .zst; a .txt file's documents are its paragraphs; of a folder all
            files but hidden ones, readmes and licences), or the id of a hub dataset, which is
            streamed. A relative path is looked up from the working directory.
        name, split, revision: configuration, split and revision of a hub dataset.
        text_column: the column that holds a document's text.
        context_length: tokens per sequence.
    """

    path: str = "docstrings"
    name: str | None = None
    split: str = "train"
    revision: str | None = None
    text_column: str = "text"
    context_length: int = 256

    _prefix = "data."

    def __post_init__(self):
        super().__post_init__()
        self._path("path", "docstrings, a file, a folder or a hub id")
        self._require(self.context_length >= 2, "context_length", "a number of at least 2")


@dataclass(frozen=True)
class SiteSpec(Spec):
    """Which activations the autoencoder reads and which it predicts.

    Args:
        layers: ``all`` or a list of block indices from 0.
        source, target: hook points; ``target: same`` (or the source's name) is an autoencoder,
            anything else a transcoder.
        basis: ``identity``, the name of a model whose tuned lens is under ``data/lenses``, or a
            folder with one.
        alignment: ``aligned`` (translator l+1 for the residual stream after block l) or
            ``as-released`` (translator l).
        stacked: concatenate the layers into one vector (the feature-stacked alternative).
        massive: whether tokens with massive activations (`activations.massive`) are ``kept``, or
            ``excluded`` as special tokens are: neither read, counted nor replaced.
    """

    layers: Literal["all"] | tuple[int, ...] = "all"
    source: HookPoint = "residual"
    target: HookPoint | Literal["same"] = "same"
    basis: str = "identity"
    alignment: Literal["aligned", "as-released"] = "aligned"
    stacked: bool = False
    massive: Literal["kept", "excluded"] = added("kept")

    def __post_init__(self):
        super().__post_init__()
        if self.target == self.source:
            object.__setattr__(self, "target", "same")
        if self.layers != "all":
            increasing = sorted(set(self.layers)) == list(self.layers)
            self._require(
                bool(self.layers) and increasing and self.layers[0] >= 0,
                "layers",
                "`all` or increasing block indices from 0",
            )
        self._path("basis", "`identity` or a tuned-lens folder")
        residual = (self.source, self.target) == ("residual", "same")
        self._require(
            residual or self.basis == "identity",
            "basis",
            "`identity` where source or target is not the residual stream",
        )

    def indices(self, n_layers: int) -> list[int]:
        """The block indices in a model of n_layers blocks; one that does not exist is refused."""
        layers = list(range(n_layers)) if self.layers == "all" else list(self.layers)
        if layers[-1] >= n_layers:
            raise SpecError(
                f"layers: expected block indices from 0 to {n_layers - 1}, since the model has "
                f"{n_layers} blocks, got {layers[-1]}"
            )
        return layers

    def refuse_stacked(self, what: str):
        """Refuse stacked layers for what needs a vector of every layer."""
        if self.stacked:
            raise SpecError(f"stacked: expected false for {what}, got true")


@dataclass(frozen=True)
class SaeSpec(Spec):
    """The autoencoder (MLSAE paper, Section 3.2).

    Args:
        expansion_factor: n_latents / width of the input.
        k: active latents per vector; see activation.
        aux_k: dead latents used by AuxK; default the power of two nearest half the input's width.
        aux_alpha: weight of AuxK.
        dead_tokens: a latent is dead after this many training tokens without an activation above
            dead_threshold at any layer; default 10 million, or a tenth of the run where the run is
            shorter than 100 million.
        activation: ``topk``, with k active latents for every vector; ``batchtopk``, with k on
            average over a batch; ``jumprelu``, with a threshold per latent, which is trained, and k
            on average at its beginning (`mlsae_core.activation`). How many are active is then a
            result.
        l0_coefficient: weight of the mean number of active latents in the loss, for jumprelu alone;
            default 1e-3.
    """

    expansion_factor: int
    k: int
    aux_k: int | None = None
    aux_alpha: float = 1 / 32
    dead_tokens: int | None = None
    dead_threshold: float = 1e-3
    standardize: bool = True
    activation: Literal["topk", "batchtopk", "jumprelu"] = added("topk")
    l0_coefficient: float | None = added(None)

    def __post_init__(self):
        super().__post_init__()
        self._positive("expansion_factor", "k", "dead_tokens")
        for name in ("aux_k", "aux_alpha", "dead_threshold", "l0_coefficient"):
            self._require((getattr(self, name) or 0) >= 0, name, "0 or more")
        if self.activation != "jumprelu":
            expected = f"none with activation: {self.activation}"
            self._require(self.l0_coefficient is None, "l0_coefficient", expected)
        elif self.l0_coefficient is None:
            object.__setattr__(self, "l0_coefficient", 1e-3)


@dataclass(frozen=True)
class TrainSpec(Spec):
    """The optimisation (MLSAE paper, Appendix A).

    Args:
        tokens: training tokens, special ones included, rounded down to whole steps; the text is
            repeated if it is shorter.
        seed: of the initial weights and of the order of sequences.
        batch_tokens: tokens per optimiser step, a multiple of micro_batch_tokens. Default: the
            power of two that gives the paper's 7629 steps, between 2048 and the paper's 131072.
        micro_batch_tokens: tokens per forward and backward pass, rounded down to whole sequences;
            each micro-batch's FVU is normalised by its own variance, so this is part of the spec.
            Default: batch_tokens, at most 8192.
        learning_rate: constant rate of Adam. Default: the paper's 1e-4 for its 1 B tokens, larger
            for shorter runs by the square root of the ratio, at most 6e-3.
        precision: of the autoencoder under accelerate. All but fp32 need a GPU; tf32 is fp32 with
            10 bits of each factor's mantissa in products, the language model's as well.
    """

    tokens: int
    seed: int = 0
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    learning_rate: float | None = None
    adam_eps: float = 6.25e-10
    precision: Literal["fp32", "tf32", "fp16", "bf16"] = "fp32"

    def __post_init__(self):
        super().__post_init__()
        self._positive("tokens", "batch_tokens", "micro_batch_tokens", "learning_rate", "adam_eps")
        self._seed("seed")
        if self.batch_tokens is None:
            exponent = math.floor(
                math.log2(max(self.tokens * PAPER_BATCH_TOKENS / PAPER_TOKENS, 1))
            )
            object.__setattr__(
                self, "batch_tokens", min(max(2**exponent, 2048), PAPER_BATCH_TOKENS)
            )
        if self.micro_batch_tokens is None:
            object.__setattr__(self, "micro_batch_tokens", min(self.batch_tokens, 8192))
        if self.learning_rate is None:
            rate = PAPER_LEARNING_RATE * max(PAPER_TOKENS / self.tokens, 1) ** 0.5
            object.__setattr__(self, "learning_rate", float(f"{min(rate, 6e-3):.2g}"))


@dataclass(frozen=True)
class DictionarySpec(Spec):
    """The weights of a dictionary that was trained elsewhere.

    Args:
        path: a name under ``data/dictionaries``; a folder in one of `formats.FORMATS`, or with such
            folders below it, one for each layer; or the id of such a repository of the hub. A
            relative folder is looked up from the working directory.
        revision: hub revision; ignored for folders.
        folders: patterns of the folders below it that count, such as
            ``layer_3/width_16k/average_*``; of a repository only these are read, and without any
            only what is not in a folder.
    """

    path: str
    revision: str | None = None
    folders: tuple[str, ...] = added(())

    _prefix = "dictionary."

    def __post_init__(self):
        super().__post_init__()
        self._path("path", "a shipped name, a folder or a hub id")


@dataclass(frozen=True)
class SubjectSpec(Spec):
    """What is measured: a dictionary at a site of a model, on text; which one, subclasses say.

    In YAML the fields of `site`, `sae` and `train` stand flat.
    """

    model: ModelSpec
    data: DataSpec
    site: SiteSpec


@dataclass(frozen=True)
class GivenSpec(SubjectSpec):
    """A dictionary that is there, such as a published one: measured as any, never trained."""

    dictionary: DictionarySpec


@dataclass(frozen=True)
class RunSpec(SubjectSpec):
    """A dictionary that is trained."""

    sae: SaeSpec
    train: TrainSpec

    def __post_init__(self):
        super().__post_init__()
        if self.sae.dead_tokens is None:
            window = min(10_000_000, max(self.train.tokens // 10, 1))
            object.__setattr__(self, "sae", dataclasses.replace(self.sae, dead_tokens=window))
        context, train = self.data.context_length, self.train
        micro, batch = train.micro_batch_tokens, train.batch_tokens
        if micro < context:
            raise SpecError(
                f"micro_batch_tokens: expected at least one sequence of data.context_length "
                f"{context}, got {micro}; batch_tokens is {batch}"
            )
        if batch % micro:
            raise SpecError(
                f"batch_tokens: expected a multiple of micro_batch_tokens {micro}, got {batch}"
            )
        if train.tokens < batch:
            raise SpecError(
                f"tokens: expected at least one batch of batch_tokens {batch}, got {train.tokens}"
            )

    def n_latents(self, n_layers: int, d_model: int) -> int:
        """The size of the dictionary on a model of n_layers blocks of width d_model.

        Raises:
            SpecError: a layer that the model does not have, or k larger than the dictionary.
        """
        layers = self.site.indices(n_layers)
        width = d_model * (len(layers) if self.site.stacked else 1)
        n_latents = width * self.sae.expansion_factor
        if self.sae.k > n_latents:
            raise SpecError(
                f"k: expected at most the {n_latents} latents that expansion_factor "
                f"{self.sae.expansion_factor} gives at width {width}, got {self.sae.k}"
            )
        return n_latents


@dataclass(frozen=True)
class EvaluateSpec(Spec):
    """How much of which split an analysis reads: tokens of the `test` split by default.

    Args:
        ablations: also replace each layer by zero and by its mean, for the CE recovered; the
            evaluation then takes about three times as long.
        replaced: tokens, of whole sequences spread evenly over what is read, at which layers are
            replaced and predictions scored, with intervals over sequences; all by default.
    """

    tokens: int = 1_000_000
    split: Split = "test"
    ablations: bool = True
    replaced: int | None = added(None)

    _prefix = "evaluate."

    def __post_init__(self):
        super().__post_init__()
        self._positive("tokens", "replaced")
        most = f"at most the {self.tokens} tokens that are read"
        self._require((self.replaced or 0) <= self.tokens, "replaced", most)


@dataclass(frozen=True)
class Experiment:
    """Runs that belong together: `cases` or a `sweep` over a base run, and what to do with each.

    title: one line. runs: (labels, run) pairs, labels being the swept fields or the case. evaluate:
    settings of the analyses, or none for training alone. analyses: which ones, names in
    `pipeline.STAGES`. weights: whether the trained dictionaries are shipped with their tables.
    half: whether those are rounded to half precision. arrays: whether distributions are shipped
    with those of each latent.
    """

    title: str
    runs: tuple[tuple[dict[str, Any], SubjectSpec], ...]
    evaluate: EvaluateSpec | None = field(default_factory=EvaluateSpec)
    analyses: tuple[str, ...] = ("evaluate", "distributions")
    weights: bool = True
    half: bool = False
    arrays: bool = True


# --- canonical form -------------------------------------------------------------------------


def to_dict(spec) -> dict[str, Any]:
    """Every field of a spec, nested, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def flat(run: SubjectSpec) -> dict[str, Any]:
    """A run as its YAML file would have it: the fields of `SECTIONS` flat, all others nested."""
    fields = to_dict(run)
    for section in sections(type(run)):
        fields |= fields.pop(section)
    return fields


def canonical(value) -> str:
    """Canonical JSON: sorted keys, no blanks, floats by shortest representation."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# --- strict reading ---------------------------------------------------------------------------

SECTIONS = {"site": SiteSpec, "sae": SaeSpec, "train": TrainSpec}
_OWNER = {f.name: key for key, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


def sections(cls: type[SubjectSpec]) -> dict[str, type[Spec]]:
    """Those of `SECTIONS` that a kind of run has."""
    return {f.name: SECTIONS[f.name] for f in dataclasses.fields(cls) if f.name in SECTIONS}


def kind_of(values: dict) -> type[SubjectSpec]:
    """The kind of run that the flat mapping of a YAML file describes."""
    return GivenSpec if "dictionary" in values else RunSpec


def run_from_dict(values: dict) -> RunSpec | GivenSpec:
    """A run from the flat mapping of a YAML file; with `dictionary` it is one that is there."""
    cls = kind_of(values)
    parts: dict[str, dict] = {section: {} for section in sections(cls)}
    own = {f.name for f in dataclasses.fields(cls)} - parts.keys()
    for name, value in values.items():
        section = _OWNER.get(name)
        if section in parts:
            parts[section][name] = value
        elif section is not None:
            raise SpecError(
                f"{name}: expected nothing that says how to train beside `dictionary`, whose "
                f"weights are there, got {shown(value)}"
            )
    reject_unknown(values, own | {n for n, section in _OWNER.items() if section in parts})
    if "model" not in values:
        raise SpecError("model: missing; expected a shipped name, a folder or a hub id")
    return cls(
        **{"data": {}} | {name: value for name, value in values.items() if name in own},
        **{section: build(SECTIONS[section], given) for section, given in parts.items()},
    )


def load_run(path: str | Path) -> RunSpec | GivenSpec:
    """Read one run from a YAML file."""
    values = read_yaml(path)
    if "run" in values:
        raise SpecError(f"run: {path} is an experiment; expected a run, or use `materialise`")
    return run_from_dict(values)


def load_experiment(path: str | Path) -> Experiment:
    """Read an experiment: its `title`, `run`, `sweep` or `cases`, and further fields as in
    `Experiment`.

    `sweep` maps fields (of `run`, or `model`) to lists; the runs are their product, in the order of
    the file. `cases` maps a name to the fields in which that run differs from `run`; the label is
    called `case`. A bare run is an experiment of one.
    """
    values = read_yaml(path)
    if "run" not in values:
        return Experiment(title=Path(path).stem, runs=(({}, run_from_dict(values)),))
    known = {"title", "run", "sweep", "cases", "evaluate", "analyses", "weights", "half", "arrays"}
    reject_unknown(values, known)
    base, sweep, cases = values["run"], values.get("sweep") or {}, values.get("cases") or {}
    if not isinstance(base, dict):
        raise SpecError(f"run: expected the fields of a run, got {shown(base)}")
    if not isinstance(sweep, dict) or not all(isinstance(v, list) and v for v in sweep.values()):
        raise SpecError(f"sweep: expected `field: [value, value]` lines, got {shown(sweep)}")
    if not isinstance(cases, dict) or not all(isinstance(v or {}, dict) for v in cases.values()):
        raise SpecError(f"cases: expected `name: {{field: value}}` lines, got {shown(cases)}")
    if sweep and cases:
        raise SpecError("cases: expected either `sweep` or `cases`, got both")
    runs = [
        ({"case": str(name)}, run_from_dict({**base, **(v or {})})) for name, v in cases.items()
    ]
    for combination in () if cases else itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, combination, strict=True))
        run = run_from_dict({**base, **chosen})
        everything = flat(run)
        labels = {n: everything[n] if n in _OWNER else chosen[n] for n in chosen}
        runs.append((labels, run))
    evaluate = values.get("evaluate", {})
    off = evaluate is None or str(evaluate).lower() == "false"
    return Experiment(
        title=coerce("title", values.get("title", Path(path).stem), str),
        runs=tuple(runs),
        evaluate=None if off else build(EvaluateSpec, evaluate, "evaluate"),
        **{
            name: coerce(name, values[name], _hints(Experiment)[name])
            for name in ("analyses", "weights", "half", "arrays")
            if name in values
        },
    )
