"""YAML → experiment: runs that belong together, as a file of `book/experiments` declares them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlsae_book import corpus, prose  # noqa: F401 (so that their texts are known)
from mlsae_core.fields import build, coerce, hints, read_yaml, reject_unknown, shown
from mlsae_core.spec import EvaluateSpec, SpecError, SubjectSpec, flat, run_from_dict


@dataclass(frozen=True)
class Experiment:
    """Runs that belong together: `cases` or a `sweep` over a base run, and what to do with each.

    title: one line. runs: (labels, run) pairs, labels being the swept fields or the case. evaluate:
    settings of the analyses, or none for training alone. analyses: which ones, names in
    `pipeline.STAGES`. weights: whether the trained dictionaries are shipped with their tables.
    """

    title: str
    runs: tuple[tuple[dict[str, Any], SubjectSpec], ...]
    evaluate: EvaluateSpec | None = field(default_factory=EvaluateSpec)
    analyses: tuple[str, ...] = ("evaluate", "distributions")
    weights: bool = True


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
        labels = {  # a model by its name
            n: chosen[n] if isinstance(everything[n], dict) else everything[n] for n in chosen
        }
        runs.append((labels, run))
    evaluate = values.get("evaluate", {})
    off = evaluate is None or str(evaluate).lower() == "false"
    return Experiment(
        title=coerce("title", values.get("title", Path(path).stem), str),
        runs=tuple(runs),
        evaluate=None if off else build(EvaluateSpec, evaluate, "evaluate"),
        **{
            name: coerce(name, values[name], hints(Experiment)[name])
            for name in ("analyses", "weights")
            if name in values
        },
    )
