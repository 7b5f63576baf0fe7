"""Charts of drift, of latents over layers and of variance ratios."""

import json

import numpy as np
import pandas as pd
import pytest
import vl_convert
from test_charts import drawn_marks

from mlsae_book.charts import drift, layers

SOURCES = {"probs": "mean over tokens", "probs_gaussian": "null model"}
LATENTS, LAYERS = 4, 3


def norms():
    columns = {"layer": [0, 1], "relative_layer": [0.0, 0.5], "norm": [1.0, 3.0], "norm_se": 0.1}
    return pd.concat([pd.DataFrame({"model": m} | columns) for m in ("a", "b")])


def cosines():
    columns = {"layer": 0, "other": 1, "relative_pair": 0.0, "low": 0.1, "high": 0.3}
    rows = [
        {"model": m, "measure": measure, "value": value, **columns}
        for m in ("a", "b")
        for measure, value in (("centred", 0.2), ("raw", 0.9))
    ]
    return pd.DataFrame(rows)


def pairs():
    rows = [
        {"model": m, "layer": i, "other": 1 - i, "centred": 0.2, "raw": 0.9}
        for m in ("a", "b")
        for i in (0, 1)
    ]
    return pd.DataFrame(rows)


def aggregate():
    table = pd.DataFrame({"order": np.arange(LATENTS).repeat(LAYERS), "probs": 1 / 3})
    table["layer"] = np.tile(range(LAYERS), LATENTS)
    table["probs_gaussian"] = table.probs.where(table.order < LATENTS - 1)
    return table.assign(latent_probs=table.order, latent_probs_gaussian=table.order)


def totals():
    table = aggregate()[["order", "layer"]]
    return table.assign(latent=table.order, total=table.layer + 1.5, share=table.layer / 2)


def prompts():
    rows = [("p", 7, 0, 0), ("p", 7, 1, 0), ("p", 8, 2, 1), ("q", 7, 2, 0)]
    table = pd.DataFrame(rows, columns=["prompt", "latent", "layer", "order"])
    return table.assign(tokens=1, activation=0.5, probs=0.25, probs_by_total=0.3, share=0.4)


def ratios():
    columns = {"value": 0.5, "low": 0.4, "high": 0.6, "permuted": 0.99, "gaussian": 0.8}
    rows = [
        {"sweep": sweep, "run": run, "position": i, "ratio": ratio, **columns}
        for sweep, runs in (("R", ["1", "2"]), ("k", ["4"]))
        for i, run in enumerate(runs)
        for ratio in ("Eq. 11", "Eq. 12")
    ]
    return pd.DataFrame(rows)


def parts():
    table = ratios().drop_duplicates(["sweep", "run"])[["sweep", "run", "position"]]
    stacked = [
        table.assign(part=part, place=place, share=0.5, variance=1.0)
        for place, part in enumerate(("inside", "between"))
    ]
    return pd.concat(stacked)


def chosen_sources(table, *titles):
    return layers.aggregate(table, SOURCES, *titles)


# name: (function, its table, the marks that must be drawn, a choice, the marks after it)
CASES = {
    "norms": (drift.norms, norms, {"line": 2, "symbol": 4}, {}, {}),
    "cosines": (drift.cosines, cosines, {"symbol": 2}, {"measure": "raw"}, {"symbol": 2}),
    "matrix": (drift.matrix, pairs, {"rect": 2}, {"matrix_model": "b"}, {"rect": 2}),
    "aggregate": (
        chosen_sources,
        aggregate,
        {"rect": LATENTS * LAYERS},
        {"source": "probs_gaussian"},
        {"rect": (LATENTS - 1) * LAYERS},
    ),
    "totals": (layers.totals, totals, {"rect": 12}, {"power": 1}, {"rect": 12}),
    "prompts": (layers.prompts, prompts, {"rect": 3}, {"layers_prompt": "q"}, {"rect": 1}),
    "ratios": (
        layers.variance_ratios,
        ratios,
        {"symbol": 12},
        {"ratio_sweep": "k"},
        {"symbol": 6},
    ),
    "parts": (layers.variance_parts, parts, {"rect": 4}, {"parts_sweep": "k"}, {"rect": 2}),
}
every_chart = pytest.mark.parametrize("name", CASES)


def specification(name):
    function, table, *_ = CASES[name]
    return function(table(), "A finding", "How to read it").to_dict()


@every_chart
def test_rows_are_drawn_and_the_reader_can_choose_others(name):
    _, _, before, choice, after = CASES[name]
    spec = specification(name)
    found = drawn_marks(spec)
    assert {kind: n for kind, n in before.items() if found.get(kind) != n} == {}, found
    plain = vl_convert.vegalite_to_svg(spec, vl_version="5.8")
    for parameter in spec.get("params", []):
        parameter["value"] = choice.get(parameter["name"], parameter.get("value"))
    if choice:
        found = drawn_marks(spec)
        assert {kind: n for kind, n in after.items() if found.get(kind) != n} == {}, found
        if name != "matrix":  # whose two models are alike here
            assert vl_convert.vegalite_to_svg(spec, vl_version="5.8") != plain


@every_chart
def test_charts_are_the_same_every_time_and_name_their_views(name):
    spec = json.dumps(specification(name))
    assert spec == json.dumps(specification(name))
    for automatic in ("view_", "param_", "concat_"):
        assert f'"{automatic}' not in spec


@every_chart
def test_a_missing_column_is_named(name):
    function, table, *_ = CASES[name]
    with pytest.raises(ValueError, match="the table lacks the column"):
        function(table().drop(columns=table().columns[-1]), "A finding")


def test_prompts_say_how_many_latents_are_of_one_layer():
    svg = vl_convert.vegalite_to_svg(specification("prompts"), vl_version="5.8")
    assert "1 of 2 latents are active at one layer only" in svg
