"""What the code released with the MLSAE paper computes, where it differs from the definitions.

For comparison alone: nothing else in the project calls these. They follow descriptions of that
code's behaviour, not its text; shapes are as in `metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlsae_core.metrics import kl_divergence


def masked(x: Tensor, keep: Tensor) -> Tensor:
    """x (layer, token, d_model) with special tokens set to zero, so that they still count as data;
    ours have those tokens removed."""
    return x * keep[None, :, None]


def mean_fvu(batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(layer,) mean over batches (x, recon) of the global FVU; ours sums numerators and
    denominators and divides once."""
    ratios = [
        (x - recon).square().mean((1, 2)) / x.var((1, 2), correction=0) for x, recon in batches
    ]
    return torch.stack(ratios).mean(0)


def count_dead_steps(steps_since_active: Tensor, fired: Tensor) -> Tensor:
    """(latent,) counters after a step or an *evaluation* batch, in steps whatever their size; ours
    counts training tokens, and evaluation changes nothing."""
    return torch.where(fired, 0, steps_since_active + 1)


def invert_lens(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Invert y = x + W x + b with the diagonal of (I + W)⁻¹ alone, y (token, d_model); ours
    multiplies with the whole inverse."""
    inverse = torch.linalg.inv(torch.eye(len(weight), dtype=weight.dtype) + weight)
    return (y - bias) * inverse.diagonal()


def translator(layer: int) -> int:
    """The translator taken for the residual stream after block `layer`: the same index, though it
    was trained on that block's input; ours takes the next, and the identity after the last."""
    return layer


def summed_kl(original: Tensor, replaced: Tensor) -> Tensor:
    """KL(replaced ‖ original) summed over positions, of logits (position, vocabulary); ours is
    KL(original ‖ replaced), its mean over positions."""
    return kl_divergence(replaced, original).sum()


def layer_probs(codes: Tensor) -> Tensor:
    """(token, latent, layer) probabilities of dense codes (layer, token, latent) with zero where a
    latent is inactive, so that their means over tokens do not sum to one; ours takes active tokens
    alone."""
    total = codes.sum(0)
    probs = torch.where(total > 0, codes / total, 0)
    return probs.permute(1, 2, 0)


def variances(batches: Sequence[Tensor]) -> tuple[float, float, float]:
    """Means over batches of Var(L), E[Var(L|J)], E[Var(L|J,T)] of dense codes (layer, token,
    latent), variances being E[L²] − E[L]² of probabilities that do not sum to one; ours adds up
    all batches and normalises."""
    parts = []
    for codes in batches:
        probs = layer_probs(codes).double()
        parts.append([_variance(p).mean() for p in (probs.mean((0, 1)), probs.mean(0), probs)])
    return tuple(torch.tensor(parts).mean(0).tolist())


def ratios(batches: Sequence[Tensor]) -> tuple[float, float]:
    """Means over batches of the ratios of Eq. 11 and Eq. 12, of `variances`; ours divides once."""
    found = torch.tensor([variances([codes]) for codes in batches])
    return (found[:, 1] / found[:, 0]).mean().item(), (found[:, 2] / found[:, 1]).mean().item()


def half_mmcs(rows: Tensor) -> float:
    """MMCS in which a row is compared with the rows after it alone, the last one with none; ours
    compares it with every other row."""
    similar = torch.nn.functional.normalize(rows, dim=1)
    above = (similar @ similar.T).masked_fill(
        torch.ones(len(rows), len(rows)).tril().bool(), -torch.inf
    )
    return above[:-1].amax(1).mean().item()


def _variance(probs: Tensor) -> Tensor:
    layers = torch.arange(probs.shape[-1], dtype=probs.dtype)
    return probs @ layers**2 - (probs @ layers) ** 2
