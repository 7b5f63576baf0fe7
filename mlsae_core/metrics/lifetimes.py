"""Over how many layers a feature lives, from dictionaries that were trained layer by layer.

A latent at one layer and one at the next are taken for the same feature where each is the one whose
activations, on the same tokens, correlate best with the other's (as features of networks are
matched in Li et al. 2016, "Convergent Learning"). A chain of such matches is a lifetime, measured
without any dictionary that is shared by layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.distribution import _check_codes
from mlsae_core.metrics.reconstruction import _check_same


class Matches(NamedTuple):
    """The latents of two dictionaries that are each other's best."""

    other: Tensor
    """Latent of the second that is matched with each of the first, (n_latents,) int64; −1: none."""
    correlation: Tensor
    """Correlation of each latent of the first with its best, matched or not, (n_latents,) float64;
    nan for latents whose activation does not vary."""


class Correlation:
    """Correlations of all latents of one dictionary with all of another, over the same tokens.

    One pass, mergeable, exact; latents that are not selected count as 0. Memory is
    8 bytes · n_latents · n_others.

    Args:
        n_latents, n_others: latents of the two dictionaries.
        device: where the sums are kept.
    """

    def __init__(self, n_latents: int, n_others: int, device: torch.device | str = "cpu") -> None:
        self.shape, self.tokens = (n_latents, n_others), 0
        self.products = torch.zeros(n_latents, n_others, dtype=torch.float64, device=device)
        # rows: Σ and Σ² of each latent
        self.first = self.products.new_zeros(2, n_latents)
        self.second = self.products.new_zeros(2, n_others)

    @torch.no_grad()
    def update(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        """Add a batch: indices and values of both codes, each (token, k), of the same tokens."""
        device = self.products.device
        sides = []
        for (indices, values), n in zip((first, second), self.shape, strict=True):
            _check_codes(indices[None], values[None], 1, n)
            sides.append((indices.to(device), values.to(device, torch.float64)))
        if len(first[0]) != len(second[0]):
            raise ValueError(
                f"expected codes of the same tokens, got {len(first[0])} and {len(second[0])}"
            )
        self.tokens += len(first[0])
        for sums, (indices, values) in zip((self.first, self.second), sides, strict=True):
            for row, x in zip(sums, (values, values.square()), strict=True):
                row.index_add_(0, indices.flatten(), x.flatten())
        (a, x), (b, y) = sides
        cells = a[:, :, None] * self.shape[1] + b[:, None]
        self.products.view(-1).index_add_(
            0, cells.flatten(), (x[:, :, None] * y[:, None]).flatten()
        )

    def merge(self, other: Correlation) -> Self:
        """Add what another accumulator has seen (disjoint tokens); returns self."""
        _check_same(self.shape, other.shape)
        self.tokens += other.tokens
        for name in ("products", "first", "second"):
            mine = getattr(self, name)
            mine += getattr(other, name).to(mine.device)
        return self

    def compute(self) -> Tensor:
        """Pearson's correlations, (n_latents, n_others); nan where one side does not vary."""
        n = max(self.tokens, 1)
        (a, aa), (b, bb) = self.first / n, self.second / n
        deviations = [(square - mean**2).clamp(min=0).sqrt() for mean, square in ((a, aa), (b, bb))]
        covariance = self.products / n - a[:, None] * b
        return covariance / (deviations[0][:, None] * deviations[1])


def best_matches(correlations: Tensor, least: float = 0.0) -> Matches:
    """The latents that are each other's best, if they correlate by more than `least`.

    Args:
        correlations: (n_latents, n_others), as `Correlation.compute` gives them. Of equal ones the
            first latent is the best.
    """
    known = correlations.nan_to_num(nan=-2.0)  # below every correlation
    best, other = known.max(1)
    mutual = known.max(0).indices[other] == torch.arange(len(known), device=known.device)
    found = torch.where(mutual & (best > least), other, -1)
    return Matches(found, torch.where(best < -1.5, torch.nan, best))


def chain_lengths(matches: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Layers over which each chain of matches reaches.

    Args:
        matches: for each layer but the last, `Matches.other` between it and the next.
        sizes: latents of each layer's dictionary, or masks (n_latents,) bool of those that count.

    Returns:
        (chain,) int64, in the order in which chains begin: layer by layer, then by latent. A latent
        that is matched with none is a chain of one layer.
    """
    masks = [torch.ones(s, dtype=torch.bool) if isinstance(s, int) else s.cpu() for s in sizes]
    if len(masks) != len(matches) + 1:
        raise ValueError(f"expected {len(matches) + 1} sizes for {len(matches)} matches, got "
                         f"{len(masks)}")  # fmt: skip
    found, age = [], torch.zeros(len(masks[0]), dtype=torch.int64)
    ends: list[Tensor] = []
    first = torch.zeros_like(age)  # the layer at which the chain through each latent began
    numbers = torch.arange(len(age))  # and its latent there
    for layer, mask in enumerate(masks):
        age = age + 1
        there = matches[layer].cpu() if layer < len(matches) else torch.full_like(age, -1)
        if layer < len(matches):
            there = torch.where(mask & masks[layer + 1][there.clamp(min=0)], there, -1)
        over = mask & (there < 0)
        ends.append(torch.stack([first[over], numbers[over], age[over]]))
        if layer < len(matches):
            size = len(masks[layer + 1])
            new = torch.zeros(size, dtype=torch.int64)
            begun, latent = torch.full((size,), layer + 1), torch.arange(size)
            goes = there >= 0
            new[there[goes]] = age[goes]
            begun[there[goes]], latent[there[goes]] = first[goes], numbers[goes]
            age, first, numbers = new, begun, latent
    found = torch.cat(ends, 1)
    order = (found[0] * (max(len(m) for m in masks) + 1) + found[1]).argsort(stable=True)
    return found[2, order]
