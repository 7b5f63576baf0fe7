"""The tokens at which a latent is most active."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.distribution import _check_codes
from mlsae_core.metrics.reconstruction import _check_same


class Examples(NamedTuple):
    """Top activations, largest first; ties go to the smaller position."""

    values: Tensor
    """Activations, (n_layers, n_latents, n_examples) float32; 0 where there are fewer."""
    positions: Tensor
    """The tokens' positions as given, the same shape, int64; −1 where there are fewer."""


class TopExamples:
    """The most strongly activating tokens of every latent at every layer.

    One pass, mergeable: the result is the best `n_examples` under one total order, however the
    tokens were cut. Memory is 12 bytes · n_layers · n_latents · n_examples.

    Args:
        n_layers, n_latents: sizes as in `LayerDistribution`.
        n_examples: how many to keep per (layer, latent).
        device: where they are kept.
    """

    def __init__(
        self,
        n_layers: int,
        n_latents: int,
        n_examples: int = 10,
        device: torch.device | str = "cpu",
    ) -> None:
        shape = (n_layers, n_latents, n_examples)
        self.values = torch.zeros(shape, device=device)
        self.positions = torch.full(shape, -1, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(self, indices: Tensor, values: Tensor, positions: Tensor) -> None:
        """Add a batch.

        Args:
            indices: active latents, (layer, token, k).
            values: their activations, (layer, token, k), not negative.
            positions: a number that names each token, (token,) integers from 0, such as
                sequence · context_length + position.
        """
        n_layers, n_latents, n_examples = self.values.shape
        _check_codes(indices, values, n_layers, n_latents)
        if positions.shape != indices.shape[1:2]:
            raise ValueError(
                f"positions must be ({indices.shape[1]},), got {tuple(positions.shape)}"
            )
        device = self.values.device
        best, where = self.values.view(-1, n_examples), self.positions.view(-1, n_examples)
        layer = torch.arange(n_layers, device=device)[:, None, None]
        step = max(1, 2**17 // max(1, n_layers * indices.shape[2]))
        for part in range(0, indices.shape[1], step):
            rows = slice(part, part + step)
            h = values[:, rows].to(device, torch.float32)
            cell = layer * n_latents + indices[:, rows].to(device)
            position = positions[rows].to(device)[:, None].expand_as(h)
            # most entries cannot enter the list of their (layer, latent) and stop here
            keep = (h > 0) & (h >= best[:, -1][cell])
            cell, h, position = cell[keep], h[keep], position[keep]
            # sort by cell, then falling activation, then position
            order = position.argsort(stable=True)
            order = order[h[order].argsort(stable=True, descending=True)]
            order = order[cell[order].argsort(stable=True)]
            cells, slot, size = cell[order].unique_consecutive(
                return_inverse=True, return_counts=True
            )
            rank = torch.arange(len(slot), device=device) - (size.cumsum(0) - size)[slot]
            top = rank < n_examples
            new = h.new_zeros(len(cells), n_examples)
            new[slot[top], rank[top]] = h[order[top]]
            new_where = where.new_full(new.shape, -1)
            new_where[slot[top], rank[top]] = position[order[top]]
            best[cells], where[cells] = _best(best[cells], where[cells], new, new_where)

    def merge(self, other: TopExamples) -> Self:
        """Add what another accumulator has seen (disjoint positions); returns self."""
        _check_same(self.values.shape, other.values.shape)
        theirs = (t.to(self.values.device) for t in (other.values, other.positions))
        self.values, self.positions = _best(self.values, self.positions, *theirs)
        return self

    def compute(self) -> Examples:
        """The best examples of everything seen so far."""
        return Examples(self.values.clone(), self.positions.clone())


def _best(
    values: Tensor, positions: Tensor, more: Tensor, more_positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The better half of two lists per row, by falling value, then rising position."""
    size = values.shape[-1]
    positions, order = torch.cat([positions, more_positions], -1).sort(-1)
    values = torch.cat([values, more], -1).gather(-1, order)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return values[..., :size], positions.gather(-1, order[..., :size])
