"""How the residual stream changes over layers: norms, and similarities of the layers' vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional
from tqdm.auto import tqdm

from mlsae_core.activations import stream
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.metrics import LayerMoments
from mlsae_core.spec import SiteSpec


@torch.no_grad()
def drift(
    lm: LanguageModel,
    lens: Lens,
    site: SiteSpec,
    batches: Iterable[Tensor],
    *,
    progress: bool = True,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Mean norm of every layer and mean cosine similarity of every two (MLSAE paper, Section 4.2).

    Two passes: the first finds each layer's mean vector, the second compares vectors about it. A
    cosine similarity is of one token's vectors at two layers, then averaged over tokens.

    Args:
        lens: the basis in which vectors are compared.
        site: layers and source; target and `stacked` do not matter.
        batches: (batch, position) int64 tokens, read twice.

    Returns:
        Layers: one row per layer with ``layer``, ``relative_layer`` (layer over the model's number
        of layers, as in Fig. 4), ``norm`` and ``norm_se`` (mean L2 norm, not centred, activation
        units), ``tokens``. Pairs: one row per two layers with ``layer``, ``other``,
        ``relative_pair`` (layer over the number of layers less one), and the mean cosine similarity
        after centring, ``centred``, and without, ``raw``, each with ``…_se``. Standard errors are
        over sequences, whose tokens depend on each other; nan for one sequence.

    Raises:
        ActivationError: NaN or infinite activations.
        ValueError: no batches.
    """
    site = replace(site, target="same", stacked=False)
    layers, batches = site.indices(lm.n_layers), list(batches)
    if not batches:
        raise ValueError("batches: expected at least one batch of tokens, got none")
    n = len(layers)
    moments = LayerMoments(n, lm.d_model, lm.device)
    for batch in stream(lm, tqdm(batches, "means", disable=not progress), site, lens):
        moments.update(batch.source)
    sums, counts = [], []  # of every sequence
    for batch in stream(lm, tqdm(batches, "drift", disable=not progress), site, lens):
        x = batch.source.double()
        norms = torch.linalg.vector_norm(x, dim=-1)[:, None]
        parts = torch.cat([norms, _cosines(x - moments.mean[:, None]), _cosines(x)], 1)
        rows = batch.sequence
        total = parts.new_zeros(int(rows.max()) + 1, n, 2 * n + 1)
        sums.append(total.index_add_(0, rows, parts.permute(2, 0, 1)))
        counts.append(rows.bincount())
    count = torch.cat(counts)
    seen = count > 0
    mean, error = _mean_and_error(torch.cat(sums)[seen], count[seen])
    by_layer = pd.DataFrame(
        {
            "layer": layers,
            "relative_layer": [layer / lm.n_layers for layer in layers],
            "norm": mean[:, 0].cpu().numpy(),
            "norm_se": error[:, 0].cpu().numpy(),
            "tokens": int(count.sum()),
        }
    )
    return by_layer, _pairs(mean[:, 1:].cpu(), error[:, 1:].cpu(), layers, lm.n_layers)


def _cosines(x: Tensor) -> Tensor:
    """(layer, other, token): cosine similarities of each token's vectors, (layer, token, d)."""
    unit = functional.normalize(x, dim=-1).transpose(0, 1)
    return (unit @ unit.mT).permute(1, 2, 0)


def _mean_and_error(sums: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over tokens and its standard error over sequences of unequal length (ratio estimator).

    Args:
        sums: (sequence, …), over each sequence's tokens. count: (sequence,), how many.
    """
    n, tokens = len(count), count.sum()
    mean = sums.sum(0) / tokens
    rest = sums - mean * count.view(-1, *[1] * mean.ndim)
    return mean, (rest.square().sum(0) * (n / (n - 1) if n > 1 else torch.nan)).sqrt() / tokens


def _pairs(mean: Tensor, error: Tensor, layers: list[int], n_layers: int) -> pd.DataFrame:
    n = len(layers)
    columns = {
        "centred": mean[:, :n], "centred_se": error[:, :n],
        "raw": mean[:, n:], "raw_se": error[:, n:],
    }  # fmt: skip
    rows = [
        {
            "layer": layers[i],
            "other": layers[j],
            "relative_pair": layers[i] / max(1, n_layers - 1),
            **{name: float(values[i, j]) for name, values in columns.items()},
        }
        for i in range(n)
        for j in range(i + 1, n)
    ]
    return pd.DataFrame(rows, columns=["layer", "other", "relative_pair", *columns])


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
        first and last layer), ``ends_raw``.
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
    }
    return pd.DataFrame(columns).reindex(layers[by].unique()).rename_axis(by).reset_index()
