"""Compute shipped results again, from nothing, and say how far the new numbers are from them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from mlsae_book import experiments
from mlsae_core import pipeline, status, store
from mlsae_core.spec import Experiment, SpecError

# What a clock says is no result, nor is the error that whichever latent is dead leaves: often there
# is one or none, and another rounding lets it die some steps earlier or later.
NOT_COMPARED = ("seconds", "tokens_per_second", "auxk")
# Fractions of latents are compared as they are: one latent more or less is much of a small number.
OF_LATENTS = ("dead", "dead_fraction", "inactive")
# Files keep six digits; another processor changes the last of them.
ROUNDING = 1e-5


def estimate(declared: list[Experiment]) -> float:
    """Seconds that is left to compute, within a factor of two; finished results count nothing."""
    with store.recomputing():
        return sum(float(status.status(e).seconds.sum()) for e in declared)


def check_shipped(declared: list[Experiment]):
    """Refuse, before hours of computing, an experiment that leaves nothing to compare.

    Raises:
        SpecError: nothing of it is shipped.
    """
    for experiment in declared:
        places = (
            store.SHIPPED / stage / pipeline.STAGES[stage].key(run, experiment.evaluate)[0]
            for _, run in experiment.runs
            for stage in experiments.stages_of(experiment, run)
        )
        if not any((place / "meta.json").is_file() for place in places):
            raise SpecError(f"{experiment.title}: expected shipped results, got none to compare")


def reproduce(experiment: Experiment) -> pd.DataFrame:
    """Recompute every shipped result of an experiment; a killed call continues where it was.

    Nothing that is shipped or stored is read: documents, tokens, dictionaries and tables are made
    again under ``data/store/reproduced``.

    Returns:
        One row per table: the experiment's labels, ``stage``, ``key``, ``file``, ``column`` (the
        one that deviates most, if one does), ``deviation`` (see :func:`deviations`). Weights,
        arrays per latent and prompts.csv are left out: a rounding that exchanges two latents of
        nearly equal activation changes them, and not what they amount to.
    """
    session, rows = pipeline.Session(), []
    for labels, run in experiment.runs:
        for stage in experiments.stages_of(experiment, run):
            with store.recomputing():
                anew = session.make(stage, run, experiment.evaluate)
            key = pipeline.STAGES[stage].key(run, experiment.evaluate)[0]
            if not store.is_shipped(stage, key):
                continue
            shipped = store.read(store.SHIPPED / stage / key)
            for file in sorted(set(shipped.meta["files"]) - {"prompts.csv"}):
                found = deviations(shipped.file(file), anew.file(file))
                if len(found):
                    column = found.idxmax() if found.max() else ""
                    worst = {"file": file, "column": column, "deviation": found.max()}
                    rows.append({**labels, "stage": stage, "key": anew.key, **worst})
    return pd.DataFrame(rows)


def reproduce_model(name: str) -> dict[str, float | str]:
    """Train a shipped language model again beside the shipped one, and compare their losses."""
    from mlsae_book import pretrain

    folder = store.STORE / "reproduced" / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(store.MODELS / name / "recipe.yml", folder / "recipe.yml")
    if not (folder / "training.json").is_file():
        with store.recomputing():
            pretrain.pretrain(folder / "recipe.yml")
    shipped, anew = (
        json.loads((f / "training.json").read_text())["validation_loss"]
        for f in (store.MODELS / name, folder)
    )
    return {"model": name, "shipped": shipped, "anew": anew, "deviation": abs(anew / shipped - 1)}


def deviations(shipped: Path, anew: Path) -> pd.Series:
    """How far the numbers of a CSV or JSON file are apart, by column or path of keys.

    The largest absolute difference over the rows of a column, as a fraction of the column's
    largest absolute value, but as it is for fractions of latents (`OF_LATENTS`); 0 below
    `ROUNDING`, infinite where the rows or what is not a number differ. Without `NOT_COMPARED`;
    empty for other kinds of files.
    """
    if shipped.suffix == ".csv":
        one, other = pd.read_csv(shipped), pd.read_csv(anew)
    elif shipped.suffix == ".json":
        one, other = (
            pd.DataFrame([dict(_leaves(json.loads(p.read_text())))]) for p in (shipped, anew)
        )
    else:
        return pd.Series(dtype=float)
    columns = [c for c in one if c not in NOT_COMPARED]
    if len(one) != len(other):
        return pd.Series(np.inf, index=columns)
    return pd.Series(
        {c: _deviation(one[c], other[c], c) if c in other else np.inf for c in columns}
    )


def _deviation(one: pd.Series, other: pd.Series, column: str) -> float:
    if not pd.api.types.is_numeric_dtype(one):
        return 0.0 if one.equals(other) else np.inf
    if (one.isna() != other.isna()).any():
        return np.inf
    scale = 1.0 if column in OF_LATENTS else float(one.abs().max())
    difference = float((one.astype(float) - other.astype(float)).abs().max())
    if not difference > ROUNDING * scale:
        return 0.0
    return difference / scale if scale else np.inf


def _leaves(value, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted paths and values of nested JSON objects and lists."""
    if isinstance(value, dict | list):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inner, f"{prefix}{name}.")
    else:
        yield prefix.rstrip("."), value
