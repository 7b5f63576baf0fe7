"""The text `wikipedia`: prose for language models that have read more than documentation.

It is fetched (`mlsae_book.fetch`), not shipped. A document is a section of an article, without
tables, references, notes and whatever is no sentence.
"""

from __future__ import annotations

import bz2
import hashlib
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from mlsae_book.corpus import DOCUMENTS
from mlsae_core import store, text
from mlsae_core.spec import SpecError, canonical, read_yaml

WIKIPEDIA = "wikipedia"  # its path in a spec
PARAGRAPH = 120  # characters that a paragraph has at least: captions and lists have fewer
_LISTS = re.compile("references|notes|reading|links|see also|bibliography|sources|citations", re.I)
_TAGS = ("ref", "table", "gallery", "math", "timeline")


def origin() -> dict:
    """Where the text comes from, and the hash of its documents, which identifies it."""
    return read_yaml(store.DATA / "texts" / WIKIPEDIA / "origin.yml", typed=True)


def find() -> store.Artefact | None:
    """The documents, where they were fetched to this machine."""
    return store.find(DOCUMENTS, store.key(DOCUMENTS, _identity(), {}))


def make(dump: Path) -> store.Artefact:
    """Store the documents of a dump of Wikipedia.

    Raises:
        SpecError: they are not those of the origin: the parser is of another release, perhaps.
    """
    found = sorted(set(documents(dump)), key=text.document_hash)
    digest = hashlib.sha256(canonical(found).encode()).hexdigest()
    if digest != (expected := origin()["documents_sha256"]):
        raise SpecError(
            f"wikipedia: expected documents with SHA-256 {expected}, got {digest}; is the package "
            "mwparserfromhell of the release that constraints.txt pins?"
        )

    def fill(folder: Path) -> dict:
        frame = pd.DataFrame({"text": found})
        frame.to_parquet(folder / "documents.parquet", compression="zstd", index=False)
        return {"documents": len(found)}

    identity = store.key(DOCUMENTS, _identity(), {})
    return store.write(DOCUMENTS, identity, _identity(), {}, fill)


def documents(dump: Path) -> Iterator[str]:
    """Prose of each section of each article of a dump, redirects left out."""
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.endswith("}page"):
                wikitext = element.findtext("{*}revision/{*}text") or ""
                if not wikitext.lower().startswith("#redirect"):
                    yield from _sections(wikitext)
                element.clear()


def _sections(wikitext: str) -> Iterator[str]:
    import mwparserfromhell

    article = mwparserfromhell.parse(wikitext)
    for section in article.get_sections(levels=[2], include_lead=True):
        heading = next(iter(section.filter_headings()), None)
        if heading is not None and _LISTS.search(str(heading.title)):
            continue
        for tag in section.filter_tags(matches=lambda tag: str(tag.tag).lower() in _TAGS):
            if section.contains(tag):  # it may have stood in one that is gone
                section.remove(tag)
        lines = (" ".join(line.split()) for line in section.strip_code().split("\n"))
        if paragraphs := [line for line in lines if _is_prose(line)]:
            yield "\n\n".join(paragraphs)


def _is_prose(line: str) -> bool:
    markup = "|" in line or "http" in line or re.match("(File|Image|Category|thumb)\\b", line)
    return len(line) >= PARAGRAPH and "." in line and not markup


def _identity() -> dict:
    return {WIKIPEDIA: origin()["documents_sha256"]}


def _documents() -> dict[str, str]:
    if (found := find()) is None:
        raise SpecError(
            f"data.path: the text {WIKIPEDIA} is not on this machine; `python -m mlsae_book fetch "
            f"{WIKIPEDIA}` gets it from the Python package index"
        )
    rows = pd.read_parquet(found.file("documents.parquet"))["text"]
    return {document: text.split_of(document) for document in rows}


text.SOURCES[WIKIPEDIA] = text.Source(_documents, _identity)
