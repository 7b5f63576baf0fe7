"""Documents in files: tables, JSON, plain text, whole and within limits."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow
import pyarrow.parquet

from mlsae_core.spec import SpecError

FORMATS = (".jsonl", ".json", ".txt", ".parquet")
"""All but the last also with .zst."""

MAX_CHARACTERS = 2**23
"""Of a document; its tokenising takes about 1.4 GB."""

MAX_LIST = 2**28
"""Characters of a .json file that is one list."""


def format_of(path: Path) -> str | None:
    """The ending that says what a file is; nothing for others."""
    suffix = Path(path.name.lower().removesuffix(".zst")).suffix
    return suffix if suffix in FORMATS else None


def file_documents(path: Path, column: str) -> Iterator[str]:
    """Documents of one file: rows of a table, JSON objects, or paragraphs of a plain text.

    Raises:
        SpecError: a file that is cut, cannot be read or has no such column, or a document longer
            than `MAX_CHARACTERS`.
    """
    try:
        if format_of(path) == ".parquet":
            yield from _parquet(path, column)
            return
        with _opened(path) as file:
            if format_of(path) == ".txt":
                yield from _paragraphs(file)
            else:
                for row in _json_rows(file):
                    yield document(row, column)
    except SpecError:
        raise
    except (OSError, ValueError, RecursionError, EOFError) as error:
        raise SpecError(f"data.path: cannot read {path}: {reason(error)}") from error


def _opened(path: Path) -> io.TextIOBase:
    """A text file, or one compressed as .zst; the latter's end is the end of its last frame."""
    if path.suffix.lower() != ".zst":
        return open(path, encoding="utf-8-sig")
    return io.TextIOWrapper(pyarrow.input_stream(path, compression="zstd"), encoding="utf-8-sig")


def _parquet(path: Path, column: str) -> Iterator[str]:
    with pyarrow.parquet.ParquetFile(path) as table:
        names = table.schema_arrow.names
        if column not in names:
            document(dict.fromkeys(names), column)
        for batch in table.iter_batches(1024, columns=[column]):
            for value in batch.column(0).to_pylist():
                yield document({column: value}, column)


def _lines(file: io.TextIOBase) -> Iterator[str]:
    """Lines, of which none asks for more memory than a document may."""
    while line := file.readline(MAX_CHARACTERS + 1):
        _check_length(len(line))
        yield line


def _check_length(characters: int):
    if characters > MAX_CHARACTERS:
        raise ValueError(
            f"expected lines and documents of at most {MAX_CHARACTERS:,} characters, got a longer "
            "one; split it"
        )


def _paragraphs(file: io.TextIOBase) -> Iterator[str]:
    for blank, lines in itertools.groupby(_lines(file), lambda line: not line.strip()):
        paragraph, characters = [], 0
        for line in lines:
            if not blank:
                paragraph.append(line)
                characters += len(line)
                _check_length(characters)
        if not blank:
            yield "".join(paragraph).rstrip("\n")


def _json_rows(file: io.TextIOBase) -> Iterator:
    """Rows of a JSON file: one list of objects, or one object per line."""
    start = ""
    while not start.strip():
        if not (start := file.readline(MAX_CHARACTERS + 1)):
            return
    if start.lstrip().startswith("["):
        content = start + file.read(MAX_LIST)
        if file.read(1):
            raise ValueError(
                f"expected a list of at most {MAX_LIST:,} characters, got a longer one; write one "
                "object per line"
            )
        yield from json.loads(content)
        return
    _check_length(len(start))
    for line in itertools.chain([start], _lines(file)):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{error}, in {line.strip()[:40]!r}; expected a list of objects or one object "
                    "per line"
                ) from None


def document(row, column: str) -> str:
    """A row's document; nothing is an empty one."""
    if not isinstance(row, dict):
        raise SpecError(f"data.path: expected objects with a text column, got {str(row)[:40]!r}")
    if column not in row:
        raise SpecError(
            f"data.text_column: expected one of {', '.join(map(str, row))}, got {column}"
        )
    value = row[column]
    if value is not None and not isinstance(value, str):
        raise SpecError(f"data.text_column: expected text in {column}, got {str(value)[:40]!r}")
    _check_length(len(value or ""))
    return value or ""


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
