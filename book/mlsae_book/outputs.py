"""Outputs of notebooks as a page shows them: tables that wrap, and provenance folded away."""

from __future__ import annotations

import re

from docutils import nodes

MADE = "How this page was made"
CELL = re.compile(r"<(t[dh])>([^<>]*)</t[dh]>")
NUMBER = re.compile(r"[-−+±×–—.,:%()\[\]\s\deE]*|NaN|None|nan|inf|True|False")
LONG = re.compile(r"\S{16,}")


def wrapping(table: str) -> str:
    """HTML of a data frame whose words wrap and whose numbers do not.

    Cells of words get the class ``words``; long names of code may break after their punctuation.

    >>> wrapping("<td>0.25</td><td>an adjective</td>")
    '<td>0.25</td><td class="words">an adjective</td>'
    """

    def cell(found: re.Match) -> str:
        tag, text = found.groups()
        if NUMBER.fullmatch(text):
            return found[0]
        text = LONG.sub(lambda name: re.sub(r"(::|[_./])(?=\w)", r"\1<wbr>", name[0]), text)
        return f'<{tag} class="words">{text}</{tag}>'

    return CELL.sub(cell, table)


def prepare(app, doctree: nodes.document):
    """Let the tables of a page wrap, and fold what stands under the heading `MADE`.

    There are keys, seconds and commits, which few look up.
    """
    for node in doctree.findall(nodes.raw):
        if 'class="dataframe"' in node.astext():
            node.children = [nodes.Text(wrapping(node.astext()))]
    for section in doctree.findall(nodes.section):
        cells = [node for node in section.children if "cell" in node.get("classes", ())]
        if section[0].astext() == MADE and cells:
            start = '<details class="made"><summary>Keys, seconds and commits</summary>'
            section.insert(section.index(cells[0]), nodes.raw("", start, format="html"))
            section.insert(section.index(cells[-1]) + 1, nodes.raw("", "</details>", format="html"))


def setup(app) -> dict:
    """Called by Sphinx, which finds this module in ``sphinx.extra_extensions`` of _config.yml."""
    app.connect("doctree-read", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
