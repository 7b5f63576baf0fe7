"""The text `docstring-questions`: questions and answers about the embedded corpus."""

from __future__ import annotations

from pathlib import Path

from mlsae_book import questions
from mlsae_core import store, text

QUESTIONS = "docstring-questions"  # its path in a spec


def _documents() -> dict[str, str]:
    """Question → split, in the order of their hashes: no answer stands beside its docstring's next.

    One that several docstrings give goes to train, so that test has none that was trained on.
    """
    found: dict[str, str] = {}
    for docstring in text.docstrings():
        split = text.split_of(docstring)
        for question in questions.questions(docstring):
            if split == "train" or question not in found:
                found[question] = split
    return dict(sorted(found.items(), key=lambda pair: text.document_hash(pair[0])))


def _identity() -> dict:
    return {QUESTIONS: text.corpus(), "code": store.source_hash(Path(questions.__file__))}


text.SOURCES[QUESTIONS] = text.Source(_documents, _identity)
