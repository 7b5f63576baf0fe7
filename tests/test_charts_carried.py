"""Points beside their null models: what is drawn is the table, and the reader's choice."""

import pandas as pd
import pytest
import vl_convert
from test_charts import assert_drawn, chosen

from mlsae_book.charts import carried

TABLE = pd.DataFrame(
    {
        "case": ["a", "a", "b", "b"],
        "layer": [0, 1, 0, 1],
        "of": ["measured", "null", "measured", "null"],
        "rate": [0.1, 0.2, 0.3, 0.4],
        "low": [0.0, 0.1, 0.2, 0.3],
        "high": [0.2, 0.3, 0.4, 0.5],
    }
)


def made(**options):
    return carried.beside(TABLE, ("layer", "Layer"), ("rate", "Rate"), "of", "Title", **options)


def test_points_and_intervals_are_those_of_the_choice():
    spec = made(choices={"case": "Run"}).to_dict()
    [param] = spec["params"]
    assert param["bind"]["options"] == ["a", "b"]
    for case in "ab":
        rows = TABLE[TABLE.case == case]
        view = chosen(spec, chosen_case=case)
        assert_drawn(view, "point", layer=rows.layer, Rate=rows.rate, of=rows.of)


def test_without_a_choice_all_are_drawn_and_the_chart_is_valid():
    spec = made().to_dict()
    assert "params" not in spec
    assert "<svg" in vl_convert.vegalite_to_svg(spec)


def test_a_table_without_intervals_is_refused():
    with pytest.raises(ValueError, match="lacks the column low"):
        carried.beside(
            TABLE.drop(columns="low"), ("layer", "Layer"), ("rate", "Rate"), "of", "Title"
        )
