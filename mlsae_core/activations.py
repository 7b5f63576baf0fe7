"""Activations as the autoencoder sees them: a stream of (layer, token, d_model) batches.

They are recomputed from text (MLSAE paper, Appendix A) unless somebody saved them. Vectors at
special tokens are removed along the token axis, the same ones at every layer, so they are in no
mean, count or batch.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mlsae_core import store
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import SiteSpec, SpecError, canonical
from mlsae_core.text import StreamedBlocks, TokenBlocks


class ActivationError(RuntimeError):
    """Activations that no autoencoder can be trained or measured on."""


@dataclass(frozen=True)
class Batch:
    """Activations of one batch of sequences, in float32 and in the lens space.

    Args:
        source: (layer, token, d_model), what the autoencoder reads; with ``stacked`` sites (1,
            token, n_layers · d_model), the layers in order.
        target: what it predicts, of the same layout; the same object as `source` for an
            autoencoder.
        tokens: (token,) int64, the token at each position.
        sequence, position: (token,) int64, where each token stood in the batch of sequences.
    """

    source: Tensor
    target: Tensor
    tokens: Tensor
    sequence: Tensor
    position: Tensor


class ActivationSource(Protocol):
    """Where activations come from: all that training knows of a model and a text.

    Attributes:
        n_layers: of the model, of which a site chooses some.
        d_model: length of a layer's vector.
        device: where batches are.
    """

    n_layers: int
    d_model: int
    device: torch.device

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """Activations of `size` sequences each: of every `every`-th batch from `start` on.

        Batch n is a pure function of (seed, n). Without a seed: one pass in order, the last batch
        may be smaller. With one: endless passes.
        """
        ...


def hook_points(site: SiteSpec) -> tuple[str, ...]:
    """The hook points of a site: one for an autoencoder, source and target for a transcoder."""
    target = site.source if site.target == "same" else site.target
    return tuple(dict.fromkeys((site.source, target)))


MASSIVE = 20
"""Times the median norm of its sequence's vectors above which a vector's norm is massive: in the
middle of the gap of SmolLM2-135M, 16,384 tokens of which are below 13 or, 67 of them, above 100."""


@torch.no_grad()
def massive(x: Tensor) -> Tensor:
    """Whether a token has a massive activation at some layer (Sun et al. 2024, "Massive Activations
    in Large Language Models"): a vector whose norm is above `MASSIVE` times the median of its
    sequence and layer. So the tokens are found by what they do, wherever in a sequence they stand.

    Args:
        x: (layer, batch, position, d_model).

    Returns:
        (batch, position) bool; nothing is massive among fewer than three positions.
    """
    norms = torch.linalg.vector_norm(x.float(), dim=-1)
    return (norms > MASSIVE * norms.median(-1, keepdim=True).values).any(0)


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
            not wait for a device to count them, unless the site excludes massive activations.
        index: number of the batch, for messages.
        check: whether activations that are not finite are refused, for which the host waits.

    Raises:
        ActivationError: NaN or infinite activations, or nothing but special tokens.
    """
    if site.massive == "excluded":
        keep = keep & ~massive(captured[site.source]).cpu()
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
        return _stack(lens.apply(x, layers), site)

    source = read(site.source)
    target = source if site.target in ("same", site.source) else read(site.target)
    return Batch(source, target, tokens.flatten()[rows], sequence, position)


def _stack(x: Tensor, site: SiteSpec) -> Tensor:
    """(layer, token, d_model), or (1, token, n_layers · d_model) where the site is stacked."""
    return x.transpose(0, 1).flatten(1)[None] if site.stacked else x


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
    layers = site.indices(lm.n_layers)
    lens = Lens.load(site, lm.device) if lens is None else lens
    for index, tokens in enumerate(batches):
        keep = lm.keep_mask(tokens)
        tokens = to_device(tokens, lm.device)
        captured = lm.capture(tokens, layers, hook_points(site))
        yield gather(captured, tokens, keep, site, layers, lens, index, check)


# --- sources ------------------------------------------------------------------------------------


class TextSource:
    """A language model that reads text: an `ActivationSource`.

    lens: the basis of the activations; by default the one the site names. On a CPU activations that
    are not finite are refused; elsewhere the host would wait, so whoever reads them looks.
    """

    def __init__(
        self,
        lm: LanguageModel,
        blocks: TokenBlocks | StreamedBlocks,
        site: SiteSpec,
        lens: Lens | None = None,
    ):
        self.lm, self.blocks, self.site = lm, blocks, site
        self.lens = (lens if lens is not None else Lens.load(site)).to(lm.device)
        self.n_layers, self.d_model, self.device = lm.n_layers, lm.d_model, lm.device

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """See `ActivationSource.batches`."""
        own = itertools.islice(self.blocks.batches(size, seed, start), 0, None, every)
        return stream(self.lm, own, self.site, self.lens, self.device.type == "cpu")


def save(batches: Iterable[Batch], folder: str | os.PathLike[str]) -> Path:
    """Write batches as a folder that `SavedSource` reads, one file of safetensors for each.

    ``source`` and, for a transcoder, ``target`` (layer, vector, d_model) float32; ``tokens`` and
    ``position`` (vector,); ``lengths`` (sequence,), the vectors of each. Nothing is ever replaced.

    Raises:
        SpecError: something is there already.
    """
    folder = Path(folder)
    if folder.exists():
        raise SpecError(f"folder: expected a new one for activations, got {folder}; remove it")
    with store.atomic_folder(folder, replace=False) as work:
        for number, batch in enumerate(batches):
            lengths = batch.sequence.unique_consecutive(return_counts=True)[1]
            parts = {"source": batch.source, "tokens": batch.tokens, "position": batch.position}
            if batch.target is not batch.source:
                parts["target"] = batch.target
            arrays = {name: part.cpu().contiguous() for name, part in parts.items()}
            save_file(arrays | {"lengths": lengths.cpu()}, work / f"{number:06}.safetensors")
    return folder


class SavedSource:
    """A folder of saved activations, as `save` writes it: an `ActivationSource`.

    site: which of the saved layers are read, and whether they are stacked; the hook points and the
    basis are those with which they were saved.

    Raises:
        SpecError: the folder holds no such files, or they do not fit each other or the site.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        site: SiteSpec | None = None,
        device: torch.device | str = "cpu",
    ):
        self.site, self.device = site or SiteSpec(), torch.device(device)
        self.files = sorted(Path(folder).expanduser().glob("*.safetensors"))
        if not self.files:
            raise SpecError(f"folder: expected *.safetensors in {folder}, got none")
        shapes, self._places = set(), []
        for file in self.files:
            try:
                with safe_open(file, "pt") as saved:
                    layers, vectors, width = saved.get_slice("source").get_shape()
                    for name in ("tokens", "position"):
                        if (shape := saved.get_slice(name).get_shape()) != [vectors]:
                            raise ValueError(f"expected {name} of {vectors} vectors, got {shape}")
                    ends = saved.get_tensor("lengths").cumsum(0).tolist()
                    shapes.add((layers, width, "target" in saved.keys()))  # noqa: SIM118
            except (SafetensorError, OSError, ValueError) as error:
                raise SpecError(f"{file}: expected saved activations: {error}") from None
            if ends[-1:] != [vectors]:
                raise SpecError(f"{file}: expected lengths that make {vectors} vectors, got {ends}")
            self._places += [(file, *place) for place in itertools.pairwise([0, *ends])]
        if len(shapes) > 1:
            raise SpecError(
                f"folder: expected files of the same layers and width, got {sorted(shapes)}"
            )
        ((self.n_layers, self.d_model, has_target),) = shapes
        self._layers = self.site.indices(self.n_layers)
        if has_target != (self.site.target != "same"):
            raise SpecError(
                f"target: expected {'another hook point' if has_target else 'same'}, as the "
                f"activations in {folder} were saved, got {self.site.target}"
            )
        self._names = ("source", "target") if has_target else ("source",)

    @property
    def key(self) -> str:
        """Identity of the activations: the hash of their files' contents, in order."""
        digests = [store.source_hash(file) for file in self.files]
        return hashlib.sha256(canonical(digests).encode()).hexdigest()[:16]

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """See `ActivationSource.batches`; the order is that of text of as many sequences."""
        numbers = TokenBlocks(np.arange(len(self._places))[:, None]).batches(size, seed, start)
        for chosen in itertools.islice(numbers, 0, None, every):
            yield self._read([self._places[number] for number in chosen.flatten().tolist()])

    def _read(self, places: list[tuple[Path, int, int]]) -> Batch:
        """The sequences at (file, first vector, end), as one batch."""
        parts: dict[str, list[Tensor]] = {name: [] for name in (*self._names, "tokens", "position")}
        for file, first, end in places:
            with safe_open(file, "pt") as saved:
                for name, found in parts.items():
                    rows = saved.get_slice(name)
                    found.append(rows[:, first:end] if name in self._names else rows[first:end])
        lengths = torch.tensor([end - first for _, first, end in places])
        arrays = {name: torch.cat(found, -2 if name in self._names else 0)
                  for name, found in parts.items()}  # fmt: skip
        arrays = {name: array.to(self.device) for name, array in arrays.items()}
        read = [_stack(arrays[name][self._layers], self.site) for name in self._names]
        sequence = torch.arange(len(places)).repeat_interleave(lengths).to(self.device)
        return Batch(read[0], read[-1], arrays["tokens"], sequence, arrays["position"])
