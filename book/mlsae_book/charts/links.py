"""Tables of words, which wrap: cells that lead to other pages of the book, and names of code."""

from __future__ import annotations

import pandas as pd
from IPython.display import Markdown


def linked(table: pd.DataFrame, column: str, titles: dict[str, str] | None = None) -> Markdown:
    """A table as Markdown, in which one column's names become links to the pages of that name.

    The link goes to the notebook: JupyterLab opens it, and the book makes its page of it and fails
    where there is none.

    Args:
        table: its columns become the head, their cells plain text.
        column: names of pages, without suffix. titles: what a page's link says; the page's name
            without it.
    """
    if column not in table:
        raise ValueError(f"linked: expected a column {column!r}, got {', '.join(table.columns)}")
    names = titles or {}
    links = table[column].map(lambda name: f"[{_plain(names.get(name, name))}]({name}.ipynb)")
    return _markdown(table, column, links)


def coded(table: pd.DataFrame, column: str) -> Markdown:
    """A table as Markdown, in which one column holds names of code, without blanks or backticks."""
    return _markdown(table, column, "`" + table[column] + "`")


def _markdown(table: pd.DataFrame, column: str, marked: pd.Series) -> Markdown:
    """A table of plain text, but for a column that is marked up already."""
    cells = table.astype(str).map(_plain).assign(**{column: marked})
    lines = [table.columns, ["---"] * len(table.columns), *cells.itertuples(index=False)]
    return Markdown("\n".join("| " + " | ".join(line) + " |" for line in lines))


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing to mark up, in a cell of a table."""
    return "".join(f"\\{c}" if c in r"\`*_{}[]<>$|#~" else c for c in " ".join(text.split()))
