"""Geometry of a trained dictionary: how similar its decoder rows are to one another.

Both tables depend on the dictionary alone, not on text. Beside the decoder's rows stand two
controls of the same shape, `independent` and `copies`: a similarity means something only against
what vectors without structure, and vectors that repeat, would show.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from mlsae_core.activations import ActivationSource, one_pass
from mlsae_core.metrics import copied_rows, cosine_histogram, gaussian_rows, mmcs
from mlsae_core.resume import Pass
from mlsae_core.sae import MLSAE

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
N_BINS = 200


def dictionaries(decoder: Tensor, n_layers: int, seed: int = 0) -> dict[str, Tensor]:
    """The decoder's rows and two controls of the same shape (MLSAE paper, Appendix B.6).

    Args:
        decoder: (n_latents, d), rows of any norm.
        n_layers: how often the control of copies repeats a vector.
        seed: of both controls.

    Returns:
        ``dictionary``: the rows themselves; ``independent``: N(0, I), no structure; ``copies``:
        n_latents / n_layers vectors from N(0, I), each copied n_layers times, plus N(0, I).
    """
    n, d = decoder.shape
    generator = torch.Generator().manual_seed(seed)
    return {
        "dictionary": decoder,
        "independent": gaussian_rows(n, d, generator).to(decoder.device),
        "copies": copied_rows(n, d, n_layers, generator).to(decoder.device),
    }


@torch.no_grad()
def anisotropic(
    source: ActivationSource,
    sae: MLSAE,
    latents: Sequence[int],
    size: int = 8,
    seed: int = 0,
    threshold: float = 0.4,
) -> pd.DataFrame:
    """Rows that point where the activations do, and know no more: N(0, Σ), Σ the second moments of
    the standardised activations of all layers.

    Args:
        sae: standardises the activations; its rows do not matter. latents: numbers of rows.

    Returns:
        One row per number: ``latents``, ``mmcs``, and ``above``, the share of pairs whose cosine
        similarity is in the bins from `threshold` up, as `above` has it.
    """
    total, count = 0.0, 0
    for batch in one_pass(source.batches(size), source, size, "moments", progress=False):
        x = sae.standardise(batch.source)[0].flatten(0, 1).double()
        total, count = total + x.T @ x, count + len(x)
    values, vectors = torch.linalg.eigh(total / count)
    # symmetric, so that it does not depend on the signs of the eigenvectors
    root = (values.clamp(min=0).sqrt() * vectors @ vectors.T).float()
    found = []
    for n in latents:
        noise = gaussian_rows(n, len(root), torch.Generator().manual_seed(seed))
        rows = noise.to(root) @ root
        pairs = cosine_histogram(rows, N_BINS)
        similar = pairs.counts[pairs.edges[:-1] > threshold - 1e-9].sum() / pairs.counts.sum()
        found.append({"latents": n, "mmcs": mmcs(rows).mean, "above": float(similar)})
    return pd.DataFrame(found)


def geometry(
    decoder: Tensor,
    n_layers: int,
    seed: int = 0,
    n_bins: int = N_BINS,
    *,
    checkpoint: Path | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Max and pairwise cosine similarities of decoder rows (MLSAE paper, Appendices B.5 and B.6).

    Args:
        decoder: (n_latents, d), n_latents ≥ 2. n_layers, seed: of the controls, `dictionaries`.
        n_bins: bins of equal width on [−1, 1], closed below; the last one includes 1.
        checkpoint: file to continue from if it exists, between two of `dictionaries`.

    Returns:
        Two tables, one part for each of `dictionaries` (column ``rows``). *mmcs*, one row each:
        ``latents``, ``mmcs`` and ``std`` (mean and unbiased standard deviation over rows of the
        largest cosine similarity with any other row), ``least``, ``q01`` … ``q99`` (quantiles over
        rows) and ``most``. *cosines*, one row per bin: ``low``, ``high``, ``pairs`` (unordered
        pairs of rows) and ``maxima`` (rows, by their largest cosine similarity).

    Raises:
        ValueError: fewer than two rows.
    """
    found: dict[str, dict] = {}
    done = Pass(checkpoint, 1, decoder.device, found=found)
    for name, rows in dictionaries(decoder, n_layers, seed).items():
        if name not in found:
            similar, pairs = mmcs(rows), cosine_histogram(rows, n_bins)
            found[name] = similar._asdict() | pairs._asdict()
            done.batch_done()
    summaries, histograms = [], []
    for name, of in found.items():
        best = of["values"].double().clamp(-1, 1).cpu()
        quantiles = best.quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist()
        summaries.append(
            {"rows": name, "latents": len(best), "mmcs": of["mean"], "std": of["std"]}
            | {"least": best.min().item()}
            | {f"q{100 * q:02.0f}": value for q, value in zip(QUANTILES, quantiles, strict=True)}
            | {"most": best.max().item()}
        )
        pairs, edges = of["counts"].cpu(), of["edges"].cpu()
        maxima = best.add(1).mul(n_bins / 2).floor().clamp(max=n_bins - 1).long()
        table = {
            "rows": name,
            "low": edges[:-1].numpy(),
            "high": edges[1:].numpy(),
            "pairs": pairs.numpy(),
            "maxima": maxima.bincount(minlength=n_bins).numpy(),
        }
        histograms.append(pd.DataFrame(table))
    return pd.DataFrame(summaries), pd.concat(histograms, ignore_index=True)


def densities(cosines: pd.DataFrame, column: str, merge: int = 2) -> pd.DataFrame:
    """Histograms of `geometry` as shares, in wider bins, for charts: but one empty bin at each end
    of the filled ones is left out.

    Args:
        cosines: one or several runs' tables, their labels as the first columns.
        column: ``pairs`` or ``maxima``. merge: bins that become one.

    Returns:
        The labels, ``rows``, ``low``, ``high`` and ``share`` of the run's and rows' total.
    """
    labels = [*cosines.columns[: list(cosines.columns).index("rows")], "rows"]
    parts = []
    for names, table in cosines.groupby(labels, sort=False):
        table = table.sort_values("low")
        counts = table[column].to_numpy().reshape(-1, merge).sum(1)
        filled = counts.nonzero()[0]
        kept = slice(max(filled[0] - 1, 0), filled[-1] + 2)
        parts.append(
            pd.DataFrame(
                dict(zip(labels, names, strict=True))
                | {
                    "low": table["low"].to_numpy()[::merge][kept],
                    "high": table["high"].to_numpy()[merge - 1 :: merge][kept],
                    "share": (counts / counts.sum())[kept],
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def together(cosines: pd.DataFrame) -> pd.DataFrame:
    """Histograms of dictionaries of one shape as those of one run, for `densities`.

    Args:
        cosines: several runs' tables as `sweeps.stack` gives them.

    Returns:
        The dictionaries' rows, named by their run, and the controls of the first, which are those
        of all.
    """
    own, first = cosines["rows"] == "dictionary", cosines["run"] == cosines["run"].iloc[0]
    rows = cosines["rows"].where(~own, cosines["run"])
    return cosines.assign(rows=rows, run="all")[own | first]


def above(cosines: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Share of the pairs in bins from `threshold` up, by run and rows.

    Args:
        cosines: as for `densities`. threshold: an edge of a bin.

    Returns:
        The labels, ``rows`` and ``share`` (fraction of all pairs).
    """
    labels = [*cosines.columns[: list(cosines.columns).index("rows")], "rows"]
    kept = cosines["pairs"].where(cosines["low"] > threshold - 1e-9, 0)
    table = cosines[labels].assign(pairs=cosines["pairs"], share=kept)
    sums = table.groupby(labels, sort=False)[["pairs", "share"]].sum()
    return (sums["share"] / sums["pairs"]).rename("share").reset_index()
