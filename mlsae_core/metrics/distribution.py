"""Distributions of latent activations over layers (Lawson et al. 2024, section 4.3, App. C).

Latent j and token t define P(L = ℓ | t, j) = h_j(x_tℓ) / Σ_ℓ' h_j(x_tℓ') (Eq. 10) wherever j is
active at some layer. P(T | j) is uniform over those tokens and P(J) over the latents that are
active at least once. L counts the layers given, from 0; variances are in squared layers.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.reconstruction import _check_same
from mlsae_core.metrics.resampling import _blocks, _drawn_on, _resampled

#: P(J), of the latents that are active at least once: uniform, or proportional to the tokens at
#: which each is active.
Weighting = Literal["latents", "tokens"]


class Variances(NamedTuple):
    """Variances of the layer index, in squared layers, and their ratios; scalars or one shape."""

    var_l: Tensor
    """Var(L), aggregating over latents and tokens."""
    exp_var_l_given_j: Tensor
    """E[Var(L | J)], for one latent, aggregating over its tokens."""
    exp_var_l_given_jt: Tensor
    """E[Var(L | J, T)], for one latent at one token."""
    ratio_latent: Tensor
    """E[Var(L | J)] / Var(L) (Eq. 11); nan if Var(L) is 0."""
    ratio_token: Tensor
    """E[Var(L | J, T)] / E[Var(L | J)] (Eq. 12); nan if no latent changes its layer."""


class DistributionResult(NamedTuple):
    """Distributions over layers of everything seen. float64; nan for latents never active."""

    tokens: int
    """Tokens seen, active or not."""
    variances: Variances
    """The five numbers below together, as tensors: what `bootstrap` gives replicates of."""
    var_l: float
    exp_var_l_given_j: float
    exp_var_l_given_jt: float
    ratio_latent: float
    ratio_token: float
    probs: Tensor
    """P(L = ℓ | j), (n_layers, n_latents): the mean of Eq. 10 over the latent's active tokens."""
    probs_by_total: Tensor
    """Σ_t h_j(x_tℓ), normalised over ℓ, (n_layers, n_latents): the weighting of the paper's
    heatmaps (App. C.1), where tokens with large activations count for more."""
    counts: Tensor
    """Tokens at which the latent is active at the layer, (n_layers, n_latents) int64."""
    totals: Tensor
    """Σ_t h_j(x_tℓ), (n_layers, n_latents)."""
    active_tokens: Tensor
    """Tokens at which the latent is active at some layer, (n_latents,) int64."""
    live: Tensor
    """Whether the latent is active at least once, (n_latents,) bool."""
    mean_layer: Tensor
    """E[L | J = j], (n_latents,), by which the heatmaps are sorted."""
    entropy: Tensor
    """Entropy of P(L | j) over its maximum ln n_layers, (n_latents,), in [0, 1] (App. C.4)."""
    mean_entropy: float
    """Mean of `entropy` over live latents (Fig. 29)."""

    def active_layers(self, threshold: float = 1e-3) -> Tensor:
        """Fraction of the layers where a latent is active at many tokens, (n_latents,).

        Many is: more than `threshold` times the tokens seen (App. C.3 has 10k of 10M). 0 for
        a latent that is rare everywhere. Depends strongly on the threshold: show several.
        """
        return (self.counts > threshold * self.tokens).double().mean(0)


class LayerDistribution:
    """Distributions over layers of every latent: exact, one pass, mergeable.

    With p_ℓ = P(L = ℓ | t, j), m = Σ_ℓ ℓ p_ℓ and v = Σ_ℓ (ℓ − m)² p_ℓ, four sums per latent over
    its active tokens (Σ1, Σm, Σm², Σv) hold all variances, by the law of total variance (Eq. 14
    and 15). Memory is O(n_latents · (n_layers + n_blocks)) whatever the number of tokens.

    The code released with the paper averages ratios of batches and counts tokens without the
    latent as probability zero, so that its distributions do not sum to one.

    Intervals: whole sequences are dealt to `n_blocks` blocks (sequence id modulo n_blocks) with
    their own four sums, and `bootstrap` resamples blocks. 64 are plenty.

    Args:
        n_layers: layers per batch, the first axis of what `update` takes.
        n_latents: latents of the dictionary.
        n_blocks: blocks of sequences to resample; 1 if no interval is wanted.
        device: where the sums are kept and updates happen; it must know float64.
    """

    def __init__(
        self,
        n_layers: int,
        n_latents: int,
        n_blocks: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        self.shape = (n_layers, n_latents, n_blocks)
        self.tokens = 0
        zeros = torch.zeros(n_layers, n_latents, dtype=torch.float64, device=device)
        self.weights, self.totals = zeros, zeros.clone()  # Σ_t p and Σ_t h
        self.counts = torch.zeros_like(zeros, dtype=torch.int64)
        # rows: Σ1, Σm, Σm², Σv over the active tokens of a latent
        self.sums = zeros.new_zeros(n_blocks, 4, n_latents)

    @torch.no_grad()
    def update(self, indices: Tensor, values: Tensor, sequences: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            indices: active latents, (layer, token, k) integers, distinct within a vector.
            values: their activations, (layer, token, k), not negative; where 0 the latent is
                not active.
            sequences: the sequence each token is from, (token,) integers from 0; needed if
                n_blocks > 1.
        """
        n_layers, n_latents, n_blocks = self.shape
        _check_codes(indices, values, n_layers, n_latents)
        tokens, k = indices.shape[1:]
        device = self.sums.device
        blocks = _blocks(sequences, tokens, n_blocks).to(device)
        self.tokens += tokens
        step = max(1, (2**17 if device.type == "cpu" else 2**22) // max(1, n_layers * k))
        for part in range(0, tokens, step):
            rows = slice(part, part + step)
            self._add(indices[:, rows].to(device), values[:, rows].to(device), blocks[rows])

    def _add(self, indices: Tensor, values: Tensor, blocks: Tensor) -> None:
        n_layers, n_latents = self.counts.shape
        # Sort the (latent, layer) pairs within each token: every (token, latent) becomes a run.
        layer = torch.arange(n_layers, device=indices.device)[:, None, None]
        pairs, order = (indices.long() * n_layers + layer).transpose(0, 1).flatten(1).sort(1)
        h = values.transpose(0, 1).flatten(1).gather(1, order).flatten().double()
        latent = pairs.div(n_layers, rounding_mode="floor")
        first = torch.ones_like(latent, dtype=torch.bool)
        torch.ne(latent[:, 1:], latent[:, :-1], out=first[:, 1:])
        latent, layer = latent.flatten(), (pairs - latent * n_layers).flatten()
        start = first.flatten().nonzero()[:, 0]
        run = first.flatten().cumsum(0) - 1

        def over_run(x: Tensor) -> Tensor:
            return x.new_zeros(len(start)).index_add_(0, run, x)

        total = over_run(h)
        active = (total > 0).double()  # a run may hold nothing but zeros: it adds zeros below
        p = h / total.clamp_(min=torch.finfo(total.dtype).tiny).index_select(0, run)
        height = layer.double()
        mean = over_run(p * height)
        variance = over_run((height - mean.index_select(0, run)).square_().mul_(p))

        cell = layer * n_latents + latent
        for kept, x in ((self.weights, p), (self.totals, h), (self.counts, (h > 0).long())):
            kept.view(-1).index_add_(0, cell, x)
        token = start.div(pairs.shape[1], rounding_mode="floor")
        place = blocks[token] * (4 * n_latents) + latent[start]
        for row, x in enumerate((active, mean, mean.square(), variance)):
            self.sums.view(-1).index_add_(0, place + row * n_latents, x)

    def merge(self, other: LayerDistribution) -> Self:
        """Add what another accumulator has seen (disjoint tokens); returns self."""
        _check_same(self.shape, other.shape)
        self.tokens += other.tokens
        for name in ("weights", "totals", "counts", "sums"):
            mine = getattr(self, name)
            mine += getattr(other, name).to(mine.device)
        return self

    def compute(self) -> DistributionResult:
        """The distributions and variances of everything seen so far."""
        sums = self.sums.sum(0)
        n, m = sums[0], sums[1]
        live = n > 0
        if not live.any():
            raise ValueError("no latent has been active yet: call update() with activations first")
        variances = _variances(sums)
        probs = self.weights / n
        # a single layer has no entropy: its maximum, ln 1, is taken as 1
        entropy = torch.special.entr(probs).sum(0) / (math.log(len(probs)) or 1)
        return DistributionResult(
            self.tokens,
            variances,
            *(x.item() for x in variances),
            probs=probs,
            probs_by_total=self.totals / self.totals.sum(0),
            counts=self.counts.clone(),
            totals=self.totals.clone(),
            active_tokens=n.long(),
            live=live,
            mean_layer=m / n,
            entropy=entropy,
            mean_entropy=entropy[live].mean().item(),
        )

    def variances(self, weighting: Weighting = "latents", corrected: bool = False) -> Variances:
        """The variances under another P(J), or without the bias of few tokens.

        Args:
            weighting: P(J). The paper's is ``latents``; with ``tokens``, latents that are seldom
                active, whose variance is least certain, count for little.
            corrected: The variance between the n tokens of a latent in a sample is too small by
                (n − 1) / n, and the sample means of latents vary by a part of it; both are taken
                off. A latent with one token has no such variance, as without the correction.
        """
        return _variances(self.sums.sum(0), weighting, corrected)

    def bootstrap(
        self,
        n_replicates: int,
        generator: torch.Generator | None = None,
        weighting: Weighting = "latents",
        corrected: bool = False,
    ) -> Variances:
        """The variances of resampled data, each field (n_replicates,), for `basic_interval`.

        Each replicate draws n_blocks blocks of sequences with replacement (Efron 1979) and
        computes everything again from their sums, the set of live latents too.
        """
        weights = _resampled(len(self.sums), n_replicates, generator).to(self.sums.device)
        drawn = (torch.einsum("rb,bsj->rsj", w, self.sums) for w in weights.split(32))
        parts = [_variances(sums, weighting, corrected) for sums in drawn]
        return Variances(*(torch.cat(field) for field in zip(*parts, strict=True)))


def _variances(
    sums: Tensor, weighting: Weighting = "latents", corrected: bool = False
) -> Variances:
    """Variances from Σ1, Σm, Σm², Σv, (…, 4, n_latents), over the latents with Σ1 > 0."""
    n = sums[..., 0, :]
    chance = n if weighting == "tokens" else (n > 0).to(n)
    chance = chance / chance.sum(-1, keepdim=True)
    mean, mean_square, within = (sums[..., i, :] / n.clamp(min=1) for i in (1, 2, 3))
    tokens = mean_square - mean**2
    if corrected:
        tokens = tokens * n / (n - 1).clamp(min=1)
    given_j = within + tokens
    centre = (chance * mean).sum(-1, keepdim=True)
    between = (chance * (mean - centre) ** 2).sum(-1)
    if corrected:
        between = between - (chance * (1 - chance) * tokens / n.clamp(min=1)).sum(-1)
    token, latent = (chance * within).sum(-1), (chance * given_j).sum(-1)
    total = latent + between
    return Variances(total, latent, token, latent / total, token / latent)


def layer_moments(probs: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (in squared layers) of the layer under distributions (…, layer)."""
    layers = torch.arange(probs.shape[-1], dtype=probs.dtype, device=probs.device)
    mean = probs @ layers
    return mean, (probs * (layers - mean[..., None]).square()).sum(-1)


def permute_layers(
    indices: Tensor, values: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Null model: the layers' codes are dealt anew to the layers, independently at each token.

    Which latents fire at a token, and how often, stays; that a latent prefers some layer over the
    tokens goes.

    Args:
        indices, values: (layer, token, k).
        generator: on any device, where the numbers are drawn; by default the CPU's.
    """
    chance = torch.rand(indices.shape[:2], generator=generator, device=_drawn_on(generator))
    order = chance.argsort(dim=0, stable=True)
    order = order.to(indices.device)[..., None].expand_as(indices)
    return indices.gather(0, order), values.gather(0, order)


def permute_tokens(
    indices: Tensor, values: Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Null model: at each layer the codes of another token, dealt anew within the batch.

    Which latents fire at a layer, and how often, stays; that layers see the same token goes. The
    arguments and the result are those of `permute_layers`.
    """
    chance = torch.rand(indices.shape[:2], generator=generator, device=_drawn_on(generator))
    order = chance.argsort(dim=1, stable=True)
    order = order.to(indices.device)[..., None].expand_as(indices)
    return indices.gather(1, order), values.gather(1, order)


def gaussian_like(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Null model: isotropic Gaussian directions with the norm of each activation vector.

    Args:
        x: activations, (…, d_model).
        generator: on any device, where the numbers are drawn; by default the CPU's.
    """
    noise = torch.randn(x.shape, generator=generator, device=_drawn_on(generator)).to(x)
    norms = [torch.linalg.vector_norm(t, dim=-1, keepdim=True) for t in (x, noise)]
    return noise * (norms[0] / norms[1])


def _check_codes(indices: Tensor, values: Tensor, n_layers: int, n_latents: int) -> None:
    if indices.ndim != 3 or indices.shape != values.shape or len(indices) != n_layers:
        raise ValueError(
            f"indices and values must both be (layer, token, k) = ({n_layers}, token, k), "
            f"got {tuple(indices.shape)} and {tuple(values.shape)}"
        )
    if indices.numel() == 0:
        return
    low, high = (int(x) for x in indices.aminmax())
    if low < 0 or high >= n_latents:
        raise ValueError(f"indices must lie in [0, {n_latents}), got {low} to {high}")
    if not (values >= 0).all():
        raise ValueError("values must not be negative or nan: give the activations after the ReLU")
