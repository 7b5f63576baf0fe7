"""What a result is a function of: frozen specs, strict YAML, sweeps and canonical JSON.

A spec holds everything that can change a number and nothing that cannot: precision is in it, the
device, the number of workers and the paths of outputs are not. Fields left out of a YAML file get
documented defaults, and derived defaults (``None`` in the signature) are resolved when the spec is
built, so two files that mean the same run have the same canonical JSON.
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import json
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

HookPoint = Literal["residual", "mlp_input", "mlp_output"]
Split = Literal["train", "validation", "test"]

# Appendix A of the MLSAE paper: 1 B tokens in batches of 131072, so 7629 optimiser steps.
PAPER_TOKENS, PAPER_BATCH_TOKENS, PAPER_LEARNING_RATE = 10**9, 131072, 1e-4


class SpecError(ValueError):
    """Bad input: the message names the field, what came and what is expected."""


@dataclass(frozen=True)
class ModelSpec:
    """A frozen causal language model.

    path: a name under ``data/models``, a Hugging Face folder, or a hub id.
    revision: hub revision; ignored for folders.
    dtype: precision of weights and activations of the language model.
    random_weights: seed of a randomly initialised copy with the same architecture, or none.
    """

    path: str
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    random_weights: int | None = None


@dataclass(frozen=True)
class DataSpec:
    """Text, and how it becomes sequences.

    path: ``docstrings`` (the embedded corpus), a file or folder (.jsonl, .jsonl.zst, .json, .txt,
        .parquet), or the id of a hub dataset, which is streamed.
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

    def __post_init__(self):
        _positive(self, "context_length", at_least=2)


@dataclass(frozen=True)
class SiteSpec:
    """Which activations the autoencoder reads and which it predicts.

    layers: ``all`` or a list of block indices from 0.
    source, target: hook points; ``target: same`` is an autoencoder, anything else a transcoder.
    basis: ``identity`` or a tuned-lens folder; alignment: ``aligned`` (translator l+1 for the
        residual stream after block l) or ``as-released`` (translator l).
    stacked: concatenate the layers into one vector (the feature-stacked alternative).
    """

    layers: Literal["all"] | tuple[int, ...] = "all"
    source: HookPoint = "residual"
    target: HookPoint | Literal["same"] = "same"
    basis: str = "identity"
    alignment: Literal["aligned", "as-released"] = "aligned"
    stacked: bool = False

    def __post_init__(self):
        if self.layers != "all":
            layers = tuple(self.layers)
            if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0:
                raise SpecError(
                    f"layers: expected `all` or increasing block indices from 0, got {layers!r}"
                )
        if self.basis != "identity" and (self.source, self.target) != ("residual", "same"):
            raise SpecError("basis: a tuned lens applies to the residual stream only")


@dataclass(frozen=True)
class SaeSpec:
    """The TopK autoencoder (MLSAE paper, Section 3.2).

    expansion_factor: n_latents / width of the input. k: active latents per vector.
    aux_k: dead latents used by AuxK; default the power of two nearest half the input's width.
    aux_alpha: weight of AuxK. dead_tokens: a latent is dead after this many training tokens
        without an activation above dead_threshold at any layer; default 10 million, or a tenth of
        the run where the run is shorter than 100 million.
    """

    expansion_factor: int
    k: int
    aux_k: int | None = None
    aux_alpha: float = 1 / 32
    dead_tokens: int | None = None
    dead_threshold: float = 1e-3
    standardize: bool = True

    def __post_init__(self):
        _positive(self, "expansion_factor", "k", "dead_tokens")
        if self.aux_k is not None and self.aux_k < 0:
            raise SpecError(f"aux_k: expected 0 or more, got {self.aux_k}")


@dataclass(frozen=True)
class TrainSpec:
    """The optimisation (MLSAE paper, Appendix A).

    tokens: training tokens, special ones included; the text is repeated if it is shorter.
    seed: of the initial weights and of the order of sequences.
    batch_tokens: tokens per optimiser step. Default: the power of two that gives the paper's 7629
        steps, between 2048 and the paper's 131072.
    micro_batch_tokens: tokens per forward and backward pass; each micro-batch's FVU is normalised
        by its own variance, so this is part of the spec. Default: batch_tokens, at most 8192.
    learning_rate: constant rate of Adam. Default: the paper's 1e-4 for its 1 B tokens, larger for
        shorter runs by the square root of the ratio, at most 6e-3.
    precision: of the autoencoder under accelerate; fp16 and bf16 need a GPU.
    """

    tokens: int
    seed: int = 0
    batch_tokens: int | None = None
    micro_batch_tokens: int | None = None
    learning_rate: float | None = None
    adam_eps: float = 6.25e-10
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"

    def __post_init__(self):
        _positive(self, "tokens", "batch_tokens", "micro_batch_tokens", "learning_rate", "adam_eps")
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
class RunSpec:
    """One trained dictionary. In YAML the fields of `site`, `sae` and `train` stand flat."""

    model: ModelSpec
    data: DataSpec
    site: SiteSpec
    sae: SaeSpec
    train: TrainSpec

    def __post_init__(self):
        if self.sae.dead_tokens is None:
            window = min(10_000_000, max(self.train.tokens // 10, 1))
            object.__setattr__(self, "sae", dataclasses.replace(self.sae, dead_tokens=window))
        context, micro = self.data.context_length, self.train.micro_batch_tokens
        if micro < context or self.train.batch_tokens < micro:
            raise SpecError(
                f"batch_tokens: expected context_length {context} ≤ micro_batch_tokens ≤ "
                f"batch_tokens, got {micro} and {self.train.batch_tokens}"
            )
        if self.train.tokens < self.train.batch_tokens:
            raise SpecError(
                f"tokens: expected at least one batch of {self.train.batch_tokens} tokens, "
                f"got {self.train.tokens}"
            )


@dataclass(frozen=True)
class EvaluateSpec:
    """How much of which split an analysis reads: tokens of the `test` split by default."""

    tokens: int = 1_000_000
    split: Split = "test"

    def __post_init__(self):
        _positive(self, "tokens")


@dataclass(frozen=True)
class Experiment:
    """Runs that belong together: the product of `sweep` over a base run, and what to do with each.

    title: one line. runs: (labels, run) pairs, labels being the swept fields. evaluate: settings of
    the evaluation, or none.
    """

    title: str
    runs: tuple[tuple[dict[str, Any], RunSpec], ...]
    evaluate: EvaluateSpec | None = field(default_factory=EvaluateSpec)


def _positive(spec, *names, at_least=None):
    for name in names:
        value = getattr(spec, name)
        if value is not None and not (value > 0 if at_least is None else value >= at_least):
            bound = "above 0" if at_least is None else f"of at least {at_least}"
            raise SpecError(f"{name}: expected a number {bound}, got {value!r}")


# --- canonical form -------------------------------------------------------------------------


def to_dict(spec) -> dict[str, Any]:
    """Every field of a spec, nested, as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(spec)))


def flat(run: RunSpec) -> dict[str, Any]:
    """A run as its YAML file would have it: `model` and `data` nested, all other fields flat."""
    nested = to_dict(run)
    return {
        "model": nested["model"],
        "data": nested["data"],
        **nested["site"],
        **nested["sae"],
        **nested["train"],
    }


def canonical(value) -> str:
    """Canonical JSON: sorted keys, no blanks, floats by shortest representation."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def difference(a: RunSpec, b: RunSpec) -> list[str]:
    """Names of the fields in which two runs differ, for messages."""
    one, two = flat(a), flat(b)
    return [name for name in one if one[name] != two[name]]


# --- strict reading ---------------------------------------------------------------------------

_SECTIONS = {"site": SiteSpec, "sae": SaeSpec, "train": TrainSpec}
_OWNER = {f.name: key for key, cls in _SECTIONS.items() for f in dataclasses.fields(cls)}


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `on` as true and `032` as 26; here only true/false and decimals are."""


_Loader.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in rules if tag.rsplit(":")[-1] in ("null", "merge")]
    for key, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _construct_unique_mapping(loader, node, deep=False):
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise SpecError(f"{key.value}: given twice (line {key.start_mark.line + 1})")
        seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor("tag:yaml.org,2002:map", lambda s, n: _construct_unique_mapping(s, n, True))


def coerce(name: str, value, annotation):
    """`value` as `annotation` asks: numbers may be written 2_000_000, 1e-4 or 2e6."""
    origin, options = get_origin(annotation), get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        failures = []
        for option in options:
            try:
                return coerce(name, value, option)
            except SpecError as failure:
                failures.append(failure)
        raise SpecError(f"{name}: expected {_describe(annotation)}, got {value!r}")
    if annotation is type(None):
        if value is None or value == "null":
            return None
    elif origin is Literal:
        if value in options:
            return value
    elif origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(coerce(name, item, options[0]) for item in items)
    elif annotation is bool:
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif annotation in (int, float) and isinstance(value, str | int | float):
        try:
            number = float(str(value).replace("_", ""))
        except ValueError:
            number = math.nan
        if math.isfinite(number) and not isinstance(value, bool):
            if annotation is float:
                return number
            if number == int(number):
                return int(number)
    elif annotation in (str, dict) and isinstance(value, annotation):
        return value
    elif dataclasses.is_dataclass(annotation):
        return build(annotation, value, prefix=f"{name}.")
    raise SpecError(f"{name}: expected {_describe(annotation)}, got {value!r}")


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
        dict: "fields",
    }
    return "nothing" if annotation is type(None) else names.get(annotation, str(annotation))


def _reject_unknown(values: dict, known, prefix: str = ""):
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(known))}"
            raise SpecError(f"{prefix}{name}: unknown field; {hint}")


def build(cls, values, prefix: str = ""):
    """A spec dataclass from a mapping; a bare string is its `path`."""
    if isinstance(values, str) and "path" in {f.name for f in dataclasses.fields(cls)}:
        values = {"path": values}
    if not isinstance(values, dict):
        raise SpecError(f"{prefix.rstrip('.') or cls.__name__}: expected fields, got {values!r}")
    hints = get_type_hints(cls)
    _reject_unknown(values, hints, prefix)
    for f in dataclasses.fields(cls):
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        if required and f.name not in values:
            raise SpecError(f"{prefix}{f.name}: missing; expected {_describe(hints[f.name])}")
    return cls(**{name: coerce(prefix + name, v, hints[name]) for name, v in values.items()})


def run_from_dict(values: dict) -> RunSpec:
    """A run from the flat mapping of a YAML file."""
    _reject_unknown(values, {"model", "data", *_OWNER})
    sections: dict[str, dict] = {key: {} for key in _SECTIONS}
    for name, value in values.items():
        if name in _OWNER:
            sections[_OWNER[name]][name] = value
    if "model" not in values:
        raise SpecError("model: missing; expected a shipped name, a folder or a hub id")
    return RunSpec(
        model=build(ModelSpec, values["model"], "model."),
        data=build(DataSpec, values.get("data", {}), "data."),
        **{key: build(cls, sections[key]) for key, cls in _SECTIONS.items()},
    )


def read_yaml(path: str | Path) -> dict:
    """A YAML file as a mapping, with one clear error for whatever is wrong with it."""
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"{path}: no such file; expected a YAML spec")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path}: expected `field: value` lines, got {type(values).__name__}")
    return values


def load_run(path: str | Path) -> RunSpec:
    """Read one run from a YAML file."""
    return run_from_dict(read_yaml(path))


def load_experiment(path: str | Path) -> Experiment:
    """Read an experiment: `title`, `run`, `sweep`, `evaluate`; a bare run is one without a sweep.

    `sweep` maps fields (of `run`, or `model`) to lists; the runs are their product, in the order of
    the file.
    """
    values = read_yaml(path)
    if "run" not in values:
        return Experiment(title=Path(path).stem, runs=(({}, run_from_dict(values)),))
    _reject_unknown(values, {"title", "run", "sweep", "evaluate"})
    base, sweep = values["run"], values.get("sweep") or {}
    if not isinstance(base, dict):
        raise SpecError(f"run: expected the fields of a run, got {base!r}")
    if not isinstance(sweep, dict) or not all(isinstance(v, list) and v for v in sweep.values()):
        raise SpecError(f"sweep: expected `field: [value, value]` lines, got {sweep!r}")
    runs = []
    for combination in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, combination, strict=True))
        run = run_from_dict({**base, **chosen})
        everything = flat(run)
        labels = {n: everything[n] if n in _OWNER else chosen[n] for n in chosen}
        runs.append((labels, run))
    evaluate = values.get("evaluate", {})
    return Experiment(
        title=str(values.get("title", Path(path).stem)),
        runs=tuple(runs),
        evaluate=None
        if evaluate in (None, "false")
        else build(EvaluateSpec, evaluate, "evaluate."),
    )
