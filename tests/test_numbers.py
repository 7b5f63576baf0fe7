"""Numbers in a chapter's prose stand in its stored outputs, so that no text is left behind by them.

What prose says of two outputs together, or takes from elsewhere, is listed in `numbers.csv` with
what it is; such a line goes when the number does. Only decimals and percentages are looked at:
small whole numbers are found anywhere.
"""

import bisect
import csv
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHAPTERS = sorted(ROOT.glob("book/*.ipynb"))
NUMBER = re.compile(r"(?<![\w.{/])[−-]?\d[\d,]*\.\d+(?![\w}]|\.\d)|(?<![\w.])\d+(?:\.\d+)?(?= ?%)")
#: Formulas, code, links with what they lead to, sections of papers.
NO_PROSE = re.compile(
    r"\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\{[a-z:]+\}`[^`]*`|https?:\S+|Section [\d.]+", re.S
)
#: A chart with more numbers than this says nothing: any short number is among them.
MOST = 1500


def said(notebook):
    """Numbers of the prose: text, value, and half of the last digit; percentages as fractions."""
    for cell in notebook["cells"]:
        if cell["cell_type"] != "markdown":
            continue
        text = NO_PROSE.sub(" ", "".join(cell["source"]))
        for match in NUMBER.finditer(text):
            plain = match.group().replace(",", "").replace("−", "-")
            half = 0.51 * 10.0 ** -len(plain.partition(".")[2])
            percent = text[match.end() : match.end() + 2].strip().startswith("%")
            yield plain + "%" * percent, float(plain), half, percent


def numbers_of(value):
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [n for v in value for n in numbers_of(v)]
    if isinstance(value, str):
        return [float(n) for n in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", value)]
    return [float(value)] if isinstance(value, int | float) else []


def shown(notebook):
    """All numbers of tables and of charts that are not too large, sorted."""
    found = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            for kind, value in output.get("data", {}).items():
                if "vega" in kind:
                    numbers = numbers_of(value.get("datasets", value))
                    found += numbers if len(numbers) < MOST else []
                elif kind.startswith("text/"):
                    found += numbers_of("".join(value))
            found += numbers_of("".join(output.get("text", "")))
    return sorted(found)


def missing(notebook):
    """Numbers of the prose, as they stand there, that no output rounds to."""
    found = shown(notebook)

    def there(value, half):
        place = bisect.bisect_left(found, value - half)
        return place < len(found) and found[place] <= value + half

    for text, value, half, percent in said(notebook):
        if not (
            there(value, half)
            or there(-value, half)
            or (percent and there(value / 100, half / 100))
        ):
            yield text


def listed(chapter):
    with (Path(__file__).parent / "numbers.csv").open(encoding="utf-8") as file:
        return {row["number"] for row in csv.DictReader(file) if row["chapter"] == chapter}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_number_in_prose_stands_in_the_outputs_or_is_listed(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert set(missing(notebook)) == listed(path.stem)


def test_a_recomputed_number_leaves_its_sentence_behind():
    def notebook(value):
        output = {"data": {"text/html": [f"<td>{value}</td>"]}}
        cells = [
            {"cell_type": "markdown", "source": ["It is 0.62, −1.5 or 41 % (see `0.99`, $0.98$)."]},
            {"cell_type": "code", "source": [], "outputs": [output, {"text": ["-1.52 0.4096"]}]},
        ]
        return {"cells": cells}

    assert list(missing(notebook(0.6249))) == []
    assert list(missing(notebook(0.63))) == ["0.62"]
    chart = {"data": {"application/vnd.vegalite.v5+json": {"datasets": {"a": [{"y": 0.62}]}}}}
    book = notebook(0)
    book["cells"][1]["outputs"].append(chart)
    assert list(missing(book)) == []
    chart["data"]["application/vnd.vegalite.v5+json"]["datasets"]["a"] *= MOST
    assert list(missing(book)) == ["0.62"]
