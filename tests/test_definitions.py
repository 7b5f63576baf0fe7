"""The chapter on definitions: what its table names exists; the demonstrations keep their word."""

import ast
import importlib
from pathlib import Path

import pandas as pd
import pytest
from test_charts import assert_drawn, chosen

from mlsae_book.charts import definitions as charts
from mlsae_book.tables import definitions

ROOT = Path(__file__).parents[1]
TABLE = pd.read_csv(ROOT / "book" / "definitions.csv")


@pytest.mark.parametrize("name", TABLE.function.unique())
def test_every_function_exists(name):
    module, _, attributes = name.partition(".")
    found = importlib.import_module(f"mlsae_core.{module}")
    for attribute in attributes.split("."):
        found = getattr(found, attribute)
    assert callable(found)
    assert found.__doc__


@pytest.mark.parametrize("name", TABLE.test)
def test_every_test_exists(name):
    file, _, function = name.partition("::")
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_the_table_is_complete():
    assert TABLE.notna().all().all()
    assert not TABLE.quantity.duplicated().any()
    assert set(TABLE.section) == {1, 2, 3, 4, 5, 6, 7, 8}


def test_the_differences_have_the_signs_that_the_chapter_says():
    table = definitions.differences().set_index("quantity")
    ours, theirs = table.ours, table.released
    assert list(table.loc["Dead counter: training tokens (ours), steps (released)"][:2]) == [
        3000,
        8,
    ]
    assert table.factor["MSE, one token in ten special"] == pytest.approx(0.9, abs=0.03)
    assert ours["Tuned lens: error of the round trip"] == 0  # in float64, below 1e-9
    assert definitions.shown(table.reset_index())["ours"].iloc[3] == "3000"
    assert theirs["Tuned lens: error of the round trip"] > 0.5
    assert table.factor["KL, 256 positions: mean (ours), sum (released)"] == pytest.approx(
        256 * table.factor["KL, direction alone"], rel=1e-5
    )
    assert ours["Sum over layers of P(layer | latent)"] == pytest.approx(1)
    assert theirs["Sum over layers of P(layer | latent)"] < 0.2
    assert theirs["MMCS of Gaussian rows"] < ours["MMCS of Gaussian rows"]
    assert (
        ours["FVU, per-dimension (ours beside) and global (released)"]
        > theirs["FVU, per-dimension (ours beside) and global (released)"]
    )
    assert definitions.WORLD.persistence == pytest.approx(ours["Eq. 12"], abs=0.03)


def test_the_lens_tells_which_translator_it_takes():
    table = definitions.alignment(3)
    assert table["aligned"].tolist() == [1, 2, -1]
    assert table["as-released"].tolist() == [0, 1, 2]


def test_both_definitions_are_drawn_under_their_names():
    table = pd.DataFrame({"quantity": ["a"] * 4 + ["b"] * 2, "setting": ["s"] * 4 + ["t"] * 2})
    table = table.assign(x=[0, 1, 0, 1, 5, 5], value=[1.0, 2, 3, 4, 5, 6])
    table["series"] = ["ours", "ours", "released", "released", "ours", "released"]
    for quantity, rows in table.groupby("quantity"):
        spec = chosen(charts.differences(table, "t").to_dict(), quantity=quantity)
        shown = {"series": rows.series, "x": rows.x, "Value (unit of the quantity)": rows.value}
        assert_drawn(spec, "point", **shown)
        assert_drawn(spec, "text mark", setting=rows.setting.unique())
