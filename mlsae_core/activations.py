"""Activations as the autoencoder sees them: a stream of (layer, token, d_model) batches.

Nothing is cached: activations are recomputed from text (MLSAE paper, Appendix A). Vectors at
special tokens are removed along the token axis, the same ones at every layer, so they are in no
mean, count or batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import SiteSpec


class ActivationError(RuntimeError):
    """Activations that no autoencoder can be trained or measured on."""


@dataclass(frozen=True)
class Batch:
    """Activations of one batch of sequences, in float32 and in the lens space.

    source: (layer, token, d_model), what the autoencoder reads; with ``stacked`` sites
        (1, token, n_layers · d_model), the layers in order.
    target: what it predicts, of the same layout; the same object as `source` for an autoencoder.
    tokens: (token,) int64, the token at each position.
    sequence, position: (token,) int64, where each token stood in the batch of sequences.
    """

    source: Tensor
    target: Tensor
    tokens: Tensor
    sequence: Tensor
    position: Tensor


def site_layers(site: SiteSpec, n_layers: int) -> list[int]:
    """The block indices of a site; unknown ones are refused when activations are read."""
    return list(range(n_layers)) if site.layers == "all" else list(site.layers)


def hook_points(site: SiteSpec) -> tuple[str, ...]:
    """The hook points of a site: one for an autoencoder, source and target for a transcoder."""
    target = site.source if site.target == "same" else site.target
    return tuple(dict.fromkeys((site.source, target)))


@torch.no_grad()
def gather(
    captured: dict[str, Tensor],
    tokens: Tensor,
    keep: Tensor,
    site: SiteSpec,
    layers: list[int],
    lens: Lens,
    index: int = 0,
    check: bool = True,
) -> Batch:
    """Make a batch of captured activations.

    Args:
        captured: hook point -> (layer, batch, position, d_model), at `layers`.
        tokens: (batch, position) int64.
        keep: (batch, position) bool, False at special tokens; on the CPU, so that the host need
            not wait for a device to count them.
        index: number of the batch, for messages.
        check: whether activations that are not finite are refused, for which the host waits.

    Raises:
        ActivationError: NaN or infinite activations, or nothing but special tokens.
    """
    sequence, position = keep.nonzero(as_tuple=True)
    if not len(sequence):
        raise ActivationError(
            f"batch {index}: all {tokens.numel()} tokens are special; expected text"
        )
    sequence, position = to_device(torch.stack((sequence, position)), tokens.device)
    rows = sequence * keep.shape[1] + position

    def read(point: str) -> Tensor:
        x = captured[point].flatten(1, 2)
        if len(rows) < x.shape[1]:
            x = x.index_select(1, rows)
        x = x.float()
        # A sum is not finite if any term is not: one pass, without a mask of the same size.
        if check and not x.sum().isfinite():
            bad = [i for i, rows in zip(layers, x, strict=True) if not rows.isfinite().all()]
            if bad:
                raise ActivationError(
                    f"batch {index}: {point} has NaN or infinite values at layers {bad}; try "
                    "model.dtype: float32 or bfloat16"
                )
        x = lens.apply(x, layers)
        return x.transpose(0, 1).flatten(1)[None] if site.stacked else x

    source = read(site.source)
    target = source if site.target in ("same", site.source) else read(site.target)
    return Batch(source, target, tokens.flatten()[rows], sequence, position)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU's tensor on a device, from pinned memory: else the copy waits for what is queued."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def stream(
    lm: LanguageModel,
    batches: Iterable[Tensor],
    site: SiteSpec,
    lens: Lens | None = None,
    check: bool = True,
) -> Iterator[Batch]:
    """Activations of every batch of sequences.

    There is no thread that looks ahead: on a CPU the language model and the autoencoder share the
    cores, and on a GPU kernels are queued: without `check` nothing here waits for it.

    Args:
        batches: (batch, position) int64 tokens.
        site: layers, source, target and whether layers are stacked.
        lens: the basis; by default as the site says.
        check: see :func:`gather`.

    Raises:
        SpecError: unknown layers or hook points.
        ActivationError: see :func:`gather`.
    """
    layers = site_layers(site, lm.n_layers)
    lens = Lens.load(site, lm.device) if lens is None else lens
    for index, tokens in enumerate(batches):
        keep = lm.keep_mask(tokens)
        tokens = to_device(tokens, lm.device)
        captured = lm.capture(tokens, layers, hook_points(site))
        yield gather(captured, tokens, keep, site, layers, lens, index, check)
