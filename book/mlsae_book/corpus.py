"""The texts `docstrings`, the embedded corpus, and `docstring-questions`, questions about it.

They are `text.SOURCES` as soon as this module is imported, which `mlsae_core` does where a spec
names one of them: pyproject.toml declares them.
"""

from __future__ import annotations

import ast
import collections
import functools
import gc
import importlib.metadata
import inspect
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
from tqdm.auto import tqdm

from mlsae_book import questions
from mlsae_core import store, text
from mlsae_core.spec import SpecError, read_yaml

DOCSTRINGS, QUESTIONS = "docstrings", "docstring-questions"  # their paths in a spec
DOCUMENTS = "documents"  # the stage of texts that are extracted once
store.STAGES[DOCUMENTS] = 1


def pins() -> dict[str, str]:
    """Distribution → release of the packages whose docstrings are the embedded corpus."""
    return {name: str(pin) for name, pin in definition()["packages"].items()}


def definition() -> dict:
    """What identifies the embedded corpus: its pins, and the least length of a document."""
    return read_yaml(store.DATA / "docstrings.yml", typed=True)


def drift() -> list[str]:
    """Installed releases that differ from the corpus' pins, as `name pinned → installed`."""
    pinned = pins().items()
    return [f"{name} {pin} → {_installed(name)}" for name, pin in pinned if _installed(name) != pin]


def _warn_of_drift(characters: dict[str, int]):
    """Say which packages differ from the pins, and how much of the text comes from them."""
    if found := drift():
        share = sum(characters.get(line.split()[0], 0) for line in found)
        share /= max(sum(characters.values()), 1)
        print(
            f"note: {len(found)} of the {len(pins())} packages of the corpus, which hold "
            f"{share:.0%} of its text, differ from its pins ({'; '.join(found[:4])}"
            f"{'; …' if len(found) > 4 else ''}): new results come from slightly other text than "
            "the shipped ones, which stay valid, and have keys of their own",
            file=sys.stderr,
        )


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


def _docstrings_of(paths: list[Path]) -> list[list[str]]:
    gc.disable()  # syntax trees are large and acyclic: a third of the time otherwise
    try:
        return [file_docstrings(path) for path in paths]
    finally:
        gc.enable()


def docstrings() -> list[str]:
    """The embedded corpus in the order of its documents' hashes; extracted once per machine."""
    installed = {name: _installed(name) for name in pins()}
    spec = {"corpus": definition(), "installed": installed}
    identity = store.key(DOCUMENTS, spec, {})
    artefact = store.find(DOCUMENTS, identity)
    if artefact is None:

        def fill(folder: Path) -> dict:
            texts, characters = extract()
            frame = pd.DataFrame({"text": texts})
            frame.to_parquet(folder / "documents.parquet", compression="zstd", index=False)
            return {"documents": len(texts), "characters_per_package": characters}

        artefact = store.write(DOCUMENTS, identity, spec, {}, fill)
    _warn_of_drift(artefact.meta["characters_per_package"])
    return pd.read_parquet(artefact.file("documents.parquet"))["text"].tolist()


@functools.cache
def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _source_files(package: str) -> list[Path]:
    """A distribution's Python files, without its tests."""
    try:
        listed = importlib.metadata.distribution(package).files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    inside = [f for f in listed if f.suffix == ".py" and not {"..", "tests", "test"} & set(f.parts)]
    return [path for path in (Path(str(file.locate())) for file in inside) if path.is_file()]


def extract() -> tuple[list[str], dict[str, int]]:
    """Distinct docstrings of the pinned packages in the order of their hashes.

    Returns:
        The documents, and characters per package (a text that several have counts for the first).
    """
    files = [(package, path) for package in pins() for path in _source_files(package)]
    if not files:
        raise SpecError(
            "data.path: expected the packages of data/docstrings.yml, none is installed; install "
            "the project's requirements, or name a file or a hub data set"
        )
    batches = [[path for _, path in files[start::64]] for start in range(64)]
    with ProcessPoolExecutor(os.cpu_count() or 1) as pool:
        read = pool.map(_docstrings_of, batches)
        found = list(tqdm(read, "reading docstrings", len(batches)))
    least, owner = definition()["minimum_characters"], {}
    for number, (package, _) in enumerate(files):
        batch, position = number % 64, number // 64
        for document in found[batch][position]:
            if len(document) >= least:
                owner.setdefault(document, package)
    characters: collections.Counter[str] = collections.Counter()
    for document, package in owner.items():
        characters[package] += len(document)
    return sorted(owner, key=text.document_hash), dict(characters)


# --- as texts of a spec ---------------------------------------------------------------------------


def _documents() -> dict[str, str]:
    return {docstring: text.split_of(docstring) for docstring in docstrings()}


def _questions() -> dict[str, str]:
    """Question → split, in the order of their hashes: no answer stands beside its docstring's next.

    One that several docstrings give goes to train, so that test has none that was trained on.
    """
    found: dict[str, str] = {}
    for docstring, split in _documents().items():
        for question in questions.questions(docstring):
            if split == "train" or question not in found:
                found[question] = split
    return dict(sorted(found.items(), key=lambda pair: text.document_hash(pair[0])))


def _questions_identity() -> dict:
    return {QUESTIONS: definition(), "code": store.source_hash(Path(questions.__file__))}


text.SOURCES[DOCSTRINGS] = text.Source(_documents, lambda: {DOCSTRINGS: definition()}, drift)
text.SOURCES[QUESTIONS] = text.Source(_questions, _questions_identity, drift)
