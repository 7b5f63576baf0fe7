"""How the residual stream changes over layers: norms, and similarities of the layers' vectors."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mlsae_core import analysis
from mlsae_core.activations import ActivationSource


def drift(
    source: ActivationSource,
    size: int = 8,
    *,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean norm of every layer and mean cosine similarity of every two (MLSAE paper, Section 4.2).

    A cosine similarity is of one token's vectors at two layers, then averaged over tokens.

    Args:
        size: sequences that are read at a time.
        checkpoint: file to continue from if it exists, and to write every minute.

    Returns:
        Layers: one row per layer with ``layer``, ``relative_layer`` (layer over the model's number
        of layers, as in Fig. 4), ``norm`` and ``norm_se`` (mean L2 norm, not centred, activation
        units), ``tokens``. Pairs: one row per two layers with ``layer``, ``other``,
        ``relative_pair`` (layer over the number of layers less one), and the mean cosine similarity
        after centring, ``centred``, and without, ``raw``, each with ``…_se``. Standard errors are
        over sequences, whose tokens depend on each other; nan for one sequence.
    """
    found = analysis.drift(source, size, progress=progress, checkpoint=checkpoint)
    n_layers, layers = source.n_layers, source.site.indices(source.n_layers)
    by_layer = pd.DataFrame(
        {
            "layer": layers,
            "relative_layer": [layer / n_layers for layer in layers],
            "norm": found.norm.cpu().numpy(),
            "norm_se": found.norm_se.cpu().numpy(),
            "tokens": found.tokens,
        }
    )
    columns = ("centred", "centred_se", "raw", "raw_se")
    rows = [
        {
            "layer": layer,
            "other": other,
            "relative_pair": layer / max(1, n_layers - 1),
            **{name: float(getattr(found, name)[i, i + j]) for name in columns},
        }
        for i, layer in enumerate(layers)
        for j, other in enumerate(layers[i + 1 :], 1)
    ]
    return by_layer, pd.DataFrame(rows, columns=["layer", "other", "relative_pair", *columns])


def adjacent(pairs: pd.DataFrame, by: str = "model") -> pd.DataFrame:
    """The pairs of layers next to each other among those measured, as `charts.drift` wants them.

    Args:
        pairs: the second table of `drift`, of several runs, with the column `by`.

    Returns:
        One row per run, pair and measure: `by`, ``layer``, ``other``, ``relative_pair``,
        ``measure`` (``centred`` or ``raw``), ``value``, ``low`` and ``high`` (± 2 standard errors).
    """
    nearest = pairs.groupby([by, "layer"]).other.transform("min")
    kept = pairs[pairs.other == nearest]
    keys = [by, "layer", "other", "relative_pair"]
    parts = [
        kept[keys].assign(
            measure=name,
            value=kept[name],
            low=kept[name] - 2 * kept[f"{name}_se"],
            high=kept[name] + 2 * kept[f"{name}_se"],
        )
        for name in ("centred", "raw")
    ]
    return pd.concat(parts, ignore_index=True)


def beside_sums(layers: pd.DataFrame, pairs: pd.DataFrame, by: str = "model") -> pd.DataFrame:
    """Adjacent layers beside what they would be if blocks added vectors at right angles.

    Of x and x + u with u perpendicular to x the cosine is the ratio of their lengths, whatever u
    is: two vectors of which one is a part of the other are alike.

    Args:
        layers, pairs: the tables of `drift`, of several runs, with the column `by`.

    Returns:
        One row per run and pair: `by`, ``layer``, ``other``, ``raw`` (the mean cosine, not
        centred), ``perpendicular`` (the ratio of the mean norms) and ``more`` (their difference).
    """
    nearest = pairs[pairs.other == pairs.groupby([by, "layer"]).other.transform("min")]
    norms = layers.set_index([by, "layer"]).norm
    rows = nearest[[by, "layer", "other", "raw"]].reset_index(drop=True)
    before, after = (
        norms.loc[list(zip(rows[by], rows[column], strict=True))].to_numpy()
        for column in ("layer", "other")
    )
    rows["perpendicular"] = before / after
    return rows.assign(more=rows.raw - rows.perpendicular)


def matrix(pairs: pd.DataFrame, by: str = "model") -> pd.DataFrame:
    """Both halves of the layer × layer matrix: `by`, ``layer``, ``other``, ``centred``, ``raw``."""
    columns = [by, "layer", "other", "centred", "raw"]
    mirrored = pairs.rename(columns={"layer": "other", "other": "layer"})
    return pd.concat([pairs[columns], mirrored[columns]], ignore_index=True)


def summary(layers: pd.DataFrame, pairs: pd.DataFrame, by: str = "model") -> pd.DataFrame:
    """One row per run: how the norm grows, and how alike adjacent and outermost layers are.

    Returns:
        `by`, ``norm_first``, ``norm_last`` (activation units), ``adjacent`` (mean centred cosine
        similarity of adjacent layers), ``adjacent_raw`` (not centred), ``ends`` (centred, of the
        first and last layer), ``ends_raw``, and ``ends_perpendicular``, what the latter would be if
        all updates were perpendicular to the first layer's vector (see `beside_sums`).
    """
    groups = layers.groupby(by, sort=False).norm
    near = adjacent(pairs, by).pivot_table(index=by, columns="measure", values="value")
    width = pairs.other - pairs.layer
    far = pairs[width == width.groupby(pairs[by]).transform("max")].set_index(by)
    columns = {
        "norm_first": groups.first(),
        "norm_last": groups.last(),
        "adjacent": near.centred,
        "adjacent_raw": near.raw,
        "ends": far.centred,
        "ends_raw": far.raw,
        "ends_perpendicular": groups.first() / groups.last(),
    }
    return pd.DataFrame(columns).reindex(layers[by].unique()).rename_axis(by).reset_index()
