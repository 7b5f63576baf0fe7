"""Blocks of sequences, drawn again with replacement, and the intervals that they give."""

from __future__ import annotations

import torch
from torch import Tensor


def _blocks(sequences: Tensor | None, tokens: int, n_blocks: int) -> Tensor:
    """The block of each token, (token,)."""
    if sequences is None:
        if n_blocks > 1:
            raise ValueError(f"n_blocks is {n_blocks}: update() needs the sequence ids")
        sequences = torch.zeros(tokens)
    if sequences.shape != (tokens,):
        raise ValueError(f"sequences must be ({tokens},), got {tuple(sequences.shape)}")
    return sequences.long() % n_blocks


def _resampled(n_blocks: int, n_replicates: int, generator: torch.Generator | None) -> Tensor:
    """How often each block is drawn, (n_replicates, n_blocks) float64: n_blocks of them with
    replacement (Efron 1979)."""
    if n_blocks < 2:
        raise ValueError("to resample, make the accumulator with n_blocks ≥ 2, such as 64")
    shape = (n_replicates, n_blocks)
    chosen = torch.randint(n_blocks, shape, generator=generator, device=_drawn_on(generator))
    weights = torch.zeros(shape, dtype=torch.float64, device=chosen.device)
    return weights.scatter_add_(1, chosen, torch.ones_like(weights))


def basic_interval(estimate: float, replicates: Tensor, level: float = 0.95) -> tuple[float, float]:
    """Basic bootstrap interval, 2·estimate − quantiles of the replicates.

    A variance of few tokens comes out too small, and smaller still when they are resampled; the
    basic interval takes that bias off, where a percentile interval would double it (Davison and
    Hinkley 1997, section 5.2.1).
    """
    tail = (1 - level) / 2
    ends = replicates.new_tensor([1 - tail, tail])
    low, high = (2 * estimate - replicates.quantile(ends)).tolist()
    return low, high


def _drawn_on(generator: torch.Generator | None) -> torch.device | None:
    return generator.device if generator else None
