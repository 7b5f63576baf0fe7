"""Activations as the autoencoder sees them: a stream of (layer, token, d_model) batches.

They come from a source: a language model that reads text (MLSAE paper, Appendix A), or a folder
in which somebody saved them. Vectors at special tokens are removed along the token axis, the same
ones at every layer, so they are in no mean, count or batch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from mlsae_core import store
from mlsae_core.keys import stored
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.metrics import LayerMoments
from mlsae_core.processes import ALONE, Share
from mlsae_core.resume import Pass
from mlsae_core.spec import SiteSpec, SpecError, canonical, to_dict
from mlsae_core.text import StreamedBlocks, TokenBlocks, data_key

T = TypeVar("T")

# Logits held at a time, over all replaced layers together: 32 MiB in float32 on a CPU, enough rows
# to read the output embeddings seldom, and 256 MiB on a GPU, which is busy only with more.
LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}


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
        text: (sequence, position) int64, all tokens of the sequences, special ones among them.
        sequence, position: (token,) int64, where in `text` each vector stands.
    """

    source: Tensor
    target: Tensor
    text: Tensor
    sequence: Tensor
    position: Tensor

    @property
    def tokens(self) -> Tensor:
        """(token,) int64, the token of each vector."""
        return self.text[self.sequence, self.position]


class ActivationSource(Protocol):
    """Where activations come from: all that training and measurements know of a model and a text.

    Replacing a layer takes more than vectors: see `TextSource.passes`, which others may offer.

    Attributes:
        site: which layers batches have, and whether they are stacked.
        n_layers: of the model, of which the site chooses some.
        d_model: length of a layer's vector.
        device: where batches are.
        n_sequences: of one pass, or none where that is not known.
        key: identity of what is read.
    """

    site: SiteSpec
    n_layers: int
    d_model: int
    device: torch.device
    n_sequences: int | None
    key: str

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """Activations of `size` sequences each: of every `every`-th batch from `start` on.

        Batch n is a pure function of (seed, n). Without a seed: one pass in order, the last batch
        may be smaller. With one: endless passes.
        """
        ...


class Work:
    """How much of the present batch is done, for the bar of `one_pass`."""

    def __init__(self):
        self.bar, self.part = None, 0

    def done(self, part: float):
        """Show that so much of the batch is done, between 0 and 1."""
        if self.bar is not None:
            self.bar.update(part - self.part)
        self.part = part


def one_pass(
    batches: Iterable[T],
    source: ActivationSource,
    size: int,
    name: str,
    progress: bool = True,
    done: Pass | None = None,
    share: Share = ALONE,
    work: Work | None = None,
) -> Iterator[T]:
    """The batches of `size` sequences of a source, with a progress bar.

    done: what was read before; it counts each batch when the next one is asked for. share: whose
    they are. work: what moves the bar within a batch.

    Raises:
        ValueError: there are none.
    """
    first = done.first if done else 0
    batch = first or None  # some were read
    total = None
    if source.n_sequences:
        total = math.ceil((math.ceil(source.n_sequences / size) - share.index) / share.count)
    shown, parts = progress and share.index == 0, work is not None
    work = work or Work()
    with tqdm(None, name, total, disable=not shown, initial=first, unit_scale=parts) as work.bar:
        for batch in batches:
            yield batch
            work.done(1)
            work.part = 0
            if done:
                done.batch_done()
    if batch is None and share.index == 0:
        raise ValueError("source: expected at least one sequence, got none")


def needs_model(source: ActivationSource, name: str = "source"):
    """Refuse a source that cannot put vectors back, for what the field `name` asks for."""
    if not hasattr(source, "passes"):
        raise SpecError(
            f"{name}: expected a language model that reads text, got {type(source).__name__}, "
            "whose activations cannot be replaced"
        )


def check_site(site: SiteSpec, there: SiteSpec, names: Iterable[str], where: str):
    """Refuse a site that differs in some fields from that of activations that are there."""
    for name in names:
        if (asked := getattr(site, name)) != (found := getattr(there, name)):
            raise SpecError(f"{name}: expected {found}, as the activations {where}, got {asked}")


def _stack(x: Tensor, site: SiteSpec) -> Tensor:
    """(layer, token, d_model), or (1, token, n_layers · d_model) where the site is stacked."""
    return x.transpose(0, 1).flatten(1)[None] if site.stacked else x


def _check_finite(x: Tensor, layers: list[int], where: str, remedy: str):
    """Refuse (layer, token, d_model) vectors with NaN or infinite numbers; the host waits."""
    # A sum is not finite if any term is not: one pass, without a mask of the same size.
    rows = () if x.sum().isfinite() else zip(layers, x, strict=True)
    if bad := [layer for layer, vectors in rows if not vectors.isfinite().all()]:
        raise ActivationError(f"{where} has NaN or infinite values at layers {bad}; {remedy}")


def _check_some(sequence: Tensor, text: Tensor, index: int):
    if not len(sequence):
        raise ActivationError(
            f"batch {index}: all {text.numel()} tokens are special; expected text"
        )


MASSIVE = 20
"""Times the median norm of its sequence's vectors above which a vector's norm is massive: in the
middle of the gap of SmolLM2-135M, 16,384 tokens of which are below 13 or, 67 of them, above 100."""


@torch.no_grad()
def massive(x: Tensor) -> Tensor:
    """Which vectors are massive activations (Sun et al. 2024, "Massive Activations in Large
    Language Models"): those whose norm is above `MASSIVE` times the median of their sequence and
    layer. So they are found by what they are, wherever in a sequence they stand.

    Args:
        x: (layer, batch, position, d_model).

    Returns:
        (layer, batch, position) bool. The median of an even number is the lower one of the middle
        two; a vector that is alone in its sequence is never massive.
    """
    norms = torch.linalg.vector_norm(x.float(), dim=-1)
    return norms > MASSIVE * norms.median(-1, keepdim=True).values


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device, a CPU's from pinned memory: else the copy waits for what is queued."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


# --- text ---------------------------------------------------------------------------------------


class First:
    """A text that ends after so many sequences, or before."""

    def __init__(self, blocks: TokenBlocks | StreamedBlocks, sequences: int):
        self.blocks, self.sequences = blocks, sequences
        if isinstance(blocks, TokenBlocks):
            self.sequences = min(sequences, len(blocks))

    def __len__(self) -> int:
        return self.sequences

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Tensor]:
        """As the whole text gives them; the last batch may be smaller."""
        numbers = range(start, math.ceil(self.sequences / size), every)
        for number, tokens in zip(
            numbers, self.blocks.batches(size, seed, start, every), strict=False
        ):
            yield tokens[: self.sequences - number * size]


#: Called with layers, as rows of the batch; their reconstruction, (layer, token, d_model), in the
#: basis of the batch; and further (layer, choice, d_model) vectors in the model's own basis. Each
#: layer alone is replaced by each of these. Gives, a few predictions at a time, the logits
#: (prediction, vocabulary) of the unmodified model, those of the others, (layer, choice,
#: prediction, vocabulary), the tokens that follow, (prediction,), and which of the sequences that
#: are put back, of all batches, each prediction is from, (prediction,).
PutBack = Callable[[list[int], Tensor, Tensor], Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]]


def spread(chosen: int, of: int, first: int, count: int) -> list[int]:
    """Which of `count` sequences from number `first` on are among `chosen` spread evenly over `of`,
    counted from `first`."""
    numbers = range(first, min(first + count, of))
    return [n - first for n in numbers if (n + 1) * chosen // of > n * chosen // of]


@dataclass(eq=False)
class TextSource:
    """A language model that reads text: an `ActivationSource`.

    There is no thread that looks ahead: on a CPU the language model and the autoencoder share the
    cores, and on a GPU kernels are queued, and training must not wait for them: activations that
    are not finite are refused on a CPU and in passes without a seed, else whoever trains looks.

    Args:
        blocks: (batch, position) int64 tokens are its `batches`; none where they come later.
        lens: the basis of the activations; by default the one the site names.
    """

    lm: LanguageModel
    blocks: TokenBlocks | StreamedBlocks | First | None
    site: SiteSpec
    lens: Lens | None = None

    def __post_init__(self):
        self.lens = (Lens.load(self.site) if self.lens is None else self.lens).to(self.lm.device)
        self.n_layers, self.d_model = self.lm.n_layers, self.lm.d_model
        self.device, self.layers = self.lm.device, self.site.indices(self.n_layers)
        target = self.site.source if self.site.target == "same" else self.site.target
        self.points = tuple(dict.fromkeys((self.site.source, target)))  # the last is the target

    @property
    def n_sequences(self) -> int | None:
        """See `ActivationSource`."""
        return len(self.blocks) if hasattr(self.blocks, "__len__") else None

    @cached_property
    def key(self) -> str:
        """Hash of the text, and of the first numbers of every parameter of model and lens."""
        digest = hashlib.sha256()
        lens = (self.lens.weight, self.lens.bias) if self.lens.weight is not None else ()
        for tensor in (*self.lm.model.parameters(), *lens):
            digest.update(tensor.flatten()[:64].detach().cpu().double().numpy())
        blocks = self.blocks.blocks if isinstance(self.blocks, First) else self.blocks
        if isinstance(blocks, TokenBlocks):
            digest.update(np.ascontiguousarray(blocks.blocks))
        else:
            digest.update(canonical([data_key(blocks.data), blocks.split]).encode())
        return digest.hexdigest()[:16]

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """See `ActivationSource.batches`.

        Raises:
            ActivationError: NaN or infinite activations, or nothing but special tokens.
        """
        check = seed is None or self.device.type == "cpu"
        own = self.blocks.batches(size, seed, start, every)
        for index, tokens in zip(itertools.count(start, every), own, strict=False):
            keep = self.lm.keep_mask(tokens)
            tokens = to_device(tokens, self.device)
            captured = self.lm.capture(tokens, self.layers, self.points)
            yield self._gather(captured, tokens, keep, index, check)

    def marked(self, size: int) -> Iterator[tuple[Batch, Tensor]]:
        """`batches` in order, each with which of its vectors are `massive`, (layer, token) bool; so
        of a site that keeps them."""
        for index, tokens in enumerate(self.blocks.batches(size)):
            tokens = tokens.to(self.device)
            captured = self.lm.capture(tokens, self.layers, self.points)
            batch = self._gather(captured, tokens, self.lm.keep_mask(tokens), index, True)
            yield batch, massive(captured[self.points[0]])[:, batch.sequence, batch.position]

    def _gather(self, captured, tokens: Tensor, keep: Tensor, index: int, check: bool) -> Batch:
        """A batch of captured activations.

        captured: hook point -> (layer, batch, position, d_model). keep: (batch, position) bool; on
        the CPU, the host need not wait for a device to count them, unless the site excludes massive
        activations. check: whether they are finite.
        """
        sequence, position = self._kept(captured, keep).nonzero(as_tuple=True)
        _check_some(sequence, tokens, index)
        sequence, position = to_device(torch.stack((sequence, position)), tokens.device)
        rows = sequence * keep.shape[1] + position

        def read(point: str) -> Tensor:
            x = captured[point].flatten(1, 2)
            if len(rows) < x.shape[1]:
                x = x.index_select(1, rows)
            x = x.float()
            if check:
                remedy = "try model.dtype: float32 or bfloat16"
                _check_finite(x, self.layers, f"batch {index}: {point}", remedy)
            return _stack(self.lens.apply(x, self.layers), self.site)

        source = read(self.points[0])
        target = read(self.points[1]) if len(self.points) > 1 else source
        return Batch(source, target, tokens, sequence, position)

    def _kept(self, captured, keep: Tensor) -> Tensor:
        """(batch, position) bool, where `keep` is and the site excludes nothing."""
        if self.site.massive == "kept":
            return keep
        return keep & ~massive(captured[self.points[0]]).any(0).to(keep.device)

    # --- putting vectors back -----------------------------------------------------------------

    def passes(
        self,
        size: int,
        start: int = 0,
        first: int = 0,
        every: int = 1,
        replaced: int | None = None,
    ) -> Iterator[tuple[Batch, PutBack | None]]:
        """`batches` in order, each with what puts vectors in the place of its target's.

        Vectors are replaced at the positions of the batch, one layer at a time, and the rest of
        the model is run; all replaced layers share a growing batch. Every position but a sequence's
        last makes one prediction, scored against the token that really follows.

        Args:
            start: the position from which on the batch has vectors and predictions are made.
            first, every: which batches, as of `batches`.
            replaced: sequences in which vectors are replaced, spread evenly over the text; of a
                batch that has none of them nothing can be put back. All by default.

        Raises:
            ActivationError: NaN or infinite activations, or nothing but special tokens.
            SpecError: `replaced` sequences of a text of unknown length.
        """
        if replaced is not None and not self.n_sequences:
            raise SpecError("replaced: expected a text that ends, over which to spread sequences")
        own = self.blocks.batches(size, None, first, every)
        for index, tokens in zip(itertools.count(first, every), own, strict=False):
            tokens = tokens.to(self.device)
            keep = self.lm.keep_mask(tokens)
            keep[:, :start] = False
            if replaced is not None:
                captured = self.lm.capture(tokens, self.layers, self.points)
                batch = self._gather(captured, tokens, keep, index, True)
                chosen = spread(replaced, self.n_sequences, index * size, len(tokens))
                yield batch, self._put_back_some(batch, start, chosen, index * size, replaced)
                continue
            original = self.lm.original(tokens, self.points)
            captured = {name: original.activations[name][self.layers] for name in self.points}
            batch = self._gather(captured, tokens, keep, index, True)
            place = batch.sequence, batch.position
            yield batch, partial(self._put_back, original, place, start, index * size)

    def _put_back_some(self, batch, start, chosen, first, replaced) -> PutBack | None:
        """What puts vectors back in some sequences of a batch, whose first one has number `first`.

        They are read again by themselves, so that no more is kept than they need.
        """
        if not chosen:
            return None
        rows = torch.tensor(chosen, device=self.device)
        there = torch.isin(batch.sequence, rows)
        place = torch.searchsorted(rows, batch.sequence[there]), batch.position[there]
        number = (first + chosen[0]) * replaced // self.n_sequences
        original = self.lm.original(batch.text[rows], self.points)

        def put_back(layers, recon, others):
            return self._put_back(original, place, start, number, layers, recon[:, there], others)

        return put_back

    def _put_back(self, original, place, start, number, rows, recon, others):
        """See `PutBack`; place: sequence and position of each vector; number: of the first one."""
        layers, point, replacements = [self.layers[row] for row in rows], self.points[-1], {}
        choices = zip(layers, self.lens.invert(recon, layers), others, strict=True)
        for layer, own, further in choices:
            copies = original.activations[point][layer].repeat(1 + len(further), 1, 1, 1)
            for copy, vectors in zip(copies, (own, *further), strict=True):
                copy[place] = vectors.to(copy.dtype)
            replacements[layer] = copies
        last = self.lm.resume_layers(original, replacements, point)
        streams = (original.residual[-1][None], last.flatten(0, 1))
        streams = torch.cat([x[:, :, start:-1] for x in streams]).flatten(1, 2)
        following = original.tokens[:, start + 1 :]
        sequences = torch.arange(number, number + len(following), device=self.device)
        sequences = sequences[:, None].expand_as(following).flatten()
        targets = following.flatten()
        # A few predictions at a time, so memory does not grow with the batch.
        at_once = LOGITS_AT_ONCE.get(self.device.type, LOGITS_AT_ONCE["cpu"])
        size = max(1, at_once // (len(streams) * self.lm.vocab_size))
        pieces = streams.split(size, 1), targets.split(size), sequences.split(size)
        for piece, target, sequence in zip(*pieces, strict=True):
            logits = self.lm.logits(piece)
            yield logits[0], logits[1:].unflatten(0, last.shape[:2]), target, sequence

    def ablations(self, tokens: int, size: int) -> Tensor:
        """(layer, 2, d_model) zero and the target's mean, in the model's own basis, for `passes`.

        tokens: the first ones of the text, whole sequences, of which the mean is taken.
        """
        moments, left = LayerMoments(len(self.layers), self.d_model, self.device), None
        for batch in self.blocks.batches(size):
            left = max(tokens // batch.shape[1], 1) if left is None else left
            opening = batch[:left].to(self.device)
            captured = self.lm.capture(opening, self.layers, self.points)
            kept = self._kept(captured, self.lm.keep_mask(opening))
            moments.update(captured[self.points[-1]][:, kept])
            left -= len(batch)
            if left <= 0:
                break
        return torch.stack([torch.zeros_like(moments.mean), moments.mean], 1)


# --- folders ------------------------------------------------------------------------------------


def save(source: ActivationSource, folder: str | os.PathLike[str], size: int = 8) -> Path:
    """Write one pass over a source as a folder that `SavedSource` reads; nothing is replaced.

    A file of safetensors for each `size` sequences, with the tensors of a `Batch`, `target` for a
    transcoder alone; as metadata the site, and the model's number of layers.

    Raises:
        SpecError: something is there already, or a stacked site: whoever reads may stack layers.
    """
    folder = Path(folder)
    source.site.refuse_stacked("activations that are saved")
    if folder.exists():
        raise SpecError(f"folder: expected a new one for activations, got {folder}; remove it")
    facts = {"site": canonical(to_dict(source.site)), "n_layers": str(source.n_layers)}
    with store.atomic_folder(folder, replace=False) as work:
        batches = one_pass(source.batches(size), source, size, "saving")
        for number, batch in enumerate(batches):
            arrays = {name: x.cpu().contiguous() for name, x in vars(batch).items()}
            if batch.target is batch.source:
                del arrays["target"]
            save_file(arrays, work / f"{number:06}.safetensors", facts)
    return folder


class SavedSource:
    """A folder of saved activations, as `save` writes it: an `ActivationSource`.

    site: which of the saved layers are read, and whether they are stacked; hook points and basis
    are those with which they were saved. By default all of it as it was saved.

    Raises:
        SpecError: the folder holds no such files, or they do not fit each other or the site.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        site: SiteSpec | None = None,
        device: torch.device | str = "cpu",
    ):
        self.device = torch.device(device)
        self.files = sorted(Path(folder).expanduser().glob("*.safetensors"))
        if not self.files:
            raise SpecError(f"folder: expected *.safetensors in {folder}, got none")
        kinds, self._places = set(), []
        for file in self.files:
            try:
                kind, lengths = _read_head(file)
            except (SafetensorError, OSError, RuntimeError, ValueError, LookupError) as error:
                raise SpecError(f"{file}: expected saved activations: {error}") from None
            kinds.add(kind)
            ends = itertools.pairwise(itertools.accumulate(lengths, initial=0))
            self._places += [(file, row, *place) for row, place in enumerate(ends)]
        if len(kinds) > 1:
            raise SpecError(f"folder: expected files of one site and size, got {len(kinds)} kinds")
        ((saved, self.n_layers, self.d_model, _),) = kinds
        self.site = site = site or saved
        fixed = ("source", "target", "basis", "alignment", "massive")
        check_site(site, saved, fixed, f"in {folder} were saved")
        there, self._layers = saved.indices(self.n_layers), site.indices(self.n_layers)
        if missing := set(self._layers) - set(there):
            raise SpecError(f"layers: expected some of {there}, as saved, got {sorted(missing)}")
        self._rows = [there.index(layer) for layer in self._layers]
        self._names = ("source",) if saved.target == "same" else ("source", "target")
        self.n_sequences = len(self._places)

    @cached_property
    def key(self) -> str:
        """Identity of the activations: the hash of their files' contents, in order."""
        digests = [store.source_hash(file) for file in self.files]
        return hashlib.sha256(canonical(digests).encode()).hexdigest()[:16]

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """See `ActivationSource.batches`; the order is that of text of as many sequences.

        Raises:
            ActivationError: NaN or infinite activations, or nothing but special tokens.
        """
        numbers = TokenBlocks(np.arange(self.n_sequences)[:, None])
        own = numbers.batches(size, seed, start, every)
        for index, chosen in zip(itertools.count(start, every), own, strict=False):
            yield self._read([self._places[number] for number in chosen.flatten().tolist()], index)

    def _read(self, places: list[tuple[Path, int, int, int]], index: int) -> Batch:
        """The sequences at (file, row of its text, first vector, end), as one batch."""
        parts: dict[str, list[Tensor]] = {name: [] for name in (*self._names, "position", "text")}
        for file, row, first, end in places:
            with safe_open(file, "pt") as saved:
                for name in self._names:
                    parts[name].append(saved.get_slice(name)[:, first:end])
                parts["position"].append(saved.get_slice("position")[first:end])
                parts["text"].append(saved.get_slice("text")[row : row + 1])
        lengths = torch.tensor([end - first for *_, first, end in places])
        position, text = (torch.cat(parts[name]) for name in ("position", "text"))
        sequence = torch.arange(len(places)).repeat_interleave(lengths)
        _check_some(sequence, text, index)
        vectors = []
        for name in self._names:
            x = torch.cat(parts[name], 1)[self._rows]
            _check_finite(x, self._layers, f"batch {index}: {name}", f"save {file.parent} anew")
            vectors.append(_stack(x, self.site).to(self.device))
        rest = (part.to(self.device) for part in (text, sequence, position))
        return Batch(vectors[0], vectors[-1], *rest)


def _read_head(file: Path) -> tuple[tuple[SiteSpec, int, int, int], list[int]]:
    """Site, model's number of layers, width and context of saved activations, and the number of
    vectors of each sequence."""
    with safe_open(file, "pt") as saved:
        facts = saved.metadata() or {}
        if not facts.keys() >= {"site", "n_layers"}:
            raise ValueError("expected the site as metadata, got none; save them anew")
        site, n_layers = stored(SiteSpec, json.loads(facts["site"])), int(facts["n_layers"])
        _, vectors, width = saved.get_slice("source").get_shape()
        sequences, context = saved.get_slice("text").get_shape()
        shapes = {"source": [len(site.indices(n_layers)), vectors, width]}
        shapes |= {"position": [vectors], "sequence": [vectors]}
        if site.target != "same":
            shapes["target"] = shapes["source"]
        for name, expected in shapes.items():
            if (shape := saved.get_slice(name).get_shape()) != expected:
                raise ValueError(f"expected {name} of shape {expected}, got {shape}")
        sequence = saved.get_tensor("sequence")
    if not torch.equal(sequence.clamp(0, sequences - 1).sort().values, sequence):
        raise ValueError(f"expected vectors of {sequences} sequences in order, got others")
    return (site, n_layers, width, context), sequence.bincount(minlength=sequences).tolist()
