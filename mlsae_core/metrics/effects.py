"""What becomes of a latent at a later layer when it is taken out at an earlier one.

A latent's activation a at a later layer, before any selection, is read three times: as it is; with
the latent taken out at the earlier layer and everything run again; and with it taken out and all
updates in between kept as they were, so that nothing but the loss itself arrives. The drops are
shares of a: near 1 twice where the latent is carried, 0 and 1 where it is computed anew, and more
with the model run than without where blocks add to what is there.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.reconstruction import _check_same
from mlsae_core.metrics.resampling import _blocks, _resampled


class EffectsResult(NamedTuple):
    """Means and drops of each group, float64, (…, group); nan for a group without samples."""

    activation: Tensor
    """Mean of a."""
    total: Tensor
    """Σ (a − a with the model run) / Σ a, known as ρ."""
    direct: Tensor
    """Σ (a − a with updates kept) / Σ a, known as δ."""


class Effects:
    """Drops of activations by group: exact, one pass, mergeable.

    Ratios are of sums, so a sample counts by its activation.

    Args:
        n_groups: strata of the samples.
        n_blocks: blocks of sequences to resample; 1 if no interval is wanted.
    """

    def __init__(self, n_groups: int, n_blocks: int = 1) -> None:
        self.shape = (n_groups, n_blocks)
        # columns: samples, Σ a, Σ of both drops
        self.sums = torch.zeros(n_blocks, n_groups, 4, dtype=torch.float64)

    @torch.no_grad()
    def update(
        self,
        activation: Tensor,
        run: Tensor,
        kept: Tensor,
        group: Tensor,
        sequences: Tensor | None = None,
    ) -> None:
        """Add samples.

        Args:
            activation, run, kept: a of each sample as it is, with the model run again, and with the
                updates kept; (sample,).
            group: the stratum of each, (sample,) integers; negative: none.
            sequences: the sequence each is from, (sample,); needed if n_blocks > 1.
        """
        n_groups, n_blocks = self.shape
        for part in (run, kept, group):
            if part.shape != activation.shape or part.ndim != 1:
                raise ValueError(
                    f"expected all of shape (sample,) = {tuple(activation.shape)}, got "
                    f"{tuple(part.shape)}"
                )
        if len(group) and int(group.max()) >= n_groups:
            raise ValueError(f"group must be below {n_groups}, got {int(group.max())}")
        blocks = _blocks(sequences, len(group), n_blocks).to(group.device)
        a, run, kept = (part.double() for part in (activation, run, kept))
        rows = torch.stack([torch.ones_like(a), a, a - run, a - kept], 1)
        found = group >= 0
        cell = (blocks * n_groups + group)[found].to(self.sums.device)
        self.sums.view(-1, 4).index_add_(0, cell, rows[found].to(self.sums.device))

    def merge(self, other: Effects) -> Self:
        """Add what another accumulator has seen (disjoint samples); returns self."""
        _check_same(self.shape, other.shape)
        self.sums += other.sums
        return self

    def pooled(self, groups: Tensor) -> Effects:
        """The same samples in coarser groups.

        groups: (n_groups,) integers, the new group of each; negative: left out.
        """
        chosen = groups >= 0
        other = Effects(int(groups.max()) + 1, self.shape[1])
        other.sums.index_add_(1, groups[chosen], self.sums[:, chosen])
        return other

    @property
    def samples(self) -> Tensor:
        """Samples of each group, (group,) int64."""
        return self.sums[..., 0].sum(0).long()

    def compute(self) -> EffectsResult:
        """The drops of everything seen so far."""
        return _drops(self.sums.sum(0))

    def bootstrap(
        self, n_replicates: int, generator: torch.Generator | None = None
    ) -> EffectsResult:
        """The same of resampled data, each field (n_replicates, group), for `basic_interval`."""
        weights = _resampled(self.shape[1], n_replicates, generator)
        return _drops(torch.einsum("rb,bgs->rgs", weights.to(self.sums.device), self.sums))


def _drops(sums: Tensor) -> EffectsResult:
    samples, a, run, kept = sums.unbind(-1)
    return EffectsResult(a / samples, run / a, kept / a)
