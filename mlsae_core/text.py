"""Documents → packed token blocks, in disjoint splits.

Three sources behind one interface: the embedded docstring corpus, local files, and hub data sets
(streamed). A document belongs to train, validation or test by its own hash, so the splits are
disjoint whatever the order of the text (Appendix A re-reads the training stream to validate; here
nothing is read twice).
"""

from __future__ import annotations

import ast
import gc
import hashlib
import importlib.metadata
import inspect
import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from mlsae_core import store
from mlsae_core.spec import DataSpec, SpecError

SPLITS = ("train", "validation", "test")
DOCUMENTS_PER_CHUNK = 1024  # Appendix A: so many documents are joined before cutting
_FORMATS = {".jsonl": "json", ".json": "json", ".txt": "text", ".parquet": "parquet"}


def split_of(document: str) -> str:
    """The split a document belongs to: 1/8 test, 1/32 validation, the rest train, by its hash."""
    first = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()[0]
    return "test" if first < 32 else "validation" if first < 40 else "train"


# --- the docstring corpus -----------------------------------------------------------------------


def corpus_pins() -> dict[str, str]:
    """Distribution → release of the packages whose docstrings are the embedded corpus."""
    return _corpus()["packages"]


def _corpus() -> dict:
    return yaml.safe_load((store.DATA / "docstrings.yml").read_text())


def corpus_drift() -> list[str]:
    """Installed releases that differ from the corpus' pins, as `name pinned → installed`."""
    pins = corpus_pins().items()
    return [f"{name} {pin} → {_installed(name)}" for name, pin in pins if _installed(name) != pin]


def file_docstrings(path: Path) -> list[str]:
    """Docstrings of a file's module, classes and functions; the file is parsed, never run."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []  # one-line strings in single quotes are rare, and too short to keep
    try:
        pending: list[ast.AST] = [ast.parse(source)]
    except (SyntaxError, ValueError):
        return []  # templates and files for other Python versions
    found = []
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            value = first.value if isinstance(first, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.append(inspect.cleandoc(value.value))
        for block in ("body", "orelse", "finalbody", "handlers"):
            children = getattr(node, block, None)
            if isinstance(children, list):
                pending.extend(children)
    return found


def _docstrings_of(paths: list[Path]) -> list[str]:
    gc.disable()  # syntax trees are large and acyclic: a third of the time otherwise
    try:
        return [text for path in paths for text in file_docstrings(path)]
    finally:
        gc.enable()


def docstrings() -> list[str]:
    """The embedded corpus in the order of its documents' hashes; extracted once per machine."""
    installed = {name: _installed(name) for name in corpus_pins()}
    spec = {"corpus": _corpus(), "installed": installed}
    identity = store.key("documents", spec, {})
    artefact = store.find("documents", identity)
    if artefact is None:

        def fill(folder: Path) -> dict:
            texts = extract_docstrings()
            frame = pd.DataFrame({"text": texts})
            frame.to_parquet(folder / "documents.parquet", compression="zstd", index=False)
            return {"documents": len(texts), "characters": sum(map(len, texts))}

        artefact = store.write("documents", identity, spec, {}, fill)
    return pd.read_parquet(artefact.file("documents.parquet"))["text"].tolist()


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def extract_docstrings() -> list[str]:
    """Distinct docstrings of the pinned packages in the order of their hashes, without tests."""
    files = []
    for name in corpus_pins():
        try:
            listed = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in listed:
            outside = {"..", "tests", "test"} & set(file.parts)
            if file.suffix == ".py" and not outside:
                files.append(Path(str(file.locate())))
    files = [file for file in files if file.is_file()]
    if not files:
        raise SpecError("data: none of the corpus' packages is installed; run `make book` first")
    batches = [files[start::64] for start in range(64)]
    with ProcessPoolExecutor(os.cpu_count() or 1) as pool:
        progress = tqdm(pool.map(_docstrings_of, batches), "reading docstrings", len(batches))
        texts = {text for batch in progress for text in batch}
    keep = _corpus()["minimum_characters"]
    return sorted(
        (text for text in texts if len(text) >= keep),
        key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(),
    )


# --- files and hub data sets --------------------------------------------------------------------


def _local_files(path: str) -> list[Path]:
    here = Path(path).expanduser()
    if here.is_dir():
        files = sorted(file for file in here.rglob("*") if _format(file))
        if not files:
            raise SpecError(f"data.path: {path} holds no {', '.join(_FORMATS)} (or .zst) file")
        return files
    if here.is_file():
        if not _format(here):
            raise SpecError(
                f"data.path: expected a file ending in {', '.join(_FORMATS)} or .zst, got {path}"
            )
        return [here]
    if here.suffix or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise SpecError(f"data.path: no such file or folder: {path}")
    return []


def _format(path: Path) -> str | None:
    return _FORMATS.get(Path(path.name.removesuffix(".zst")).suffix)


def _rows(data: DataSpec, files: list[Path]) -> Iterator[str]:
    """Documents of local files or of a hub data set, streamed by the `datasets` library."""
    import datasets

    try:
        if files:
            kind = _format(files[0])
            options = {"sample_by": "paragraph"} if kind == "text" else {}
            rows = datasets.load_dataset(
                kind, data_files=[str(f) for f in files], split="train", streaming=True, **options
            )
        else:
            rows = datasets.load_dataset(
                data.path, data.name, split=data.split, revision=data.revision, streaming=True
            )
        for row in rows:
            if data.text_column not in row:
                raise SpecError(
                    f"data.text_column: expected one of {', '.join(row)}, got {data.text_column}"
                )
            if isinstance(row[data.text_column], str):
                yield row[data.text_column]
    except SpecError:
        raise
    except Exception as error:  # the library's errors are many; the reader needs one line
        reason = " ".join(str(error).split())[:200]
        raise SpecError(f"data.path: cannot read {data.path}: {reason}") from error


def is_streamed(data: DataSpec) -> bool:
    """Whether the text comes from a hub data set, whose length is not known."""
    return data.path != "docstrings" and not _local_files(data.path)


def data_key(data: DataSpec) -> dict:
    """What identifies the text: package pins, hashes of local files, or a hub id and revision."""
    if data.path == "docstrings":
        return {"docstrings": _corpus()}
    files = _local_files(data.path)
    if files:
        hashes = {str(i): store.file_hash(file) for i, file in enumerate(files)}
        return {"files": hashes, "text_column": data.text_column}
    return {n: v for n, v in asdict(data).items() if n != "context_length"}


# --- tokens -------------------------------------------------------------------------------------


def tokenizer_key(tokenizer) -> str:
    """Hash of a tokenizer's whole definition."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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


def pack(documents: Iterable[str], tokenizer, context_length: int) -> Iterator[torch.Tensor]:
    """Join 1024 documents at a time with EOS and cut (Appendix A); yields (block, position) int32.

    The incomplete last block of each chunk of 1024 documents is dropped.
    """
    if tokenizer.eos_token_id is None:
        raise SpecError("model: its tokenizer has no EOS token; packing joins documents with it")
    documents = iter(documents)
    while chunk := list(itertools.islice(documents, DOCUMENTS_PER_CHUNK)):
        joined: list[int] = []
        for ids in token_ids(tokenizer, chunk):
            joined += ids
            joined.append(tokenizer.eos_token_id)
        whole = len(joined) // context_length
        if whole:
            ids = torch.tensor(joined[: whole * context_length], dtype=torch.int32)
            yield ids.view(whole, context_length)


class TokenBlocks:
    """Packed sequences of one split held in memory: (block, position) int32, any order by seed."""

    def __init__(self, blocks: torch.Tensor):
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def batches(
        self, batch_size: int, seed: int | None = None, start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield (batch_size, position) int64 tensors from batch number `start` on.

        Without a seed: one pass in order, the last batch may be smaller. With one: endless passes,
        each in its own order, so batch n is a pure function of (seed, n) and a resumed training
        sees what an uninterrupted one would have.
        """
        if seed is None:
            for first in range(start * batch_size, len(self), batch_size):
                yield self.blocks[first : first + batch_size].long()
            return
        orders: dict[int, torch.Tensor] = {}
        for number in itertools.count(start):
            rows = []
            for position in range(number * batch_size, (number + 1) * batch_size):
                epoch, index = divmod(position, len(self))
                if epoch not in orders:
                    orders.pop(epoch - 2, None)
                    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
                    orders[epoch] = torch.randperm(len(self), generator=generator)
                rows.append(int(orders[epoch][index]))
            yield self.blocks[rows].long()


class StreamedBlocks:
    """Packed sequences of one split of a hub data set, tokenised as they come, in their order."""

    def __init__(self, data: DataSpec, tokenizer, split: str):
        self.data, self.tokenizer, self.split = data, tokenizer, split

    def batches(
        self, batch_size: int, seed: int | None = None, start: int = 0
    ) -> Iterator[torch.Tensor]:
        """Yield (batch_size, position) int64 tensors from batch number `start` on (fast-forwarded).

        The seed does not change the order; the stream starts again where it ends if it is given.
        """
        while True:
            found = False
            for tokens in itertools.islice(self._pass(batch_size), start, None):
                found = True
                yield tokens
            if seed is None:
                return
            if not found:
                raise SpecError(
                    f"data: {self.data.path} ends before batch {start} of its {self.split} split"
                )
            start = 0

    def _pass(self, batch_size: int) -> Iterator[torch.Tensor]:
        documents = (d for d in _rows(self.data, []) if split_of(d) == self.split)
        chunks = pack(documents, self.tokenizer, self.data.context_length)
        blocks = (block for chunk in chunks for block in chunk)
        while rows := list(itertools.islice(blocks, batch_size)):
            yield torch.stack(rows).long()


def blocks(data: DataSpec, tokenizer, split: str) -> TokenBlocks | StreamedBlocks:
    """The packed sequences of one split; tokenised once per (text, tokenizer, context length)."""
    if is_streamed(data):
        return StreamedBlocks(data, tokenizer, split)
    artefact = packed(data, tokenizer)
    with safe_open(artefact.file("tokens.safetensors"), "pt") as file:
        found = file.get_tensor(split)
    if not len(found):
        raise SpecError(
            f"data: the {split} split of {data.path} ({artefact.meta['documents'][split]} "
            f"documents) fills no sequence of context_length {data.context_length}; expected more "
            "text or a shorter context"
        )
    return TokenBlocks(found)


def packed(data: DataSpec, tokenizer) -> store.Artefact:
    """All splits packed, as `tokens.safetensors`; its meta has documents, characters and tokens."""
    spec = {"data": data_key(data), "context_length": data.context_length}
    parents = {"tokenizer": tokenizer_key(tokenizer)}
    identity = store.key("tokens", spec, parents)
    artefact = store.find("tokens", identity)
    if artefact is None:
        if data.path == "docstrings" and (drift := corpus_drift()):
            print(
                f"note: {len(drift)} of {len(corpus_pins())} packages differ from the corpus' pins "
                f"({'; '.join(drift[:4])}{', …' if len(drift) > 4 else ''}): the text differs a "
                "little from the one behind the shipped results, which stay valid"
            )
        artefact = store.write(
            "tokens", identity, spec, parents, lambda f: _fill(f, data, tokenizer)
        )
    return artefact


def _fill(folder: Path, data: DataSpec, tokenizer) -> dict:
    if data.path == "docstrings":
        documents: Iterable[str] = docstrings()
    else:
        documents = dict.fromkeys(t for t in _rows(data, _local_files(data.path)) if t.strip())
    by_split: dict[str, list[str]] = {split: [] for split in SPLITS}
    for document in documents:
        by_split[split_of(document)].append(document)
    if not any(by_split.values()):
        raise SpecError(f"data.path: {data.path} holds no text; expected at least one document")
    tensors, total = {}, sum(map(len, by_split.values()))
    with tqdm(total=total, desc="tokenising", unit=" documents") as progress:
        for split, texts in by_split.items():
            chunks = []
            for start in range(0, len(texts), DOCUMENTS_PER_CHUNK):
                chunk = texts[start : start + DOCUMENTS_PER_CHUNK]
                chunks += pack(chunk, tokenizer, data.context_length)
                progress.update(len(chunk))
            empty = torch.empty((0, data.context_length), dtype=torch.int32)
            tensors[split] = torch.cat([empty, *chunks])
    save_file(tensors, folder / "tokens.safetensors")
    return {
        "documents": {split: len(texts) for split, texts in by_split.items()},
        "characters": {split: sum(map(len, texts)) for split, texts in by_split.items()},
        "tokens": {split: tensor.numel() for split, tensor in tensors.items()},
    }
