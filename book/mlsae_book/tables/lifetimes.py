"""Over how many layers a feature lives, from dictionaries of single layers: see
`metrics.lifetimes`."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor

from mlsae_core.activations import ActivationSource, one_pass
from mlsae_core.metrics import Correlation, LayerDistribution, best_matches, chain_lengths
from mlsae_core.sae import MLSAE

#: A match is a correlation above one of these.
LEAST = (0.3, 0.5, 0.7)
#: What is matched: latents of the layers' own dictionaries with those of the next layer's; the same
#: with other tokens, by chance alone; with another dictionary of the same layer, the most that can
#: be found again; and an MLSAE's with its own at the next layer.
MATCHED = ("next layer", "other tokens", "another seed", "MLSAE")
ACTIVE = 0.1  # of the tokens of its main layer, at which an MLSAE's latent lives at another


@torch.no_grad()
def lifetimes(
    source: ActivationSource,
    dictionaries: Sequence[MLSAE],
    others: dict[int, MLSAE],
    shared: MLSAE,
    size: int = 8,
    *,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """Matches between layers, and chains of them.

    Args:
        dictionaries: of each layer. others: of some layers, trained with another seed. shared: the
            MLSAE of all layers.

    Returns:
        ``matches``: one row per ``of`` (`MATCHED`), ``layer`` and ``least`` correlation: ``share``
        of the active latents that are each other's best, ``correlation`` (median of the best), and
        for the MLSAE ``same`` (of its matches, those of a latent with itself). ``chains``: one row
        per ``of``, ``least`` and ``layers``: the ``share`` of chains that reach over so many; for
        ``MLSAE, layers at which active`` the share of latents that live at so many layers.
    """
    n, width = source.n_layers, dictionaries[0].n_latents
    generator = torch.Generator().manual_seed(0)
    sums = {(of, layer): Correlation(width, width) for of in MATCHED[:2] for layer in range(n - 1)}
    sums |= {("another seed", layer): Correlation(width, width) for layer in others}
    own = shared.n_latents
    sums |= {("MLSAE", layer): Correlation(own, own) for layer in range(n - 1)}
    spread = LayerDistribution(n, own)
    for batch in one_pass(source.batches(size), source, size, "lifetimes", progress):
        x = batch.source
        codes = [_codes(sae, part) for sae, part in zip(dictionaries, x, strict=True)]
        order = torch.randperm(x.shape[1], generator=generator)
        indices, values = _codes(shared, x)
        spread.update(indices, values)
        for (of, layer), total in sums.items():
            if of == "MLSAE":
                first, second = ((indices[i], values[i]) for i in (layer, layer + 1))
            else:
                first = codes[layer]
                if of == "another seed":
                    second = _codes(others[layer], x[layer])
                else:
                    second = codes[layer + 1]
                    if of == "other tokens":
                        second = tuple(part[order] for part in second)
            total.update(first, second)
    correlations = {key: total.compute() for key, total in sums.items()}
    return {
        "matches": _matches(correlations),
        "chains": _chains(correlations, n, spread.compute().counts),
    }


def _codes(sae: MLSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    values, indices = sae.encode(x)
    return indices, values


def _active(correlation: Tensor) -> tuple[Tensor, Tensor]:
    """The latents of both sides that vary."""
    known = correlation.isfinite()
    return known.any(1), known.any(0)


def _matches(correlations: dict[tuple[str, int], Tensor]) -> pd.DataFrame:
    rows = []
    for (of, layer), correlation in correlations.items():
        active = _active(correlation)[0]
        for least in LEAST:
            found = best_matches(correlation, least)
            hit = found.other >= 0
            same = (found.other == torch.arange(len(hit)))[hit].double().mean()
            row = {"of": of, "layer": layer, "least": least, "latents": int(active.sum())}
            row |= {"share": float(hit.sum() / active.sum())}
            row |= {"correlation": float(found.correlation.nanmedian())}
            rows.append(row | {"same": float(same) if of == "MLSAE" else float("nan")})
    return pd.DataFrame(rows)


def _chains(correlations: dict[tuple[str, int], Tensor], n: int, counts: Tensor) -> pd.DataFrame:
    rows = []
    for of in ("next layer", "other tokens"):
        steps = [correlations[of, layer] for layer in range(n - 1)]
        masks = [_active(steps[0])[0], *(_active(step)[1] for step in steps)]
        for least in LEAST:
            lengths = chain_lengths([best_matches(step, least).other for step in steps], masks)
            rows += _shares(of, least, lengths, n)
    lives = (counts > ACTIVE * counts.amax(0)).sum(0)
    rows += _shares("MLSAE, layers at which active", float("nan"), lives[lives > 0], n)
    return pd.DataFrame(rows)


def _shares(of: str, least: float, lengths: Tensor, n: int) -> list[dict]:
    counts = torch.bincount(lengths.cpu(), minlength=n + 1)[1:].double()
    shares = (counts / counts.sum()).tolist()
    mean = float(lengths.double().mean())
    return [
        {"of": of, "least": least, "layers": layers, "share": share, "mean": mean}
        for layers, share in enumerate(shares, 1)
    ]
