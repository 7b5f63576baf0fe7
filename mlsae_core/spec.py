"""What a result is a function of: frozen specs, strict YAML, sweeps and canonical JSON.

A spec holds everything that can change a number and nothing that cannot: precision is in it, the
device, the number of workers and the paths of outputs are not. Fields left out of a YAML file get
documented defaults, and derived ones (``None`` in the signature) are resolved when the spec is
built. Exceptions are `aux_k` and `layers: all`, whose values need the model: written out they make
another key.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import json
import math
import numbers
import os
import reprlib
import types
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

HookPoint = Literal["residual", "mlp_input", "mlp_output"]
Split = Literal["train", "validation", "test"]

# Appendix A of the MLSAE paper: 1 B tokens in batches of 131072, so 7629 optimiser steps.
PAPER_TOKENS, PAPER_BATCH_TOKENS, PAPER_LEARNING_RATE = 10**9, 131072, 1e-4


class SpecError(ValueError):
    """Bad input: the message names the field, what came and what is expected."""


def added(introduced, default=MISSING, **options):
    """A field that a spec got after there were results of it; they keep their keys.

    introduced: what all earlier results have, written out; it never changes. default: of new specs,
        where that is another by now. options: of `dataclasses.field`.
    """
    default = introduced if default is MISSING else default
    return field(default=default, metadata={"introduced": introduced}, **options)


class Renamed(NamedTuple):
    """How a field that has another name today is read and hashed."""

    to: str


class Removed(NamedTuple):
    """How a field that is gone is read and hashed.

    value: the one that remained; specs with another are refused. introduced: where it was `added`.
    """

    value: Any
    introduced: Any = MISSING


@dataclass(frozen=True)
class Spec:
    """Base of all specs: fields are coerced by their annotations however a spec is built.

    So `1` and `1.0`, or a list and a tuple, cannot make two keys of one run. A field that comes
    after there are results is declared by `added`, one that goes stands in `_former`.
    """

    _prefix = ""  # of field names in messages
    _former: ClassVar[dict[str, Renamed | Removed]] = {}  # by former name, the oldest first

    def __post_init__(self):
        hints = _hints(type(self))
        for f in dataclasses.fields(self):
            value = coerce(self._prefix + f.name, getattr(self, f.name), hints[f.name])
            object.__setattr__(self, f.name, value)

    def _require(self, holds: bool, name: str, expected: str):
        if not holds:
            raise SpecError(
                f"{self._prefix}{name}: expected {expected}, got {_shown(getattr(self, name))}"
            )

    def _positive(self, *names: str):
        for name in names:
            value = getattr(self, name)
            self._require(value is None or value > 0, name, "a number above 0")

    def _path(self, name: str, expected: str):
        """Refuse a path that no file system takes, or that would break a message's line."""
        value = getattr(self, name)
        fine = value.strip() != "" and value.isprintable()
        fine = fine and max(len(os.fsencode(part)) for part in value.split("/")) < 256
        self._require(fine, name, expected)

    def _seed(self, name: str):
        value = getattr(self, name)
        self._require(value is None or 0 <= value < 2**32, name, "a number from 0 to 2**32 - 1")


@dataclass(frozen=True)
class ModelSpec(Spec):
    """A frozen causal language model.

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

    path: ``docstrings`` (the embedded corpus), ``docstring-questions`` (questions on it and their
        answers), a file or folder (.jsonl, .json, .txt, .parquet, and all but the last also
        compressed as .zst; a .txt file's documents are its paragraphs), or the id of a hub dataset,
        which is streamed. A relative path is looked up from the working directory.
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

    layers: ``all`` or a list of block indices from 0.
    source, target: hook points; ``target: same`` (or the source's name) is an autoencoder, anything
        else a transcoder.
    basis: ``identity``, the name of a model whose tuned lens is under ``data/lenses``, or a folder
        with one; alignment: ``aligned`` (translator l+1 for the residual stream after block l) or
        ``as-released`` (translator l).
    stacked: concatenate the layers into one vector (the feature-stacked alternative).
    """

    layers: Literal["all"] | tuple[int, ...] = "all"
    source: HookPoint = "residual"
    target: HookPoint | Literal["same"] = "same"
    basis: str = "identity"
    alignment: Literal["aligned", "as-released"] = "aligned"
    stacked: bool = False

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


@dataclass(frozen=True)
class SaeSpec(Spec):
    """The autoencoder (MLSAE paper, Section 3.2).

    expansion_factor: n_latents / width of the input. k: active latents per vector; see activation.
    aux_k: dead latents used by AuxK; default the power of two nearest half the input's width.
    aux_alpha: weight of AuxK. dead_tokens: a latent is dead after this many training tokens
        without an activation above dead_threshold at any layer; default 10 million, or a tenth of
        the run where the run is shorter than 100 million.
    activation: ``topk``, with k active latents for every vector; ``batchtopk``, with k on average
        over a batch; ``jumprelu``, with a threshold per latent, which is trained, and k on average
        at its beginning (`mlsae_core.activation`). How many are active is then a result.
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

    tokens: training tokens, special ones included, rounded down to whole steps; the text is
        repeated if it is shorter.
    seed: of the initial weights and of the order of sequences.
    batch_tokens: tokens per optimiser step, a multiple of micro_batch_tokens. Default: the power of
        two that gives the paper's 7629 steps, between 2048 and the paper's 131072.
    micro_batch_tokens: tokens per forward and backward pass, rounded down to whole sequences; each
        micro-batch's FVU is normalised by its own variance, so this is part of the spec. Default:
        batch_tokens, at most 8192.
    learning_rate: constant rate of Adam. Default: the paper's 1e-4 for its 1 B tokens, larger for
        shorter runs by the square root of the ratio, at most 6e-3.
    precision: of the autoencoder under accelerate. All but fp32 need a GPU; tf32 is fp32 with 10
        bits of each factor's mantissa in products, the language model's as well.
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
class RunSpec(Spec):
    """One trained dictionary. In YAML the fields of `site`, `sae` and `train` stand flat."""

    model: ModelSpec
    data: DataSpec
    site: SiteSpec
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

    ablations: also replace each layer by zero and by its mean, for the CE recovered; the evaluation
        then takes about three times as long.
    """

    tokens: int = 1_000_000
    split: Split = "test"
    ablations: bool = True

    _prefix = "evaluate."

    def __post_init__(self):
        super().__post_init__()
        self._positive("tokens")


@dataclass(frozen=True)
class Experiment:
    """Runs that belong together: `cases` or a `sweep` over a base run, and what to do with each.

    title: one line. runs: (labels, run) pairs, labels being the swept fields or the case. evaluate:
    settings of the analyses, or none for training alone. analyses: which ones, names in
    `pipeline.STAGES`. weights: whether the trained dictionaries are shipped with their tables.
    """

    title: str
    runs: tuple[tuple[dict[str, Any], RunSpec], ...]
    evaluate: EvaluateSpec | None = field(default_factory=EvaluateSpec)
    analyses: tuple[str, ...] = ("evaluate", "distributions")
    weights: bool = True


# --- canonical form -------------------------------------------------------------------------


def to_dict(spec) -> dict[str, Any]:
    """Every field of a spec, nested, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def flat(run: RunSpec) -> dict[str, Any]:
    """A run as its YAML file would have it: `model` and `data` nested, all other fields flat."""
    fields = to_dict(run)
    for section in SECTIONS:
        fields |= fields.pop(section)
    return fields


def canonical(value) -> str:
    """Canonical JSON: sorted keys, no blanks, floats by shortest representation."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


# --- strict reading ---------------------------------------------------------------------------

SECTIONS = {"site": SiteSpec, "sae": SaeSpec, "train": TrainSpec}
_OWNER = {f.name: key for key, cls in SECTIONS.items() for f in dataclasses.fields(cls)}


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; plain YAML takes the last one."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise SpecError(f"{key.value}: given twice (line {key.start_mark.line + 1})")
                seen.add(key.value)
        return super().construct_mapping(node, deep=True)


class _TextLoader(_Loader):
    """Scalars stay text, for `coerce`: YAML 1.1 reads `on` as true, `032` as 26, `1e-4` as text."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the base class)
        key: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":")[-1] in ("null", "merge")]
        for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 80


def _shown(value) -> str:
    """A value in a message: short, on one line."""
    return "nothing" if value is None else _repr.repr(value)


@functools.cache
def _hints(cls) -> dict[str, Any]:
    return get_type_hints(cls)


def coerce(name: str, value, annotation):
    """`value` as `annotation` asks: numbers may be written 2_000_000, 1e-4 or 2e6."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        for option in options:
            try:
                return coerce(name, value, option)
            except SpecError:
                continue
    elif annotation is type(None):
        if value is None or value == "null":
            return None
    elif origin is Literal:
        if isinstance(value, str) and value in options:
            return value
    elif origin is tuple:
        items = value if isinstance(value, list | tuple | range) else [value]
        return tuple(coerce(name, item, options[0]) for item in items)
    elif annotation is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif annotation in (int, float):
        if (number := _number(value, annotation)) is not None:
            return number
    elif annotation is str and isinstance(value, str | os.PathLike):
        return os.fspath(value)
    elif annotation is dict and isinstance(value, dict):
        return value
    elif dataclasses.is_dataclass(annotation):
        return value if isinstance(value, annotation) else build(annotation, value, name)
    raise SpecError(f"{name}: expected {_describe(annotation)}, got {_shown(value)}")


def _number(value, kind: type) -> int | float | None:
    """A finite number of that kind, whole ones below 2**63; nothing where `value` is not one."""
    if isinstance(value, bool) or not isinstance(value, str | numbers.Real):
        return None
    digits = str(value).replace("_", "")
    try:
        whole = int(digits)
    except ValueError:
        try:
            number = float(digits)
        except ValueError:
            return None
        if not math.isfinite(number):
            return None
        if kind is float:
            return number
        if number != int(number):
            return None
        whole = int(number)
    if abs(whole) >= 2**63:
        return None
    return kind(whole)


def _describe(annotation) -> str:
    origin, options = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, options))
    if origin is tuple:
        return f"a list of {_describe(options[0])}s"
    if options:
        return " or ".join(_describe(o) for o in options)
    names = {
        int: "whole number",
        float: "number",
        str: "text",
        bool: "true | false",
        type(None): "nothing",
    }
    return names.get(annotation, "fields")


def _reject_unknown(values: dict, known, prefix: str = ""):
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"
            raise SpecError(f"{prefix}{name}: unknown field; {hint}")


def build(cls, values, name: str = ""):
    """A spec from a mapping of its fields; a bare string is its `path`.

    name: of the field that the spec stands in, for messages.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    if isinstance(values, str | os.PathLike) and "path" in fields:
        values = {"path": values}
    if not isinstance(values, dict):
        expected = "a path or fields" if "path" in fields else "fields"
        raise SpecError(f"{name or cls.__name__}: expected {expected}, got {_shown(values)}")
    _reject_unknown(values, fields, cls._prefix)
    for f in fields.values():
        required = f.default is MISSING and f.default_factory is MISSING
        if required and f.name not in values:
            expected = _describe(_hints(cls)[f.name])
            raise SpecError(f"{cls._prefix}{f.name}: missing; expected {expected}")
    return cls(**values)


def run_from_dict(values: dict) -> RunSpec:
    """A run from the flat mapping of a YAML file."""
    own = {f.name for f in dataclasses.fields(RunSpec)} - SECTIONS.keys()
    _reject_unknown(values, own | _OWNER.keys())
    sections: dict[str, dict] = {key: {} for key in SECTIONS}
    for name, value in values.items():
        if name in _OWNER:
            sections[_OWNER[name]][name] = value
    if "model" not in values:
        raise SpecError("model: missing; expected a shipped name, a folder or a hub id")
    return RunSpec(
        **{"data": {}} | {name: value for name, value in values.items() if name in own},
        **{key: build(cls, sections[key]) for key, cls in SECTIONS.items()},
    )


def read_yaml(path: str | Path, typed: bool = False) -> dict:
    """A YAML file as a mapping, with one clear error for whatever is wrong with it.

    typed: numbers and truth values as YAML reads them; otherwise they stay text, for `coerce`.
    """
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"{path}: no such file; expected a YAML file")
    try:
        content = path.read_text(encoding="utf-8")
        values = yaml.load(content, Loader=_Loader if typed else _TextLoader)
    except SpecError:
        raise
    except (yaml.YAMLError, OSError, ValueError, RecursionError) as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path}: expected `field: value` lines, got {_shown(values)}")
    return values


def load_run(path: str | Path) -> RunSpec:
    """Read one run from a YAML file."""
    values = read_yaml(path)
    if "run" in values:
        raise SpecError(f"run: {path} is an experiment; expected a run, or use `materialise`")
    return run_from_dict(values)


def load_experiment(path: str | Path) -> Experiment:
    """Read an experiment: `title`, `run`, `sweep` or `cases`, `evaluate`, `analyses`, `weights`.

    `sweep` maps fields (of `run`, or `model`) to lists; the runs are their product, in the order of
    the file. `cases` maps a name to the fields in which that run differs from `run`; the label is
    called `case`. A bare run is an experiment of one.
    """
    values = read_yaml(path)
    if "run" not in values:
        return Experiment(title=Path(path).stem, runs=(({}, run_from_dict(values)),))
    known = {"title", "run", "sweep", "cases", "evaluate", "analyses", "weights"}
    _reject_unknown(values, known)
    base, sweep, cases = values["run"], values.get("sweep") or {}, values.get("cases") or {}
    if not isinstance(base, dict):
        raise SpecError(f"run: expected the fields of a run, got {_shown(base)}")
    if not isinstance(sweep, dict) or not all(isinstance(v, list) and v for v in sweep.values()):
        raise SpecError(f"sweep: expected `field: [value, value]` lines, got {_shown(sweep)}")
    if not isinstance(cases, dict) or not all(isinstance(v or {}, dict) for v in cases.values()):
        raise SpecError(f"cases: expected `name: {{field: value}}` lines, got {_shown(cases)}")
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
            for name in ("analyses", "weights")
            if name in values
        },
    )
