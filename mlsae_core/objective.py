"""The training objective: fraction of variance unexplained, plus AuxK for dead latents.

Lawson et al. (2025), "Residual Stream Analysis with Multi-Layer SAEs", Eqs. 3 to 7, with the
conventions that the equations leave open:

- FVU_l = mean over tokens and dimensions of (x - x̂)², divided by the variance of the same numbers
  about their one mean (the *global* FVU); the loss takes the mean over layers.
- AuxK_l = the same quotient for e' = x' - y, the error in the standardised space, and its
  reconstruction ê' = W_dec h_dead by the dead latents. The error is a constant to it (detached:
  Gao et al. 2024, Appendix A.2), and no second bias is added. So a layer's AuxK does not depend on
  the scale of its activations. It is 0, and costs nothing, where no latent is dead.
- With the activation ``jumprelu`` the mean number of active latents is penalised as well. FVU is
  what the squared error is for inputs of mean square norm 1, so the coefficient is on the scale of
  Rajamanoharan et al. (2024).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mlsae_core import kernels
from mlsae_core.sae import MLSAE, Stats, TopK

ALPHA = 1 / 32
"""The coefficient of AuxK (Gao et al. 2024, Appendix A.2)."""


L0_COEFFICIENT = 1e-3
"""The coefficient of the mean number of active latents, where they are penalised."""


class Loss(NamedTuple):
    """What one batch gives.

    total : scalar, mean of `fvu` over layers + alpha * `auxk`, and for ``jumprelu`` l0_coefficient
        times the mean number of active latents; differentiate this.
    fvu : (layer,), global FVU, over tokens and dimensions, in the target's own space.
    mse : (layer,), mean squared error over tokens and dimensions, in the target's own space.
    auxk : scalar, mean over layers; 0 where no latent is dead.
    n_dead : number of dead latents before this batch.
    topk : values and indices of shape (layer, token, k); None for ``jumprelu``.
    fired : (n_latents,) bool, for `MLSAE.count_tokens`.
    seen : (s,), for `Activation.update`.
    """

    total: Tensor
    fvu: Tensor
    mse: Tensor
    auxk: Tensor
    n_dead: int
    topk: TopK | None
    fired: Tensor
    seen: Tensor


def loss(
    sae: MLSAE,
    source: Tensor,
    target: Tensor | None = None,
    alpha: float = ALPHA,
    l0_coefficient: float = L0_COEFFICIENT,
    dead: Tensor | None = None,
) -> Loss:
    """The loss of one batch. Nothing is changed: count its tokens with `sae.count_tokens`,
    and after an optimiser step call `sae.activation.update`.

    Parameters
    ----------
    source : (layer, token, d_model), the activations to encode.
    target : (layer, token, d_model), the activations to predict; None is the source itself.
        The prediction is made in the target's standardised space and mapped back with the
        target's statistics (see `MLSAE.forward`).
    alpha : coefficient of AuxK.
    l0_coefficient : of the mean number of active latents, for ``jumprelu``.
    dead : indices (n_dead,) of the dead latents; None asks `sae.dead`, for which the host waits.

    Raises
    ------
    ValueError
        Where a tensor is not (layer, token, d_model), is empty, or is not finite (see
        `MLSAE.standardise`); where the target's shape differs from the source's; or where the
        dictionary has an encoder bias.
    """
    if source.ndim != 3 or source.numel() == 0:
        raise ValueError(
            f"expected activations of shape (layer, token, {sae.n_inputs}) with at least one "
            f"token, got {tuple(source.shape)}"
        )
    if target is None:
        target = source
    if target.shape != source.shape:
        raise ValueError(
            f"expected a target of the source's shape {tuple(source.shape)}, "
            f"got {tuple(target.shape)}: pass the same layers and tokens in both"
        )
    if sae.encoder_bias is not None:
        raise ValueError("expected a dictionary without an encoder bias: others are not trained")
    scaled, stats = sae.standardise(source)
    if target is source:
        target, expected = source.to(scaled.dtype), scaled
    else:
        expected, stats = sae.standardise(target)
        target = target.to(scaled.dtype)
    if dead is None:
        dead = sae.dead.nonzero().squeeze(1)
    n_dead = len(dead) if sae.aux_k else 0
    coded = sae.activation.autoencode(
        sae, scaled.flatten(0, 1), dead if n_dead else None, min(sae.aux_k, n_dead)
    )
    y, y_dead = coded.y.view_as(scaled), coded.y_dead
    mse, fvu = kernels.fused(_unexplained, sae.kernel, y.device)(target, y, *stats)
    total = fvu.mean()
    auxk = torch.zeros_like(total)
    if y_dead is not None:
        left = kernels.fused(_left_unexplained, sae.kernel, y.device)
        auxk = left(expected, y.detach(), y_dead.view_as(y)).mean()
        total = total + alpha * auxk
    if coded.l0 is not None:
        total = total + l0_coefficient * coded.l0
    topk = None
    if coded.code is not None:
        topk = TopK(*(part.view(*scaled.shape[:2], -1) for part in coded.code[:2]))
    measured = (fvu.detach(), mse.detach(), auxk.detach())
    return Loss(total, *measured, n_dead, topk, coded.fired, coded.seen)


def _unexplained(
    x: Tensor, y: Tensor, mean: Tensor | None = None, std: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean squared error and global FVU, each (layer,), of x and its reconstruction, both (layer,
    token, d), the latter before it is mapped back. Not `metrics.Reconstruction`: with gradients, in
    the precision of x, and of one batch alone."""
    mse = _mean_square(Stats(mean, std).restore(y) - x)
    variance = _mean_square(x - x.mean((1, 2), keepdim=True))
    return mse, mse / variance.clamp_min(torch.finfo(x.dtype).tiny)


def _left_unexplained(x: Tensor, y: Tensor, y_dead: Tensor) -> Tensor:
    """FVU (layer,) of the error x - y and its reconstruction by the dead latents."""
    return _unexplained(x - y, y_dead)[1]


def _mean_square(x: Tensor) -> Tensor:
    """(layer,) from (layer, token, d); vector by vector, without a tensor of squares, since fresh
    memory costs a small autoencoder more than arithmetic does."""
    return torch.linalg.vector_norm(x, dim=2).square().mean(1) / x.shape[2]
