"""Norms, reconstruction and sparsity of groups of tokens: by position, say, or of massive ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.distribution import _check_codes
from mlsae_core.metrics.reconstruction import Reconstruction, _at_least_float32, _check_same


class GroupsResult(NamedTuple):
    """Metrics of each group at each layer, (group, layer) float64; nan for a group without tokens.

    Both variances are about the layer's one mean over the tokens and dimensions of *all* groups,
    so that the groups' FVU, weighted by their shares, add up to that of the layer (`fvu`).
    """

    tokens: Tensor
    """Tokens of each group, (group,) int64."""
    norm: Tensor
    """Mean length of a vector, in activation units."""
    share: Tensor
    """The group's part of the layer's variance."""
    fvu: Tensor
    """The group's squared error over its part of the variance."""
    l1: Tensor
    """Mean over tokens of Σ_j |h_j|."""
    l0: Tensor
    """Mean over tokens of the number of non-zero latents."""
    latents: Tensor
    """Latents that it would take to be active equally often: exp of the entropy of which latent is
    active, all tokens of the group together. Fewer tokens show fewer latents."""


class Groups:
    """Norms, FVU, L1, L0 and latents of groups of tokens: exact, one pass, mergeable.

    Memory is O(n_groups · n_layers · (d_model + n_latents)).

    Args:
        n_groups: kinds of tokens, each token being of one.
        n_layers, d_model: as in `Reconstruction`.
        n_latents: latents of the dictionary.
        device: where the sums are kept; it must know float64.
    """

    def __init__(
        self,
        n_groups: int,
        n_layers: int,
        d_model: int,
        n_latents: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = (n_groups, n_layers, d_model, n_latents)
        self.parts = [Reconstruction(n_layers, d_model, device) for _ in range(n_groups)]
        self.norms = torch.zeros(n_groups, n_layers, dtype=torch.float64, device=device)
        self.active = torch.zeros(n_groups, n_layers, n_latents, dtype=torch.int64, device=device)

    @torch.no_grad()
    def update(
        self, x: Tensor, recon: Tensor, indices: Tensor, values: Tensor, group: Tensor
    ) -> None:
        """Add a batch.

        Args:
            x, recon: vectors and their reconstructions, (layer, token, d_model).
            indices, values: active latents and activations, (layer, token, k).
            group: the group of each token, (token,) integers.
        """
        n_groups, n_layers, _, n_latents = self.shape
        _check_codes(indices, values, n_layers, n_latents)
        if group.shape != x.shape[1:2]:
            raise ValueError(f"group must be ({x.shape[1]},), got {tuple(group.shape)}")
        if len(group) and not 0 <= int(group.min()) <= int(group.max()) < n_groups:
            raise ValueError(
                f"group must lie in [0, {n_groups}), got {int(group.min())} to {int(group.max())}"
            )
        for number in group.unique().tolist():
            rows = (group == number).nonzero()[:, 0]
            vectors, h, j = (part.index_select(1, rows) for part in (x, values, indices))
            self.parts[number].update(vectors, recon.index_select(1, rows), h)
            lengths = torch.linalg.vector_norm(_at_least_float32(vectors), dim=-1)
            self.norms[number] += lengths.sum(1, dtype=torch.float64).to(self.norms.device)
            active = (h > 0).long().flatten(1).to(self.active.device)
            self.active[number].scatter_add_(1, j.flatten(1).to(self.active.device), active)

    def merge(self, other: Groups) -> Self:
        """Add what another accumulator has seen (a disjoint set of tokens); returns self."""
        _check_same(self.shape, other.shape)
        for mine, its in zip(self.parts, other.parts, strict=True):
            mine.merge(its)
        self.norms += other.norms.to(self.norms.device)
        self.active += other.active.to(self.active.device)
        return self

    def pooled(self, groups: Sequence[Sequence[int]]) -> Groups:
        """The same tokens in coarser groups, each given by those that it is made of; what is in
        none is left out."""
        made = Groups(len(groups), *self.shape[1:], self.norms.device)
        for number, members in enumerate(groups):
            for member in members:
                made.parts[number].merge(self.parts[member])
                made.norms[number] += self.norms[member]
                made.active[number] += self.active[member]
        return made

    def compute(self) -> GroupsResult:
        """The metrics of everything seen so far."""
        tokens = torch.tensor([part.moments.tokens for part in self.parts])
        n = tokens.double()[:, None].to(self.norms.device)
        if not tokens.sum():
            raise ValueError("no tokens seen: call update() with at least one token first")
        means = torch.stack([part.moments.mean for part in self.parts])
        within = torch.stack([part.moments.scatter for part in self.parts])
        base = ((n[..., None] * means).sum(0) / n.sum()).mean(1)
        spread = (within + n[..., None] * (means - base[None, :, None]) ** 2).sum(2)
        error, l1, l0 = torch.stack([part.sums for part in self.parts], 1)
        p = self.active / self.active.sum(2, keepdim=True)
        latents = torch.special.entr(p).sum(2).exp()
        share = (spread / spread.sum(0)).where(n > 0, torch.nan)
        return GroupsResult(tokens, self.norms / n, share, error / spread, l1 / n, l0 / n, latents)
