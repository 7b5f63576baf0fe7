"""No page shows a column's name where it can say a word: tables, axes, legends, tooltips."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from mlsae_book import charts
from mlsae_book.charts import names

CHAPTERS = sorted((Path(__file__).parents[1] / "book").glob("*.ipynb"))
RAW = re.compile(r"\b[a-z0-9]+(?:_[a-z0-9]+)+\b")
#: What looks like a column's name and is none, with the reason.
NONE = {
    "mlsae_core": "a package, as one imports it",
    "dictionary_learning": "a package, as one imports it",
    "array_like": "a word of the prompt `x : array_like, optional`",
}
#: The table of definitions points into the code: functions, tests, and variables of released code.
CODE = "definitions"
#: Channels whose field has a title that a reader sees.
TITLED = {"x", "y", "color", "shape", "size", "strokeDash", "tooltip", "column", "row"}


class Cells(HTMLParser):
    """Texts of the cells of a table, each with its tag."""

    def __init__(self, html):
        super().__init__()
        self.found, self.tag = [], None
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        if tag in ("th", "td"):
            self.tag = tag
            self.found.append([tag, ""])

    def handle_endtag(self, tag):
        if tag == self.tag:
            self.tag = None

    def handle_data(self, data):
        if self.tag:
            self.found[-1][1] += data


def seen(spec):
    """Titles of axes, legends and tooltips of a chart, and the fields whose values stand there."""
    titles, fields = [], set()
    for part in parts(spec):
        for channel, one in part.get("encoding", {}).items():
            for field in one if isinstance(one, list) else [one]:
                key = {"x": "axis", "y": "axis", "tooltip": "title"}.get(channel, "legend")
                if channel not in TITLED or "field" not in field or field.get(key, 0) is None:
                    continue
                fields.add(field["field"])
                titles.append(field.get("title", field["field"]))
    return [title for title in titles if title], fields


def parts(spec):
    """A chart and all views within it."""
    yield spec
    for kind in ("layer", "vconcat", "hconcat"):
        for part in spec.get(kind, []):
            yield from parts(part)


def words(output):
    """What a reader sees of one output's tables and charts."""
    html = "".join(output.get("data", {}).get("text/html", ""))
    if 'class="dataframe"' in html:
        yield from Cells(html).found
    spec = output.get("data", {}).get(charts.MIME)
    if spec:
        titles, fields = seen(spec)
        rows = [row for table in spec.get("datasets", {}).values() for row in table]
        yield from (("title", title) for title in titles)
        yield from {("value", str(row[f])) for row in rows for f in fields if f in row}


def raw(notebook, chapter=""):
    """Names of columns that a page shows."""
    found = set()
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for kind, text in words(output):
                if not (kind == "td" and chapter == CODE):
                    found |= set(RAW.findall(text))
    return found - set(NONE)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_no_page_shows_the_name_of_a_column(path):
    assert not raw(json.loads(path.read_text(encoding="utf-8")), path.stem)


def notebook(**data):
    return {"cells": [{"outputs": [{"data": data}]}]}


def test_a_name_in_a_table_is_found():
    table = pd.DataFrame({"delta_ce": [1], "of": "fvu_global"}).rename_axis("best_at_own")
    html = table.set_index("of", append=True).to_html()
    assert raw(notebook(**{"text/html": [html]})) == {"delta_ce", "fvu_global", "best_at_own"}


def test_a_name_in_a_chart_is_found_in_its_titles_and_among_its_values():
    tip = {"field": "per_second", "type": "quantitative"}
    color = {"field": "metric", "title": "Metric"}
    hidden = {"field": "not_shown", "axis": None}
    view = {"encoding": {"x": hidden, "color": color, "tooltip": [tip]}}
    spec = {"vconcat": [view], "datasets": {"a": [{"metric": "delta_ce", "not_shown": "no_text"}]}}
    assert raw(notebook(**{charts.MIME: spec})) == {"per_second", "delta_ce"}
    shown = names.explained(spec)
    assert raw(notebook(**{charts.MIME: shown})) == {"delta_ce"}
    assert shown["datasets"] == spec["datasets"]


def test_a_table_keeps_its_columns_and_shows_words():
    keys = pd.MultiIndex.from_tuples([("fvu_global", "seed"), ("kl", "none")], names=["l1", "of"])
    table = pd.DataFrame({"delta_ce": [0.5, float("nan")], "tokens": [12_345, 9_999]}, index=keys)
    before = table.copy()
    shown = names.named(table)
    assert list(shown) == ["delta CE", "tokens"]
    assert shown.index.names == ["L1", "of"]
    assert list(shown.index) == [("global FVU", "seed"), ("KL", "none")]
    pd.testing.assert_frame_equal(table, before)
    cells = [text for _, text in Cells(names.html(table)).found]
    assert {"0.5", "–", "12,345", "9999"} <= set(cells)


def test_no_cell_is_cut_and_what_is_no_number_stays():
    table = pd.DataFrame({"a": ["x" * 200, 20_000, None], "b": [True, False, False]})
    cells = [text for _, text in Cells(names.html(table)).found]
    assert {"x" * 200, "20,000", "–", "True", "False"} <= set(cells)


def test_large_whole_numbers_among_floats_have_no_decimals():
    table = pd.DataFrame({"a": [163_584.0, float("nan"), 416.0], "b": [1.0, 2.0, 3.0]})
    cells = [text for tag, text in Cells(names.html(table)).found if tag == "td"]
    assert cells == ["163,584", "1.0", "–", "2.0", "416", "3.0"]


def test_every_name_for_people_is_another_and_free_of_underscores():
    assert not [name for name, word in names.NAMES.items() if name == word or "_" in word]
