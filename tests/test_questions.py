"""Questions about docstrings: three styles by hand, nothing invented, and the docstring's split."""

import pytest

from mlsae_book import corpus
from mlsae_book.questions import parameters, questions, summary
from mlsae_core import store, text
from mlsae_core.spec import DataSpec

GOOGLE = """pad(values, width)

Fill a row with blanks. It is copied.

Args:
    values (list of str): what to fill.
        More than one line.
    width (int, optional): the length
        of the row. Default: 8.
    *others: ignored

Returns:
    list: the row
"""
NUMPY = """Mean of a row.

Parameters
----------
row : array_like
    The row. Any numbers.
axis : int

Returns
-------
float
"""
SPHINX = """Open a folder.

:param path: where it lies,
    from here
:param str mode: how
:return: a handle
"""


@pytest.mark.parametrize(
    ("docstring", "does", "found"),
    [
        (
            GOOGLE,
            "Fill a row with blanks.",
            {"values": "what to fill.", "width": "the length of the row.", "others": "ignored"},
        ),
        (NUMPY, "Mean of a row.", {"row": "The row.", "axis": ""}),
        (SPHINX, "Open a folder.", {"path": "where it lies, from here", "mode": "how"}),
        ("Nothing is said here.", "Nothing is said here.", {}),
        ("---", "", {}),
    ],
)
def test_summary_and_parameters_by_hand(docstring, does, found):
    assert summary(docstring) == does
    assert parameters(docstring) == found
    assert list(parameters(docstring)) == list(found)


def test_questions_by_hand():
    assert questions(NUMPY) == [
        "Q: What does a function of row, axis do?\nA: Mean of a row.",
        "Q: Mean of a row. Which parameters does it have?\nA: row, axis.",
        "Q: Mean of a row. What is row?\nA: The row.",
    ]
    assert len(questions(GOOGLE)) == 4  # two of three parameters are asked for
    assert questions("Nothing is said here.") == []
    assert questions(GOOGLE.replace("Fill a row with blanks.", "x.")) == []


def test_a_question_is_in_the_split_of_its_docstring(data, monkeypatch):
    (data / "docstrings.yml").write_text("minimum_characters: 32\npackages: {none: 1.0}\n")
    tasks = [f"Task {i} of the list.\n\n:param a{i}: number {i}" for i in range(60)]
    shared = [f"Shared by several.\n\n:param x: the same\n\nNote {i}." for i in range(40)]
    monkeypatch.setattr(corpus, "docstrings", lambda: tasks + shared)
    spec = DataSpec(corpus.QUESTIONS)
    found = {question: split for split, question in text.split_documents(spec)}
    for i, docstring in enumerate(tasks):
        assert found[f"Q: What does a function of a{i} do?\nA: Task {i} of the list."] == (
            text.split_of(docstring)
        )
    assert set(found.values()) == set(text.SPLITS)
    assert {text.split_of(d) for d in shared} >= {"train", "test"}
    assert found["Q: Shared by several. What is x?\nA: the same"] == "train"
    assert list(found) == text.documents(spec)
    assert len(found) == 3 * 60 + 3
    assert not text.is_streamed(spec)
    assert text.data_key(spec) != text.data_key(DataSpec())


def test_other_text_keeps_its_split(data):
    (store.DATA / "a.txt").write_text("one\n\ntwo\n\nthree\n")
    pairs = list(text.split_documents(DataSpec(str(store.DATA / "a.txt"))))
    assert pairs == [(text.split_of(d), d) for d in ("one", "two", "three")]
