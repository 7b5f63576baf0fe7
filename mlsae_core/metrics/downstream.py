"""What a reconstruction does to the language model: delta CE, KL, loss recovered, logit MSE.

Pure functions on logits (…, vocabulary), one number per position, and an accumulator over
positions. Losses are in nats per predicted token; log-probabilities are taken in float32 or
better, sums in float64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from mlsae_core.metrics.reconstruction import _at_least_float32, _check_same
from mlsae_core.metrics.resampling import _blocks, _resampled


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log P(target) at each position, in nats; nothing is reduced.

    Args:
        logits: (…, vocabulary), the prediction made at a position.
        targets: (…), the token that comes next there.
    """
    log_p = _at_least_float32(logits).log_softmax(-1)
    return -log_p.gather(-1, targets[..., None])[..., 0]


def kl_divergence(original: Tensor, replaced: Tensor) -> Tensor:
    """KL(original ‖ replaced) = Σ_v p_v (log p_v − log q_v) at each position, in nats.

    Summed over the vocabulary, not over positions. A token that is impossible in the original
    (logit −inf) contributes 0. (The code released with the paper has the arguments exchanged and
    sums over positions.)

    Args:
        original, replaced: logits, (…, vocabulary); leading axes broadcast.
    """
    log_p = _at_least_float32(original).log_softmax(-1)
    log_q = _at_least_float32(replaced).log_softmax(-1)
    ratio = (log_p - log_q).masked_fill_(log_p == -torch.inf, 0)
    return ratio.mul_(log_p.exp()).sum(-1)


def logit_mse(original: Tensor, replaced: Tensor) -> Tensor:
    """Mean over the vocabulary of the squared difference of logits at each position.

    Args:
        original, replaced: logits, (…, vocabulary); leading axes broadcast.
    """
    difference = _at_least_float32(replaced) - _at_least_float32(original)
    return difference.square().mean(-1)


def ce_recovered(ce_original: Tensor, ce_replaced: Tensor, ce_ablated: Tensor) -> Tensor:
    """Fraction of the loss that ablating the layer costs and the reconstruction recovers.

    (CE_ablated − CE_replaced) / (CE_ablated − CE_original): 1 for a perfect reconstruction, 0 for
    one no better than the ablation, which is zero or mean ablation of the same layer. Elementwise,
    on means over tokens; nan or inf where the ablation changes nothing.
    """
    return (ce_ablated - ce_replaced) / (ce_ablated - ce_original)


def centred_logit(logits: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the mean logit at each position (Gemma Scope, below Eq. 12).

    Args:
        logits: (…, vocabulary).
        targets: (…), the token that comes next.
    """
    return logits.gather(-1, targets[..., None])[..., 0] - logits.mean(-1)


def latent_importance(
    indices: Tensor, values: Tensor, gradient: Tensor, decoder: Tensor, chunk: int = 4096
) -> Tensor:
    """First-order effect of each active latent, y_j = h_j ⟨w_j, ∇_x L⟩ (Gemma Scope, Eq. 12).

    Args:
        indices, values: active latents and activations, (…, k).
        gradient: gradient of a scalar at the reconstructed vector, (…, d_model). With
            the standardised autoencoder a latent's true effect has a further factor σ > 0 per
            vector, which `uniformity` does not see.
        decoder: (n_latents, d_model).
        chunk: vectors per step, which bounds memory at chunk · k · d_model.

    Returns:
        y of the active latents, (…, k).
    """
    k, d_model = indices.shape[-1], gradient.shape[-1]
    if indices.shape != values.shape or indices.shape[:-1] != gradient.shape[:-1]:
        raise ValueError(
            "indices and values must be (…, k) and gradient (…, d_model) with equal leading axes, "
            f"got {tuple(indices.shape)}, {tuple(values.shape)}, {tuple(gradient.shape)}"
        )
    pairs = zip(
        indices.reshape(-1, k).split(chunk), gradient.reshape(-1, d_model).split(chunk), strict=True
    )
    slopes = [(decoder[rows] @ vectors[:, :, None])[..., 0] for rows, vectors in pairs]
    return torch.cat(slopes).reshape(values.shape) * values


def uniformity(importance: Tensor) -> Tensor:
    """Uniformity of active latent importance, r_L0 = exp(S(p)) / ‖y‖₀ (Gemma Scope, Eq. 13–14).

    p = ``|y| / Σ|y|`` and S its entropy over the active latents: the effective fraction of the
    active latents that matter, between 1/‖y‖₀ (one of them) and 1 (all alike).

    Args:
        importance: y, (…, k), from `latent_importance`.

    Returns:
        r_L0 of each vector, (…); nan where y = 0.
    """
    size = _at_least_float32(importance).abs()
    p = size / size.sum(-1, keepdim=True)
    entropy = torch.special.entr(p).sum(-1)
    return entropy.exp() / size.count_nonzero(-1)


class DownstreamResult(NamedTuple):
    """Effect of replacing each layer on the model's predictions; all are (layer,)."""

    tokens: Tensor
    """Predicted tokens, int64."""
    ce_original: Tensor
    """Cross-entropy of the unmodified model, nats per predicted token."""
    ce_replaced: Tensor
    """Cross-entropy with the layer replaced, nats per predicted token."""
    delta_ce: Tensor
    """ce_replaced − ce_original, averaged as differences (Lawson et al. 2024, section 4.1)."""
    kl: Tensor
    """Mean over predicted tokens of KL(original ‖ replaced), nats (App. B.2)."""
    logit_mse: Tensor
    """Mean over predicted tokens and vocabulary of the squared difference of logits."""


def _effects(original: Tensor, replaced: Tensor, targets: Tensor) -> Iterator[Tensor]:
    """CE original, delta CE, KL and logit MSE of every token, (4, token) float64, of each layer.

    Equal to `cross_entropy`, `kl_divergence` and `logit_mse`, with fewer passes over the logits.
    With the difference d = replaced − original of a position's logits and the rise of their
    normaliser, r = logsumexp(replaced) − logsumexp(original),

        delta CE = r − d[target],   KL = r − ⟨softmax(original), d⟩,   MSE = mean of d².

    Impossible tokens (logits of −inf) make d undefined; then the plain functions are asked.
    """
    original, chosen = _at_least_float32(original), targets[:, None]
    log_p = original.log_softmax(-1)
    ce = -log_p.gather(1, chosen)
    normaliser = original.gather(1, chosen) + ce
    p = log_p.exp_()
    buffer = torch.empty_like(p)  # the same memory for every layer
    for logits in replaced:
        logits = _at_least_float32(logits)
        log_q = torch.log_softmax(logits, -1, out=buffer).gather(1, chosen)
        rise = (logits.gather(1, chosen) - log_q - normaliser).squeeze(1)
        difference = torch.sub(logits, original, out=buffer)
        squared = torch.linalg.vector_norm(difference, dim=-1).square() / p.shape[-1]
        kl = rise - difference.mul_(p).sum(-1)
        per_token = torch.stack([ce[:, 0], -(log_q + ce)[:, 0], kl, squared]).double()
        finite = per_token.isfinite().all()
        yield per_token if finite else _plain_effects(original, logits, targets)


def _plain_effects(original: Tensor, replaced: Tensor, targets: Tensor) -> Tensor:
    """The same for one layer, by definition."""
    before, after = (cross_entropy(x, targets).double() for x in (original, replaced))
    others = kl_divergence(original, replaced), logit_mse(original, replaced)
    return torch.stack([before, after - before, *(x.double() for x in others)])


class Downstream:
    """Delta CE, KL and logit MSE of each replaced layer, summed over positions in float64.

    One instance per intervention: reconstruction, zero ablation, mean ablation; `ce_recovered`
    puts their cross-entropies together. Positions may come in any pieces.

    Args:
        n_layers: layers that are replaced.
        device: where the sums are kept; it must know float64.
        n_blocks: blocks of sequences to resample, for `bootstrap`; 1 if no interval is wanted.
    """

    def __init__(
        self, n_layers: int, device: torch.device | str = "cpu", n_blocks: int = 1
    ) -> None:
        self.tokens = torch.zeros(n_layers, dtype=torch.int64, device=device)
        # rows: CE original, delta CE, KL, logit MSE
        self.sums = torch.zeros(4, n_layers, dtype=torch.float64, device=device)
        # the same of each block, and its tokens
        blocks = n_blocks if n_blocks > 1 else 0
        self.blocks = self.sums.new_zeros(blocks, 5, n_layers)

    @torch.no_grad()
    def update(
        self,
        original: Tensor,
        replaced: Tensor,
        targets: Tensor,
        layers: Sequence[int] | None = None,
        sequences: Tensor | None = None,
    ) -> None:
        """Add some positions.

        Args:
            original: logits of the unmodified model, (token, vocabulary).
            replaced: logits with one layer replaced, (layer, token, vocabulary).
            targets: the tokens that come next, (token,).
            layers: which layers `replaced` holds, as indices below n_layers; all of them in
                order by default.
            sequences: the sequence of each position, (token,); needed if n_blocks > 1.
        """
        rows = list(range(len(self.tokens)) if layers is None else layers)
        expected = (len(rows), *original.shape)
        if replaced.shape != expected or targets.shape != original.shape[:1]:
            raise ValueError(
                f"replaced must be (layer, token, vocabulary) = {tuple(expected)} and targets "
                f"{tuple(original.shape[:1])}, got {tuple(replaced.shape)} and "
                f"{tuple(targets.shape)}"
            )
        n_blocks, blocks = len(self.blocks), None
        if n_blocks:
            blocks = _blocks(sequences, len(targets), n_blocks).to(self.sums.device)
        for row, effects in zip(rows, _effects(original, replaced, targets), strict=True):
            self.sums[:, row] += effects.sum(1).to(self.sums.device)
            self.tokens[row] += len(targets)
            if blocks is not None:
                counted = torch.cat([effects, torch.ones_like(effects[:1])]).T
                self.blocks[:, :, row].index_add_(0, blocks, counted.to(self.sums.device))

    def merge(self, other: Downstream) -> Self:
        """Add what another accumulator has seen (disjoint positions); returns self."""
        _check_same(self.sums.shape, other.sums.shape)
        _check_same(self.blocks.shape, other.blocks.shape)
        self.tokens += other.tokens.to(self.tokens.device)
        self.sums += other.sums.to(self.sums.device)
        self.blocks += other.blocks.to(self.sums.device)
        return self

    def compute(self) -> DownstreamResult:
        """The metrics of everything seen so far; nan at layers that were never replaced."""
        return _means(self.sums, self.tokens.clone())

    def bootstrap(
        self, n_replicates: int, generator: torch.Generator | None = None
    ) -> DownstreamResult:
        """The same of resampled data, each field (n_replicates, layer), for `basic_interval`.

        Each replicate draws n_blocks blocks of sequences with replacement (Efron 1979).
        """
        weights = _resampled(len(self.blocks), n_replicates, generator).to(self.sums.device)
        drawn = torch.einsum("rb,bel->erl", weights, self.blocks)
        return _means(drawn[:4], drawn[4])


def _means(sums: Tensor, tokens: Tensor) -> DownstreamResult:
    original, delta, kl, squared = sums / tokens
    return DownstreamResult(tokens, original, original + delta, delta, kl, squared)
