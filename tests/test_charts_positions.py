"""The chart of metrics by position."""

import json

import numpy as np
import pandas as pd
import pytest
from test_charts import assert_drawn, drawn_marks
from test_charts import chosen as choose

from mlsae_book.charts import positions

LAYERS, PLACES = 12, ((0, 0), (1, 1), (2, 3), (4, 7))


def table():
    rows = [
        {
            "layer": layer,
            "first": first,
            "last": last,
            "massive": massive,
            "tokens": 10 * (last + 1),
        }
        for massive in ("kept", "excluded")
        for first, last in PLACES
        for layer in range(LAYERS)
        if massive == "kept" or first
    ]
    found = pd.DataFrame(rows)
    for number, name in enumerate(positions.MEASURES, 1):
        found[name] = number * (1 + found.layer + 100 * (found["first"] == 0))
    found.loc[found["first"] == 1, "share"] = np.nan
    return found


def spec():
    return json.loads(json.dumps(positions.by_position(table(), "A finding", "Read it").to_dict()))


def test_one_line_for_each_group_of_positions_at_the_chosen_metric():
    for massive in ("kept", "excluded"):
        for metric in positions.MEASURES:
            found = table()[table().massive == massive].dropna(subset=metric)
            marks = drawn_marks(choose(spec(), measure=metric, vectors=massive))
            assert marks["line"] == len(found[["first", "last"]].drop_duplicates())
            assert marks["symbol"] == len(found)
    kept = table()[table().massive == "kept"]
    names = ["0", "1", "2 to 3", "4 to 7"]
    places = np.repeat(names, LAYERS)
    assert_drawn(
        choose(spec(), measure="fvu"),
        "point",
        Position=places,
        Layer=kept.layer,
        value=kept.fvu,
        tokens=kept.tokens,
    )


def test_positions_stand_in_their_order_and_titles_in_words():
    text = json.dumps(spec())
    assert '["0", "1", "2 to 3", "4 to 7"]' in text
    assert "Mean L2 norm (activation units, log scale)" in text
    assert spec()["description"] == "A finding. Read it"


def test_a_missing_column_is_named():
    with pytest.raises(
        ValueError, match=r"positions\.by_position: the table lacks the column norm"
    ):
        positions.by_position(table().drop(columns="norm"), "A finding")
