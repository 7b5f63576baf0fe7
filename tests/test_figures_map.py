"""The map of the figures: complete, no cell empty, every page in the book."""

from pathlib import Path

import jupytext
import pandas as pd
import pytest
from sphinx_external_toc.parsing import parse_toc_yaml

from mlsae_book.charts import links

ROOT = Path(__file__).parents[1]
TABLE = pd.read_csv(ROOT / "book/figures.csv")


def numbers(paper):
    return TABLE.loc[TABLE["paper"] == paper, "number"].tolist()


def test_no_figure_or_table_of_the_paper_is_missing():
    wanted = [f"Figure {n}" for n in range(1, 42)] + ["Table 1", "Table 2"]
    assert sorted(numbers("MLSAE")) == sorted(wanted)
    shown = (11, 13, 14, 16, 19, 20, 21, 22, 23)
    assert numbers("Gemma Scope") == [f"Figure {n}" for n in shown]


def test_every_row_says_where_and_in_what_it_differs():
    assert list(TABLE.columns) == ["paper", "number", "shows", "page", "differs"]
    assert TABLE.notna().all(axis=None)
    assert TABLE.map(str.strip).ne("").all(axis=None)


@pytest.mark.parametrize("page", sorted(TABLE["page"].unique()))
def test_every_page_is_in_the_book(page):
    assert page in parse_toc_yaml(ROOT / "_toc.yml")
    assert (ROOT / f"book/{page}.ipynb").is_file()


def test_the_page_shows_every_row():
    cells = jupytext.read(ROOT / "book/figures.ipynb").cells
    shown = "".join(str(o.get("data", "")) for cell in cells for o in cell.get("outputs", []))
    for row in TABLE.itertuples():
        assert f"| {row.number} |" in shown, row.number
        assert f"({row.page}.ipynb)" in shown, row.page


def test_names_of_code_are_set_as_such_and_text_stays_text():
    table = pd.DataFrame({"what": ["a_b|c"], "test": ["test_x::test_y"]})
    assert links.coded(table, "test").data.splitlines() == [
        "| what | test |",
        "| --- | --- |",
        r"| a\_b\|c | `test_x::test_y` |",
    ]


def test_links_lead_to_notebooks_and_text_stays_text():
    table = pd.DataFrame({"what": ["a | b", "<b>[x](y)*"], "page": ["drift", "mmcs"]})
    text = links.linked(table, "page", {"mmcs": "MMCS_1"}).data
    assert text.splitlines()[0] == "| what | page |"
    assert "| a \\| b | [drift](drift.ipynb) |" in text
    assert "| \\<b\\>\\[x\\](y)\\* | [MMCS\\_1](mmcs.ipynb) |" in text
    with pytest.raises(ValueError, match="expected a column 'where', got what, page"):
        links.linked(table, "where")
