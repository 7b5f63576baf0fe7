"""Which latents of a vector are active: the activation functions, one class each.

With z = W_enc (x' - b_pre), the scores of a vector's latents,

- ``topk``: the k largest of each vector, where they are positive (Makhzani & Frey 2014).
- ``batchtopk``: the k n largest of a batch of n vectors, so k of a vector on average; what is
  encoded by itself is compared with a threshold instead, a mean over batches of the smallest
  activation that was kept (Bussmann et al. 2024, "BatchTopK Sparse Autoencoders").
- ``jumprelu``: z where z > θ, else 0, with θ > 0 learnt for each latent (Rajamanoharan et al. 2024,
  "Jumping Ahead"). Neither this nor the number of active latents has a gradient in θ; both are
  given that of a rectangle kernel, by the straight-through estimator::

      ∂(z 1[z > θ]) / ∂θ = -θ/ε 1[|z - θ| < ε/2]        ∂ 1[z > θ] / ∂θ = -1/ε 1[|z - θ| < ε/2]

How many latents are active is a setting of the first alone. All encode a vector by itself, whatever
else is encoded with it; only `Activation.autoencode`, which training uses, sees a batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from mlsae_core import kernels
from mlsae_core.kernels import Code

MLSAE = nn.Module  # the dictionary, `sae.MLSAE`, which is built on this module

MOST = 8
"""BatchTopK keeps at most this many times k latents of one vector: what bounds its memory."""

LAST_STEPS = 100
"""BatchTopK's threshold is the mean over all steps at first, then one that forgets in so many."""

BANDWIDTH = 1e-3
"""JumpReLU's ε and first θ for vectors of mean square norm 1 (Rajamanoharan et al. 2024)."""


class Coded(NamedTuple):
    """What a batch of n vectors in training gives.

    Args:
        y, y_dead: as `kernels.autoencode` returns them.
        code: the active latents, or None where they are never listed.
        fired: (n_latents,) bool, those with an activation above the dictionary's `dead_threshold`.
        seen: (s,) numbers of which `Activation.update` takes the mean over a step.
        l0: scalar, active latents per vector, differentiable; or None where it is not to be
            penalised.
    """

    y: Tensor
    y_dead: Tensor | None
    code: Code | None
    fired: Tensor
    seen: Tensor
    l0: Tensor | None = None


class Activation(nn.Module):
    """Base of all: parameters and buffers that an activation owns are its module's.

    The dictionary is an argument, since the activation is a part of it.

    n_latents: of the dictionary. unit: root mean square norm of its inputs.
    """

    name: str

    def __init__(self, n_latents: int, unit: float):
        super().__init__()

    def encode(self, sae: MLSAE, x: Tensor) -> Code:
        """The active latents of each vector of x (n, d), by itself. Changes no state.

        Rows are as long as the longest needs; zeros fill the others up.
        """
        raise NotImplementedError

    def autoencode(self, sae: MLSAE, x: Tensor, dead: Tensor | None, aux_k: int) -> Coded:
        """Encode and decode a batch x (n, d) in training, and reconstruct with dead latents.

        dead, aux_k: as in `kernels.autoencode`. Changes no state, and waits for no device.
        """
        raise NotImplementedError

    def start(self, sae: MLSAE, x: Tensor) -> None:
        """Prepare for training with the first batch x (n, d)."""

    def update(self, seen: Tensor) -> None:
        """Follow an optimiser step; seen (s,) is the mean of `Coded.seen` over its batches."""


class TopK(Activation):
    name = "topk"

    def encode(self, sae: MLSAE, x: Tensor) -> Code:
        return kernels.encode(x, sae.encoder, sae.pre_bias, sae.k, sae.kernel)

    def autoencode(self, sae: MLSAE, x: Tensor, dead: Tensor | None, aux_k: int) -> Coded:
        weights = (sae.encoder, sae.decoder, sae.pre_bias)
        y, y_dead, code = kernels.autoencode(x, *weights, sae.k, dead, aux_k, sae.kernel)
        return Coded(y, y_dead, code, sae.fired(code), code.values.new_empty(0))


class BatchTopK(Activation):
    """At most `MOST` · k latents of one vector are kept; the k n largest are taken among those.

    Args:
        threshold: buffer (), what an activation must exceed when a vector is encoded by itself.
        steps: buffer (), int64, how many it is a mean over.
    """

    name = "batchtopk"

    def __init__(self, n_latents: int, unit: float):
        super().__init__(n_latents, unit)
        self.threshold: Tensor
        self.steps: Tensor
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def encode(self, sae: MLSAE, x: Tensor) -> Code:
        def keep(values: Tensor) -> Tensor:
            return torch.where(values > self.threshold, values, 0)

        return kernels.encode(x, sae.encoder, sae.pre_bias, _most(sae), sae.kernel, keep)

    def autoencode(self, sae: MLSAE, x: Tensor, dead: Tensor | None, aux_k: int) -> Coded:
        def keep(values: Tensor) -> Tensor:
            return _keep_largest(values, sae.k * len(values))

        weights = (sae.encoder, sae.decoder, sae.pre_bias)
        y, y_dead, code = kernels.autoencode(x, *weights, _most(sae), dead, aux_k, sae.kernel, keep)
        return Coded(y, y_dead, code, sae.fired(code), _smallest(code.values.detach()))

    @torch.no_grad()
    def update(self, seen: Tensor) -> None:
        self.steps += 1
        self.threshold += (seen[0] - self.threshold) / self.steps.clamp(max=LAST_STEPS)


class JumpReLU(Activation):
    """Training makes whole products of all scores, chunk by chunk, as θ's gradient needs them.

    Args:
        threshold: parameter (n_latents,), θ. Its first values are ε, or after `start` all the one
            at which k latents of a vector are active on average.
        bandwidth: ε, `BANDWIDTH` in the unit of the inputs' norm.
    """

    name = "jumprelu"

    def __init__(self, n_latents: int, unit: float):
        super().__init__(n_latents, unit)
        self.bandwidth = BANDWIDTH * unit
        self.threshold = nn.Parameter(torch.full((n_latents,), self.bandwidth))

    def encode(self, sae: MLSAE, x: Tensor) -> Code:
        centred = x - sae.pre_bias
        code = self._select(centred.detach(), sae.encoder)
        return kernels.differentiable(code, x, sae.encoder, sae.pre_bias, centred)

    @torch.no_grad()
    def _select(self, centred: Tensor, encoder: Tensor) -> Code:
        """Chunk by chunk, in two passes: the first finds how many are active where most are."""
        parts = centred.split(kernels.chunk_rows(len(encoder), centred.device.type))

        def active(part: Tensor) -> Tensor:
            scores = _scores(part, encoder)
            return scores.masked_fill_(scores <= self.threshold, 0)

        most = torch.stack([active(part).count_nonzero(1).amax() for part in parts])
        width = max(1, int(most.max()))
        found = [kernels.group_topk(active(part), width) for part in parts]
        values, indices = map(torch.cat, zip(*found, strict=True))
        return Code(values, indices)

    def autoencode(self, sae: MLSAE, x: Tensor, dead: Tensor | None, aux_k: int) -> Coded:
        y, l0, largest = _JumpReLU.apply(
            x - sae.pre_bias, sae.encoder, sae.decoder, self.threshold, self.bandwidth
        )
        y_dead = None
        if dead is not None:
            y_dead = kernels.decode_dead(
                x, sae.pre_bias, sae.encoder, sae.decoder, dead, aux_k, kernels.keep_largest
            )
        fired = largest > sae.dead_threshold
        return Coded(y + sae.pre_bias, y_dead, None, fired, largest.new_empty(0), l0)

    @torch.no_grad()
    def start(self, sae: MLSAE, x: Tensor) -> None:
        values = kernels.select(x - sae.pre_bias, sae.encoder, _most(sae)).values
        self.threshold.copy_(_smallest(_keep_largest(values, sae.k * len(x))))
        self.update(x)

    @torch.no_grad()
    def update(self, seen: Tensor) -> None:
        self.threshold.clamp_(min=torch.finfo(self.threshold.dtype).tiny)


ACTIVATIONS: dict[str, type[Activation]] = {
    activation.name: activation for activation in (TopK, BatchTopK, JumpReLU)
}


def _most(sae: MLSAE) -> int:
    return min(MOST * sae.k, sae.n_latents)


def _keep_largest(values: Tensor, count: int) -> Tensor:
    """All but the `count` largest of values (n, width) become 0."""
    flat = values.flatten()
    largest = flat.topk(min(count, len(flat)), sorted=False).indices
    kept = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, largest, True)
    return torch.where(kept.view_as(values), values, 0)


def _smallest(values: Tensor) -> Tensor:
    """(1,) the smallest that is above 0, or 0."""
    least = values.masked_fill(values <= 0, torch.inf).amin()[None]
    return least.masked_fill(least.isinf(), 0)


def _scores(centred: Tensor, encoder: Tensor) -> Tensor:
    """Scores (n, n_latents), computed in the precision of autocast."""
    precision = kernels.score_precision(encoder)
    return (centred.to(precision) @ encoder.to(precision).T).to(encoder.dtype)


class _JumpReLU(torch.autograd.Function):
    """Vectors (n, d), weights (n_latents, d) and θ to the decoded latents (n, d), the mean number
    of active ones, and the largest activation of each latent (n_latents,)."""

    @staticmethod
    def forward(ctx, centred, encoder, decoder, threshold, bandwidth):
        ctx.save_for_backward(centred, encoder, decoder, threshold)
        ctx.precision, ctx.bandwidth = kernels.score_precision(encoder), bandwidth
        ctx.rows = kernels.chunk_rows(len(encoder), centred.device.type)
        listens, writes = encoder.to(ctx.precision), decoder.to(ctx.precision)
        y, active, largest = [], 0, torch.zeros_like(threshold)
        for part in centred.to(ctx.precision).split(ctx.rows):
            scores = (part @ listens.T).to(encoder.dtype)
            values = scores.masked_fill_(scores <= threshold, 0)
            y.append((values.to(ctx.precision) @ writes).to(decoder.dtype))
            active = active + values.count_nonzero()
            largest = torch.maximum(largest, values.amax(0))
        ctx.mark_non_differentiable(largest)
        return torch.cat(y), active.to(decoder.dtype) / len(centred), largest

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, grad_l0, _):
        centred, encoder, decoder, threshold = ctx.saved_tensors
        listens, writes = encoder.to(ctx.precision), decoder.to(ctx.precision)
        grad_l0 = grad_l0 / len(centred)
        to_x, to_encoder, to_decoder, to_threshold = [], 0, 0, 0
        parts = (t.to(ctx.precision).split(ctx.rows) for t in (centred, grad))
        for part, grad_part in zip(*parts, strict=True):
            scores = (part @ listens.T).to(encoder.dtype)
            to_values = (grad_part @ writes.T).to(encoder.dtype)
            near = (scores - threshold).abs() < ctx.bandwidth / 2
            by_height = torch.where(near, threshold * to_values + grad_l0, 0).sum(0)
            to_threshold = to_threshold - by_height / ctx.bandwidth
            inactive = scores <= threshold
            values = scores.masked_fill_(inactive, 0).to(ctx.precision)
            to_decoder = to_decoder + (values.T @ grad_part).to(decoder.dtype)
            to_scores = to_values.masked_fill_(inactive, 0).to(ctx.precision)
            to_encoder = to_encoder + (to_scores.T @ part).to(encoder.dtype)
            to_x.append((to_scores @ listens).to(encoder.dtype))
        return torch.cat(to_x), to_encoder, to_decoder, to_threshold, None
