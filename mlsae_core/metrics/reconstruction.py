"""How much of the activations an autoencoder reconstructs: FVU, MSE, L1, L0.

Activations are (layer, token, d_model); special tokens have been removed before. Nothing here
averages ratios over batches: sums are kept, and divided once.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.resampling import _blocks, _resampled

Variant = Literal["global", "per_dimension"]


def fvu(x: Tensor, recon: Tensor, variant: Variant = "global") -> Tensor:
    r"""Fraction of variance unexplained of each layer, (layer,) in float64, without unit.

    Σ‖x − x̂‖² / Σ‖x − b‖² over the layer's tokens and dimensions, where the baseline b is

    - ``"global"``: one number per layer, the mean over tokens and dimensions (Lawson et al. 2024,
      Eq. 3, as their code computes it; their Table 1);
    - ``"per_dimension"``: the mean vector over tokens. 1 − FVU is then the explained variance, and
      predicting that mean gives exactly 1. Never smaller than the global variant, since
      a constant offset of a dimension does not count as variance.

    Args:
        x: activations, (layer, token, d_model).
        recon: their reconstructions, the same shape.
        variant: which baseline.

    A layer without variance gives inf, or nan where it is reconstructed exactly. No gradient. For
    more than one batch use `Reconstruction`: a mean of ratios is not the ratio of the sums.
    """
    _check_pair(x, recon)
    if variant not in ("global", "per_dimension"):
        raise ValueError(f"variant must be 'global' or 'per_dimension', got {variant!r}")
    total = Reconstruction(x.shape[0], x.shape[2], x.device)
    total.update(x, recon)
    return getattr(total.compute(), f"fvu_{variant}")


class LayerMoments:
    """Mean and scatter of every dimension at every layer, over all tokens seen.

    One pass, mergeable (Chan, Golub and LeVeque 1979), in float64; each batch is centred before
    it is squared, so an offset that is large against the spread costs no accuracy.

    Attributes:
        tokens: number of tokens seen.
        mean: (layer, d_model), the mean over tokens: what drift subtracts, what mean ablation
            puts in a layer's place.
        scatter: (layer, d_model), the sum over tokens of (x − mean)².
    """

    def __init__(self, n_layers: int, d_model: int, device: torch.device | str = "cpu") -> None:
        self.tokens = 0
        self.mean = torch.zeros(n_layers, d_model, dtype=torch.float64, device=device)
        self.scatter = torch.zeros_like(self.mean)

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Add a batch of activations, (layer, token, d_model)."""
        _check_layers(x, self.mean.shape[0], self.mean.shape[1])
        if x.shape[1] == 0:
            return
        x = _at_least_float32(x)
        shift = x.mean(1)
        centred = x - shift[:, None]
        rest = centred.mean(1, dtype=torch.float64)
        scatter = centred.square_().sum(1, dtype=torch.float64) - x.shape[1] * rest**2
        self._merge(x.shape[1], shift.double() + rest, scatter)

    def merge(self, other: LayerMoments) -> Self:
        """Add what another accumulator has seen (a disjoint set of tokens); returns self."""
        _check_same(self.mean.shape, other.mean.shape)
        self._merge(other.tokens, other.mean, other.scatter)
        return self

    def _merge(self, tokens: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.tokens + tokens
        if tokens == 0:
            return
        step = mean.to(self.mean.device) - self.mean
        self.mean = self.mean + step * (tokens / total)
        between = step**2 * (self.tokens * (tokens / total))
        self.scatter = self.scatter + scatter.to(self.mean.device) + between
        self.tokens = total


class ReconstructionResult(NamedTuple):
    """Reconstruction error and sparsity of each layer; all but `tokens` are (layer,) float64."""

    tokens: int
    """Tokens seen, the same at every layer."""
    fvu_global: Tensor
    """FVU about one mean over tokens and dimensions, see `fvu`."""
    fvu_per_dimension: Tensor
    """FVU about the mean vector, see `fvu`."""
    mse: Tensor
    """Mean squared error over tokens and dimensions, in squared activation units."""
    l1: Tensor
    """Mean over tokens of Σ_j |h_j| (Lawson et al. 2024, Table 1); nan without `values`."""
    l0: Tensor
    """Mean over tokens of the number of non-zero latents; nan without `values`."""


class Reconstruction:
    """FVU (both variants), MSE, L1 and L0 of each layer over any number of batches.

    Exact: numerators and the baseline's moments are summed and divided at the end, so the result
    does not depend on how the tokens were cut into batches. (The code released with the paper
    averages the ratios of batches.) Memory is O(n_blocks · n_layers · d_model).

    Args:
        n_layers: layers per batch, the first axis of what `update` takes.
        d_model: length of an activation vector.
        device: where the sums are kept; it must know float64.
        n_blocks: blocks of sequences to resample, for `bootstrap`; 1 if no interval is wanted.
    """

    def __init__(
        self,
        n_layers: int,
        d_model: int,
        device: torch.device | str = "cpu",
        n_blocks: int = 1,
    ) -> None:
        self.moments = LayerMoments(n_layers, d_model, device)
        # rows: Σ‖x − x̂‖², Σ|h|, Σ[h ≠ 0]
        self.sums = torch.zeros(3, n_layers, dtype=torch.float64, device=device)
        self.coded = 0
        blocks = n_blocks if n_blocks > 1 else 0
        self.blocks = {n: LayerMoments(n_layers, d_model, device) for n in range(blocks)}
        self.errors = self.sums.new_zeros(blocks, n_layers)  # Σ‖x − x̂‖² of each block

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        recon: Tensor,
        values: Tensor | None = None,
        sequences: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            x: what was to be reconstructed, (layer, token, d_model).
            recon: the reconstruction, the same shape.
            values: activations of the k largest latents, (layer, token, k), for L1 and L0.
            sequences: the sequence of each token, (token,); needed if n_blocks > 1.
        """
        _check_pair(x, recon)
        self.moments.update(x)
        device = self.sums.device
        error = _at_least_float32(x) - _at_least_float32(recon)
        self.sums[0] += _sum_squares(error).to(device)
        if self.blocks:
            dealt = _blocks(sequences, x.shape[1], len(self.blocks)).to(x.device)
            for block in dealt.unique().tolist():
                self.blocks[block].update(x[:, dealt == block])
                self.errors[block] += _sum_squares(error[:, dealt == block]).to(device)
        if values is not None:
            if values.ndim != 3 or values.shape[:2] != x.shape[:2]:
                raise ValueError(
                    f"values must be (layer, token, k) = {(*x.shape[:2], 'k')}, "
                    f"got {tuple(values.shape)}"
                )
            self.sums[1] += values.abs().sum((1, 2), dtype=torch.float64).to(device)
            self.sums[2] += values.count_nonzero((1, 2)).to(device)
            self.coded += values.shape[1]

    def merge(self, other: Reconstruction) -> Self:
        """Add what another accumulator has seen (a disjoint set of tokens); returns self."""
        _check_same(self.errors.shape, other.errors.shape)
        self.moments.merge(other.moments)
        self.sums += other.sums.to(self.sums.device)
        self.coded += other.coded
        for block, moments in self.blocks.items():
            moments.merge(other.blocks[block])
        self.errors += other.errors.to(self.errors.device)
        return self

    def compute(self) -> ReconstructionResult:
        """The metrics of everything seen so far."""
        tokens, mean, scatter = self.moments.tokens, self.moments.mean, self.moments.scatter
        if tokens == 0:
            raise ValueError("no tokens seen: call update() with at least one token first")
        error, l1, l0 = self.sums
        per_dimension = scatter.sum(1)
        # Var about one scalar = variance about the mean vector + variance of that vector's entries
        spread = (mean - mean.mean(1, keepdim=True)).square().sum(1)
        coded = self.coded or float("nan")
        return ReconstructionResult(
            tokens=tokens,
            fvu_global=error / (per_dimension + tokens * spread),
            fvu_per_dimension=error / per_dimension,
            mse=error / (tokens * mean.shape[1]),
            l1=l1 / coded,
            l0=l0 / coded,
        )

    def bootstrap(
        self, n_replicates: int, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`fvu_global`, `fvu_per_dimension` and `mse` of resampled data, each
        (n_replicates, layer), for `basic_interval`.

        Each replicate draws n_blocks blocks of sequences with replacement (Efron 1979), and its
        baselines are the means of what it drew.
        """
        parts, device = self.blocks.values(), self.errors.device
        weights = _resampled(len(parts), n_replicates, generator).to(device)
        tokens = torch.tensor([part.tokens for part in parts], device=device).double()
        # about the mean of everything seen, so that squares of offsets cost no digits
        means = torch.stack([part.mean for part in parts]) - self.moments.mean
        squares = torch.stack([part.scatter for part in parts]) + tokens[:, None, None] * means**2
        count = (weights @ tokens)[:, None]
        error = weights @ self.errors
        mean = torch.einsum("rb,b,bld->rld", weights, tokens, means) / count[..., None]
        scatter = torch.einsum("rb,bld->rl", weights, squares) - count * mean.square().sum(-1)
        centre = mean + self.moments.mean
        spread = (centre - centre.mean(-1, keepdim=True)).square().sum(-1)
        return {
            "fvu_global": error / (scatter + count * spread),
            "fvu_per_dimension": error / scatter,
            "mse": error / (count * mean.shape[-1]),
        }


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum_squares(x: Tensor) -> Tensor:
    return x.square().sum((1, 2), dtype=torch.float64)


def _check_pair(x: Tensor, recon: Tensor) -> None:
    if x.ndim != 3 or x.shape != recon.shape:
        raise ValueError(
            "x and recon must both be (layer, token, d_model), "
            f"got {tuple(x.shape)} and {tuple(recon.shape)}"
        )


def _check_layers(x: Tensor, n_layers: int, d_model: int) -> None:
    if x.ndim != 3 or (x.shape[0], x.shape[2]) != (n_layers, d_model):
        raise ValueError(
            f"expected activations (layer, token, d_model) = ({n_layers}, token, {d_model}), "
            f"got {tuple(x.shape)}"
        )


def _check_same(mine: tuple[int, ...], theirs: tuple[int, ...]) -> None:
    if tuple(mine) != tuple(theirs):
        raise ValueError(
            f"only accumulators of one size can be merged, got {tuple(mine)} and {tuple(theirs)}"
        )
