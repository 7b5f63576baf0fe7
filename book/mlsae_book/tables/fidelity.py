"""Evaluations of many runs as tidy tables: over R and k, over seeds, beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from mlsae_book.tables import between

METRICS = ("fvu_global", "fvu_per_dimension", "mse", "l1", "delta_ce", "kl")
MEAN = "mean"


def over(table: pd.DataFrame, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """Metrics of several runs by layer, and their mean over layers (MLSAE paper, Figures 8 to 10).

    Args:
        table: one row per run and layer: ``sweep``, ``run`` and ``position`` (`sweeps.stack`),
            ``layer``, and columns of `analysis.evaluate`.

    Returns:
        One row per run, layer and metric: ``sweep``, ``run``, ``position``, ``layer`` (as text;
        `MEAN` for the unweighted mean over the run's layers), ``metric``, ``value``.
    """
    keys = ["sweep", "run", "position"]
    found = [name for name in metrics if name in table]
    mean = table.groupby(keys, sort=False)[found].mean().reset_index().assign(layer=MEAN)
    both = pd.concat([table.assign(layer=table.layer.astype(str)), mean], ignore_index=True)
    return both.melt([*keys, "layer"], found, "metric", "value")


def repeated(table: pd.DataFrame, label: str, metrics: Sequence[str] = METRICS) -> pd.DataFrame:
    """How far runs that differ in their seed alone differ in what is measured.

    Args:
        table: one row per run and layer, the run named by the column `label`.

    Returns:
        One row per layer (as text, and `MEAN`, the mean over layers of each run) and metric:
        ``layer``, ``metric``, ``mean`` over runs, the smallest (``low``) and largest (``high``),
        and ``runs``. With few runs the range is shown, since a standard error would promise more
        than they know.
    """
    stacked = table.assign(sweep="", run=table[label], position=0)
    groups = over(stacked, metrics).groupby(["layer", "metric"], sort=False)["value"]
    names = {"mean": "mean", "low": "min", "high": "max", "runs": "size"}
    return groups.agg(**names).reset_index()


def with_intervals(table: pd.DataFrame, metrics: Sequence[str], digits: int = 4) -> pd.DataFrame:
    """Metrics of one run with their 95 % intervals, as text: one row per layer, the index.

    Args:
        table: of `analysis.evaluate` with `replaced`.
    """
    by_layer = table.set_index("layer")
    shown = {}
    for name in metrics:
        ends = by_layer[[name, f"{name}_low", f"{name}_high"]].itertuples(index=False)
        shown[name] = [between(*row, digits) for row in ends]
    return pd.DataFrame(shown, by_layer.index)


def means(table: pd.DataFrame, by: str, metrics: Sequence[str]) -> pd.DataFrame:
    """Mean over layers of each run, as Table 1 of the MLSAE paper has it; indexed by `by`."""
    return table.groupby(by, sort=False)[list(metrics)].mean()


def last_layer(table: pd.DataFrame, label: str) -> pd.DataFrame:
    """The last layer beside the others, and dead latents (MLSAE paper, Figure 11).

    Args:
        table: one row per run and layer, the run named by the column `label`.

    Returns:
        One row per run: ``run``, ``last`` and ``others`` (FVU, global variance; the second the mean
        over the other layers), ``dead`` (fraction of latents never active in the sample).
    """
    rows = []
    for run, found in table.groupby(label, sort=False):
        last = found.layer == found.layer.max()
        fvu = found.fvu_global
        row = {"last": fvu[last].item(), "others": fvu[~last].mean(), "dead": found.dead.iloc[0]}
        rows.append({"run": run, **row})
    return pd.DataFrame(rows)


def auxiliary(log: pd.DataFrame, label: str, parts: int = 4) -> pd.DataFrame:
    """The auxiliary loss in the course of training (MLSAE paper, Figure 11).

    Args:
        log: rows of `train.train`'s log of several runs, the run named by the column `label`.
        parts: of equal length, into which each training is cut.

    Returns:
        One row per run and part: `label`, ``part`` (from 1), ``tokens`` (at its end), and means
        over it of ``auxk`` (before it is weighted), ``dead`` (fraction of latents without an
        activation in the window), ``fvu`` and ``last``, the FVU of the last layer.
    """
    share = log.tokens / log.groupby(label).tokens.transform("max")
    part = (share * parts).apply(math.ceil).clip(1, parts)
    last = [name for name in log if name.startswith("fvu_")][-1]
    groups = log.assign(part=part).groupby([label, "part"], sort=False)
    columns = {"auxk": "auxk", "dead": "dead_fraction", "fvu": "fvu", "last": last}
    means = groups.agg(tokens=("tokens", "max"), **{n: (c, "mean") for n, c in columns.items()})
    return means.reset_index()


def paired(table: pd.DataFrame, label: str, a: str, b: str, metric: str) -> pd.DataFrame:
    """Two runs at the same layers: ``layer``, both values, and ``difference`` (a − b).

    Raises:
        ValueError: a run is missing, or they were measured at other layers.
    """
    pair = table[table[label].isin([a, b])].pivot_table(index="layer", columns=label, values=metric)
    if sorted(pair.columns) != sorted([a, b]) or pair.isna().to_numpy().any():
        raise ValueError(f"{label}: expected {a} and {b} at the same layers, got {list(pair)}")
    pair = pair[[a, b]].assign(difference=pair[a] - pair[b])
    return pair.rename_axis(columns=None).reset_index()


def costs(
    single: pd.DataFrame, mlsae: pd.DataFrame, d_model: int, expansion_factor: int
) -> pd.DataFrame:
    """One MLSAE against one autoencoder for each layer: what was trained, and at what cost.

    Args:
        single, mlsae: rows of `experiments.provenance` of the trained dictionaries: ``tokens``,
            ``seconds``.
        d_model: width of the model. expansion_factor: R, of all dictionaries.

    Returns:
        One row per choice: ``dictionaries``, ``parameters`` (weights of all of them),
        ``training_memory_mb`` (weights, gradients and Adam's two moments in float32, of all of
        them), ``tokens`` (of text, read by each), ``vectors`` (layers × tokens, over all),
        ``seconds`` (of training, over all, the language model's passes included) and
        ``vectors_per_second``.
    """
    each = 2 * d_model * d_model * expansion_factor + d_model
    rows = []
    for name, made, vectors in (
        ("one MLSAE", mlsae, mlsae.tokens.sum() * len(single)),
        ("one SAE per layer", single, single.tokens.sum()),
    ):
        row = {"choice": name, "dictionaries": len(made), "parameters": len(made) * each}
        row |= {"training_memory_mb": len(made) * each * 16 / 1e6, "tokens": made.tokens.max()}
        seconds = made.seconds.sum()
        row |= {"vectors": vectors, "seconds": seconds, "vectors_per_second": vectors / seconds}
        rows.append(row)
    return pd.DataFrame(rows).set_index("choice")


def budget(case: str) -> str:
    """What a case of `experiments/equal.yml` is, by how many latents each layer has."""
    if case == "shared":
        return "one for all layers"
    return "a sixth of the latents" if "sixth" in case else "as many latents"
