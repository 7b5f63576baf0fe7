"""How many layers a latent is spread over, for many runs: active layers, entropy, samples.

Each function takes what `experiments.read_distributions` returns for several runs, as a list of
(labels, arrays, numbers), and gives a table with the labels as its first columns.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables import latent_table
from mlsae_book.tables.layers import sample_prompt
from mlsae_book.tables.order import DECIMALS
from mlsae_book.tables.sweeps import across

#: Tokens at which a latent is active often enough that its entropy is hardly biased.
OFTEN = 100

Read = Iterable[tuple[dict, dict[str, Tensor], dict]]

#: Fractions of the tokens, four to a power of ten; the paper's 0.1 % is among them.
THRESHOLDS = tuple(float(f"{10 ** (i / 4):.3g}") for i in range(-20, -3))


def active_layers(
    read: Read, thresholds: Sequence[float] = THRESHOLDS, relative: bool = False
) -> pd.DataFrame:
    """Share of the layers at which a latent is active often (MLSAE paper, Appendix C.3, Fig. 28).

    Often is: at more than ``threshold`` times the tokens seen. The mean is over all latents, live
    or not, so a latent that is rare everywhere counts as active at no layer.

    A layer has k active latents per token, so the mean latent is active at k / n_latents of them,
    whatever was learnt: a fixed threshold cuts a larger or sparser dictionary harder.

    Args:
        thresholds: fractions of the tokens. relative: or of the count of the mean latent at the
            mean layer, which takes that effect off.

    Returns:
        One row per run and threshold: ``threshold`` (as given), ``active_layers`` (mean
        over latents of the layers above it, over n_L), ``nowhere`` (fraction of the latents that
        are above it at no layer).
    """
    rows = []
    for labels, arrays, numbers in read:
        counts = arrays["counts"]
        unit = counts.double().mean().item() if relative else numbers["tokens"]
        for threshold in thresholds:
            above = counts > threshold * unit
            share = above.double().mean().item()
            nowhere = 1 - above.any(0).double().mean().item()
            row = {"threshold": threshold, "active_layers": share, "nowhere": nowhere}
            rows.append(labels | row)
    return pd.DataFrame(rows)


def entropies(read: Read, quantiles: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95)):
    """Entropy of P(L | j) over its maximum ln n_L (MLSAE paper, Appendix C.4, Fig. 29).

    0 for a latent that is active at one layer, 1 for one that is equally active at all.

    Returns:
        One row per run: ``entropy`` (mean over the latents that are active at least once) and
        ``q05`` … ``q95``, quantiles over them; ``often``, the mean over those active at `OFTEN`
        tokens or more, since of few tokens entropy comes out too small; ``permuted``, the mean with
        layers permuted at each token.
    """
    rows = []
    for labels, arrays, _ in read:
        found = arrays["entropy"][arrays["active_tokens"] > 0].double()
        often = arrays["entropy"][arrays["active_tokens"] >= OFTEN].double()
        null = arrays["probs_permuted"]
        null = torch.special.entr(null[:, null.isfinite().all(0)]).sum(0) / math.log(len(null))
        ends = found.quantile(torch.tensor(quantiles, dtype=torch.float64)).tolist()
        names = [f"q{100 * q:02.0f}" for q in quantiles]
        row = {"entropy": found.mean().item(), **dict(zip(names, ends, strict=True))}
        row |= {"often": often.mean().item(), "permuted": null.mean().item()}
        rows.append(labels | row)
    return pd.DataFrame(rows)


def entropy_histogram(read: Read, n_bins: int = 40) -> pd.DataFrame:
    """The distribution behind the mean entropy: one row per run and bin of [0, 1].

    Returns:
        ``low``, ``high`` (edges of the bin, closed below; the last one includes 1) and ``share``
        (fraction of the run's live latents).
    """
    edges = np.linspace(0, 1, n_bins + 1)
    parts = []
    for labels, arrays, _ in read:
        found = arrays["entropy"][arrays["active_tokens"] > 0].clamp(0, 1)
        found = found.round(decimals=DECIMALS)  # a half stands on an edge
        counts = np.histogram(found.numpy(), edges)[0]
        table = {"low": edges[:-1], "high": edges[1:], "share": counts / counts.sum()}
        parts.append(pd.DataFrame(table).assign(**labels)[[*labels, *table]])
    return pd.concat(parts, ignore_index=True)


def at_the_ends(read: Read, least: float = 0.9) -> pd.DataFrame:
    """Latents that belong to the first layer, or to the last: P(layer | latent) above `least`.

    Returns:
        One row per run: ``first`` and ``last`` (fractions of the latents that are active at least
        once), ``latents`` (their number).
    """
    rows = []
    for labels, arrays, _ in read:
        probs = arrays["probs"][:, arrays["active_tokens"] > 0]
        first, last = (probs[[0, -1]] > least).double().mean(1).tolist()
        rows.append(labels | {"first": first, "last": last, "latents": probs.shape[1]})
    return pd.DataFrame(rows)


def sampled(read: Read, most: int = 100, weighting: str = "probs") -> pd.DataFrame:
    """Heatmaps of several runs, each of at most `most` latents, evenly spaced by mean layer.

    Returns:
        One row per run, latent and layer: ``latent``, ``layer``, ``probability``, ``order``, as
        `tables.latent_table` has them.
    """
    parts = [
        latent_table(arrays, weighting, most).assign(**labels)[
            [*labels, "latent", "layer", "probability", "order"]
        ]
        for labels, arrays, _ in read
    ]
    return pd.concat(parts, ignore_index=True)


def galleries(
    read: dict[str, Read], prompts: pd.DataFrame, prompt: str, most: int = 100
) -> pd.DataFrame:
    """Heatmaps of every run of several sweeps, of many tokens and of one prompt.

    Args:
        read: name of the sweep → its runs. prompts: `prompts.csv` of the same runs, stacked by
            `sweeps.across`. most: latents of a run.

    Returns:
        One row per run, text, latent and layer, for `charts.sweeps.gallery`: ``sweep``, ``run``,
        ``position``, ``latent``, ``layer``, ``probability``, ``order`` and ``of`` (``many tokens``
        or ``one prompt``).
    """
    many, one = across(sampled, read, most), sample_prompt(prompts, prompt, most)
    parts = [many.assign(of="many tokens"), one.assign(of="one prompt")]
    return pd.concat(parts, ignore_index=True)
