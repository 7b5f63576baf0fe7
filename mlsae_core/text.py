"""Documents → packed token blocks, in disjoint splits.

Three kinds of text behind one interface: local files, hub data sets (streamed), and what other
packages declare as a `Source`. A document belongs to train, validation or test by its own hash, so
the splits are disjoint whatever the order of the text (Appendix A re-reads the training stream to
validate; here nothing is read twice).
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.metadata
import itertools
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file
from tqdm.auto import tqdm

from mlsae_core import store
from mlsae_core.documents import FORMATS, document, file_documents, format_of, reason
from mlsae_core.keys import keyed, later
from mlsae_core.spec import DataSpec, SpecError

if TYPE_CHECKING:
    import datasets
    import torch

SPLITS = ("train", "validation", "test")
DOCUMENTS_PER_CHUNK = 1024  # Appendix A: so many documents are joined before cutting
LANES = 16  # at most, of a hub data set: as many processes read it without overlap


class Source(NamedTuple):
    """A text that neither a file nor a hub holds.

    documents: gives every document with its split. identity: gives what these depend on. differs:
    gives what of them is other on this machine than their identity says, a line each.
    """

    documents: Callable[[], dict[str, str]]
    identity: Callable[[], dict]
    differs: Callable[[], list[str]] = list


#: Further texts by their path; other packages add theirs when they are imported.
SOURCES: dict[str, Source] = {}


def source(path: str) -> Source | None:
    """The one of `SOURCES` with that path, after the package that declares it was imported."""
    if path not in SOURCES and path in _declared():
        _declared()[path].load()
    return SOURCES.get(path)


@functools.cache
def _declared() -> dict[str, importlib.metadata.EntryPoint]:
    """Modules by the path of the text that each adds to `SOURCES`, of all installed packages."""
    return {found.name: found for found in importlib.metadata.entry_points(group="mlsae_core.text")}


def _kinds() -> str:
    """What a path can name, for messages."""
    return ", ".join(dict.fromkeys([*SOURCES, *_declared(), "a hub id"]))


def split_of(document: str) -> str:
    """The split a document belongs to: 1/8 test, 1/32 validation, the rest train, by its hash."""
    first = document_hash(document)[0]
    return "test" if first < 32 else "validation" if first < 40 else "train"


def document_hash(document: str) -> bytes:
    """SHA-256 of a document, which decides its split and its place."""
    return hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()


def documents(data: DataSpec, rows: Iterable[dict] | None = None) -> Iterable[str]:
    """Documents that are not blank, in their order; of local sources no document twice.

    rows: those of a hub data set that are to be read; by default all.

    Raises:
        SpecError: nothing is there, it cannot be read, or it has no such text column.
        Stopped: a hub cannot be reached, or no longer.
    """
    if declared := source(data.path):
        return list(declared.documents())
    return _distinct_documents(data, rows)


def split_documents(data: DataSpec) -> Iterable[tuple[str, str]]:
    """(split, document): each by its own hash, or as one of `SOURCES` says."""
    if declared := source(data.path):
        return [(split, text) for text, split in declared.documents().items()]
    found = documents(data)
    pairs = ((split_of(text), text) for text in found)
    return list(pairs) if isinstance(found, list) else pairs


def _distinct_documents(data: DataSpec, rows: Iterable[dict] | None) -> Iterator[str]:
    files, seen = local_files(data), set()
    own = (text for file in files for text in file_documents(file, data.text_column))
    for text in own if files else _hub(data, rows):
        if not text.isascii():  # halves of surrogate pairs, which no tokenizer takes
            text = text.encode("utf-8", "replace").decode()
        if text.strip() and (digest := document_hash(text)) not in seen:
            if files:
                seen.add(digest)
            yield text


# --- files and hub data sets --------------------------------------------------------------------


def local_files(data: DataSpec) -> list[Path]:
    """The files that a path names, none where it can only be a hub data set.

    Of a folder all files, in their order, but hidden ones, readmes and licences, which lie beside
    the data. Numbered shards (`-00001-of-00003`) are refused where they are not all there.
    """
    formats = f"{', '.join(FORMATS)} (or .zst)"
    here = Path(data.path).expanduser()
    if here.is_dir():
        if not (files := sorted(file for file in here.rglob("*") if _is_data(file, here))):
            raise SpecError(
                f"data.path: expected {formats} files in the folder {data.path}, got none"
            )
        _check_shards(files)
        return files
    if here.is_file():
        if format_of(here):
            return [here]
        raise SpecError(f"data.path: expected a file ending in {formats}, got {data.path}")
    if format_of(here) or data.path.startswith((".", "/", "~")) or data.path.count("/") > 1:
        beside = [file.name for file in here.parent.iterdir()] if here.parent.is_dir() else []
        near = difflib.get_close_matches(here.name, beside, n=1, cutoff=0.8)
        raise SpecError(
            f"data.path: expected {_kinds()}, or a file or folder that is there (from "
            f"{Path.cwd()}, if relative), got {data.path}"
            + (f"; did you mean `{here.with_name(near[0])}`?" if near else "")
        )
    return []


def _is_data(path: Path, folder: Path) -> bool:
    if format_of(path) is None or not path.is_file():
        return False
    hidden = any(part.startswith((".", "_")) for part in path.relative_to(folder).parts)
    return not hidden and not path.name.lower().startswith(("readme", "license", "licence"))


def _check_shards(files: list[Path]):
    """Refuse numbered files of which some are missing, or more are there than their names say."""
    found: dict[tuple[str, int], set[int]] = {}
    for file in files:
        if shard := re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\b.*", str(file)):
            found.setdefault((shard[1], int(shard[3])), set()).add(int(shard[2]))
    for (name, count), numbers in found.items():
        first = 0 if 0 in numbers else 1
        if wrong := sorted(numbers ^ {*range(first, first + count)}):
            raise SpecError(
                f"data.path: expected the {count} shards {name}-…-of-{count:05} and no others, got "
                f"{len(numbers)}; see that of number {wrong[0]:05}"
            )


def _hub(data: DataSpec, rows: Iterable[dict] | None) -> Iterator[str]:
    """Documents of a hub data set, streamed by the `datasets` library."""
    count = 0
    try:
        for row in _data_set(data) if rows is None else rows:
            yield document(row, data.text_column)
            count += 1
    except Exception as error:
        if count:  # what could be read is no bad input
            raise store.Unavailable(
                f"data.path: {data.path} cannot be read further than {count:,} documents: "
                f"{reason(error)}"
            ) from error
        if isinstance(error, SpecError):
            raise
        raise _unreadable(data, error) from error


def _data_set(data: DataSpec) -> datasets.IterableDataset:
    """A hub data set, of which nothing but its list of files is read yet."""
    import datasets

    try:
        return datasets.load_dataset(
            data.path, data.name, split=data.split, revision=data.revision, streaming=True
        )
    except Exception as error:
        raise _unreadable(data, error) from error


def _unreadable(data: DataSpec, error: Exception) -> SpecError | store.Stopped:
    """The library's errors are many; the reader needs one line."""
    kind = store.Stopped if store.is_away(error) else SpecError
    return kind(
        f"data.path: expected {_kinds()}, or a file or folder; as a hub id {data.path} cannot be "
        f"read: {reason(error)}"
    )


def is_streamed(data: DataSpec) -> bool:
    """Whether the text comes from a hub data set, whose length is not known."""
    return source(data.path) is None and not local_files(data)


def data_key(data: DataSpec) -> dict:
    """What identifies the text: hashes of local files, a hub id and revision, or a source's own."""
    if declared := source(data.path):
        return declared.identity() | later(data)
    if files := local_files(data):
        hashes = [[format_of(file), store.source_hash(file)] for file in files]
        return {"files": hashes, "text_column": data.text_column} | later(data)
    return {n: v for n, v in keyed(data).items() if n != "context_length"}


def differs(data: DataSpec) -> list[str]:
    """What of a text is other on this machine than `data_key` says, a line each."""
    declared = source(data.path)
    return declared.differs() if declared else []


# --- tokens -------------------------------------------------------------------------------------


def tokenizer_key(tokenizer) -> str:
    """Hash of a tokenizer's whole definition, and of the token that ends documents."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(f"{text} {tokenizer.eos_token_id}".encode()).hexdigest()[:16]


def token_ids(tokenizer, documents: list[str]) -> list[list[int]]:
    """Token ids of each document alone; text that spells a special token stays ordinary text."""
    encoded = tokenizer(
        documents,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )
    return encoded["input_ids"]


def pack(documents: Iterable[str], tokenizer, context_length: int) -> Iterator[np.ndarray]:
    """Join 1024 documents at a time with EOS and cut (Appendix A); yields (block, position) int32.

    Every document is followed by EOS. The incomplete last block of each chunk of 1024 documents is
    dropped, and so is a document without a single token.
    """
    documents = iter(documents)
    while chunk := list(itertools.islice(documents, DOCUMENTS_PER_CHUNK)):
        joined: list[int] = []
        for ids in token_ids(tokenizer, chunk):
            if ids:
                joined += ids
                joined.append(tokenizer.eos_token_id)
        whole = len(joined) // context_length
        yield np.array(joined[: whole * context_length], np.int32).reshape(whole, context_length)


def ahead(items: Iterator, depth: int = 2, stopped: threading.Event | None = None) -> Iterator:
    """The same items in the same order, of which a thread makes up to `depth` before they are used.

    So reading and tokenising (which leave Python's lock) go on while a language model is busy. An
    error of `items` is raised where its item would have come. Whoever uses no more items does not
    wait for the thread.

    stopped: is set at the end, for `items` to end early.
    """
    made, free = queue.SimpleQueue(), threading.Semaphore(depth)
    stopped = stopped or threading.Event()

    def make():
        try:
            while free.acquire() and not stopped.is_set():
                made.put((next(items), None))
        except BaseException as error:
            made.put((None, error))

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            item, error = made.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                raise error
            free.release()
            yield item
    finally:
        stopped.set()
        free.release()


def _tensor(rows: np.ndarray) -> torch.Tensor:
    import torch

    return torch.from_numpy(rows.astype(np.int64))


def _order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which a pass visits n sequences: a pure function of its arguments."""
    import torch

    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).numpy()


class TokenBlocks:
    """Packed sequences of one split held in memory: (block, position) int32, any order by seed."""

    def __init__(self, blocks: np.ndarray):
        self.blocks = np.asarray(blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def batches(
        self, batch_size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield (batch_size, position) int64 tensors: every `every`-th batch from `start` on.

        Without a seed: one pass in order, the last batch may be smaller. With one: endless passes,
        each in its own order, so batch n is a pure function of (seed, n) and a resumed training
        sees what an uninterrupted one would have.
        """
        if seed is None:
            for first in range(start * batch_size, len(self), every * batch_size):
                yield _tensor(self.blocks[first : first + batch_size])
            return
        order, ordered = np.empty(0, int), None
        for number in itertools.count(start, every):
            rows = []
            for position in range(number * batch_size, (number + 1) * batch_size):
                epoch, index = divmod(position, len(self))
                if epoch != ordered:
                    order, ordered = _order(len(self), seed, epoch), epoch
                rows.append(order[index])
            yield _tensor(self.blocks[rows])


class StreamedBlocks:
    """Packed sequences of one split of a hub data set, tokenised as they come.

    For endless passes its files are dealt to lanes: a power of two of them, at most `LANES` and at
    most one for each file. Each lane packs its own text, in order, and batch n is the next one of
    lane n % lanes: a function of the data set, however many processes share the batches. A process
    that takes every m-th reads nothing but the lanes from which those come.

    Two chunks of documents of a lane are read and tokenised ahead, beside whatever uses the first.
    """

    def __init__(self, data: DataSpec, tokenizer, split: str):
        self.data, self.tokenizer, self.split = data, tokenizer, split

    def batches(
        self, batch_size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[torch.Tensor]:
        """Yield (batch_size, position) int64 tensors: every `every`-th batch from `start` on.

        Without a seed: one pass over all files in order, the last batch may be smaller. With one:
        endless passes of each lane, joined without a gap, in the data set's order whatever the
        seed. What comes before `start` in the lanes is read again, and skipped.
        """
        if seed is None:
            sequences = itertools.islice(self._sequences(None), start * batch_size, None)
            for number in itertools.count():
                if not (rows := list(itertools.islice(sequences, batch_size))):
                    return
                if number % every == 0:
                    yield _tensor(np.stack(rows))
        read: dict[int, tuple[Iterator[np.ndarray], int]] = {}
        for number in itertools.count(start, every):
            turn, lane = divmod(number, self.lanes)
            sequences, done = read.get(lane) or (self._sequences(lane), 0)
            first = (turn - done) * batch_size
            yield _tensor(np.stack([*itertools.islice(sequences, first, first + batch_size)]))
            read[lane] = sequences, turn + 1

    @functools.cached_property
    def lanes(self) -> int:
        """Number of lanes."""
        return 1 << (min(self._rows.num_shards, LANES).bit_length() - 1)

    @functools.cached_property
    def _rows(self) -> datasets.IterableDataset:
        return _data_set(self.data)

    def _documents(self, rows: Iterable[dict], stopped: threading.Event) -> Iterator[str]:
        for text in documents(self.data, rows):
            if stopped.is_set():
                return
            if split_of(text) == self.split:
                yield text

    def _sequences(self, lane: int | None) -> Iterator[np.ndarray]:
        """The sequences of a lane, again and again; without one, all of them once."""
        lanes, index = (1, 0) if lane is None else (self.lanes, lane)
        while True:
            rows = self._rows.shard(num_shards=lanes, index=index, contiguous=False)
            found, stopped = False, threading.Event()
            own = self._documents(rows, stopped)
            chunks = pack(own, self.tokenizer, self.data.context_length)
            for chunk in ahead(chunks, stopped=stopped):
                found = found or len(chunk) > 0
                yield from chunk
            if not found and lanes == 1:
                raise SpecError(_too_short(self.data, self.split))
            if not found:  # files of next to nothing: all of them then
                lanes, index = 1, 0
            if lane is None:
                return


def blocks(data: DataSpec, tokenizer, split: str) -> TokenBlocks | StreamedBlocks:
    """The packed sequences of one split; tokenised once per (text, tokenizer, context length).

    Raises:
        SpecError: text that cannot be read or fills no sequence of the split, or a tokenizer
            without an end-of-sequence token.
    """
    check_tokenizer(tokenizer)
    if is_streamed(data):
        return StreamedBlocks(data, tokenizer, split)
    artefact = packed(data, tokenizer, split)
    with safe_open(artefact.file("tokens.safetensors"), "np") as file:
        found = file.get_tensor(split)
    if not len(found):
        raise SpecError(_too_short(data, split))
    return TokenBlocks(found)


def check_tokenizer(tokenizer, n_embeddings: int | None = None):
    """Refuse a tokenizer that cannot end a document, or that gives ids that a model has not."""
    end = tokenizer.eos_token_id
    if end is None:
        raise SpecError(
            "model.path: expected a tokenizer with an EOS token, which is put between documents, "
            "got one without"
        )
    if n_embeddings is None:
        return
    # Special tokens never stand in text, so those of them that a model has not do no harm.
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ordinary = {i: token for token, i in tokenizer.get_vocab().items() if i not in special}
    largest = max(end, *ordinary)
    if largest >= n_embeddings:
        raise SpecError(
            f"model.path: expected the model's own tokenizer, got one with ids up to {largest}; "
            f"the model has {n_embeddings} embeddings, none for "
            f"{ordinary.get(largest, tokenizer.eos_token)!r}"
        )


#: Characters of each split from which its tokens are told where it is not tokenised yet.
SAMPLE_CHARACTERS = 500_000
#: Passes over the same text from which on more of it would teach more.
MOST_PASSES = 4


def counted(data: DataSpec, tokenizer) -> dict[str, int] | None:
    """Tokens of each split in whole sequences; nothing of a hub data set, which is not read.

    Counted where the text was packed before, else told from the first `SAMPLE_CHARACTERS`
    characters of each split.

    tokenizer: without one a token counts as four characters.
    """
    if is_streamed(data):
        return None
    known = tokenizer is not None and tokenizer.eos_token_id is not None
    if known and (found := store.find("tokens", _tokens_key(data, tokenizer)[0])):
        return found.meta["tokens"]
    characters, samples = dict.fromkeys(SPLITS, 0), {split: [] for split in SPLITS}
    for split, text in split_documents(data):
        if characters[split] < SAMPLE_CHARACTERS:
            samples[split].append(text)
        characters[split] += len(text)
    tokens = {}
    for split, sample in samples.items():
        read = sum(map(len, sample))
        if tokenizer is None:
            told = read / 4
        else:
            told = sum(len(ids) + 1 for ids in token_ids(tokenizer, sample)) if sample else 0
        whole = told * characters[split] / max(read, 1)
        tokens[split] = int(whole // data.context_length) * data.context_length
    return tokens


def remarks(data: DataSpec, tokens: dict[str, int], training_tokens: int) -> list[str]:
    """What should be known of a text before a training reads it, a line each.

    That it is read again and again, or that a split is too short to measure anything on.

    tokens: of each split, as `counted` gives them.
    """
    said = []
    if training_tokens > MOST_PASSES * tokens["train"] > 0:
        passes = training_tokens / tokens["train"]
        said.append(
            f"data.path: the train split of {data.path} has {tokens['train']:,} tokens (documents "
            f"that are alike count once), which a training on {training_tokens:,} reads "
            f"{passes:,.0f} times; give more text or train on fewer tokens"
        )
    if tokens["train"] and not tokens["test"]:
        said.append(_too_short(data, "test"))
    return said


def _too_short(data: DataSpec, split: str) -> str:
    return (
        f"data.path: expected text that fills at least one sequence of data.context_length "
        f"{data.context_length}, got less in the {split} split of {data.path}; give more text (an "
        "eighth of the documents is test, a thirty-second validation) or a shorter context"
    )


def _tokens_key(data: DataSpec, tokenizer) -> tuple[str, dict, dict]:
    """Key, spec and parents of packed text: of what is read on this machine."""
    spec = {"data": data_key(data), "context_length": data.context_length}
    if found := differs(data):
        spec["differs"] = found
    parents = {"tokenizer": tokenizer_key(tokenizer)}
    return store.key("tokens", spec, parents), spec, parents


def packed(data: DataSpec, tokenizer, split: str = "train") -> store.Artefact:
    """All splits packed, as `tokens.safetensors`; its meta has documents, characters and tokens.

    Continues from its checkpoint after a stop.

    split: the one that is needed; where it fills no sequence, nothing is written.
    """
    identity, spec, parents = _tokens_key(data, tokenizer)
    checkpoint = store.STORE / "checkpoints" / f"{identity}.pt"
    if found := store.find("tokens", identity):
        store.forget_checkpoint(checkpoint, found.path / "meta.json")
        return found

    def fill(folder: Path) -> dict:
        blocks, notes = _pack_splits(data, tokenizer, checkpoint)
        if not len(blocks[split]):
            raise SpecError(_too_short(data, split))
        save_file(blocks, folder / "tokens.safetensors")
        return notes

    made = store.write("tokens", identity, spec, parents, fill)
    checkpoint.unlink(missing_ok=True)
    return made


def _pack_splits(data: DataSpec, tokenizer, checkpoint: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Blocks of every split, and its documents, characters and tokens; in one pass over text."""
    import torch

    from mlsae_core.resume import Pass

    waiting: dict[str, list[str]] = {split: [] for split in SPLITS}
    counts = {name: dict.fromkeys(SPLITS, 0) for name in ("documents", "characters", "tokens")}
    chunks: dict[str, list[torch.Tensor]] = {split: [] for split in SPLITS}
    parts = {"waiting": waiting, "counts": counts, "chunks": chunks}
    done = Pass(checkpoint, DOCUMENTS_PER_CHUNK, torch.device("cpu"), **parts)

    def empty(split: str):
        for chunk in pack(waiting[split], tokenizer, data.context_length):
            chunks[split].append(torch.from_numpy(chunk))
            counts["tokens"][split] += chunk.size
        progress.update(len(waiting[split]))
        waiting[split].clear()

    texts = split_documents(data)
    total = len(texts) if isinstance(texts, list) else None
    with tqdm(total=total, desc="tokenising", unit=" documents", initial=done.first) as progress:
        for split, text in itertools.islice(texts, done.first, None):
            counts["documents"][split] += 1
            counts["characters"][split] += len(text)
            waiting[split].append(text)
            if len(waiting[split]) == DOCUMENTS_PER_CHUNK:
                empty(split)
            done.batch_done()
        for split in SPLITS:
            empty(split)
    if not any(counts["documents"].values()):
        raise SpecError(f"data.path: expected at least one document, {data.path} holds no text")
    none = np.empty((0, data.context_length), np.int32)
    return {split: np.concatenate([none, *chunks[split]]) for split in SPLITS}, counts
