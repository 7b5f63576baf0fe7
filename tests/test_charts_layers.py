"""Charts of drift, of latents over layers and of variance ratios."""

import itertools
import json
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
import vl_convert
from test_charts import assert_drawn, chosen, drawn_marks

from mlsae_book.charts import drift, layers

SVG = "{http://www.w3.org/2000/svg}"
SOURCES = {"probs": "mean over tokens", "probs_gaussian": "null model"}
LATENTS, LAYERS = 4, 3


def norms():
    columns = {"layer": [0, 1], "relative_layer": [0.0, 0.5], "norm_se": 0.1}
    models = {"a": [1.0, 3.0], "b": [2.0, 7.0]}
    return pd.concat([pd.DataFrame({"model": m, "norm": x} | columns) for m, x in models.items()])


def cosines():
    columns = {"layer": 0, "other": 1, "relative_pair": 0.0}
    rows = [
        {"model": m, "measure": measure, "value": value, **columns}
        for m, measure, value in itertools.product("ab", ("centred", "raw"), (0.0,))
    ]
    table = pd.DataFrame(rows).assign(value=[0.2, 0.9, 0.3, 0.8])
    return table.assign(low=table.value - 0.05, high=table.value + 0.06)


def pairs():
    rows = [{"model": m, "layer": i, "other": 1 - i} for m, i in itertools.product("ab", (0, 1))]
    return pd.DataFrame(rows).assign(centred=[0.1, 0.2, 0.3, 0.4], raw=[0.9, 0.8, 0.7, 0.6])


def aggregate():
    table = pd.DataFrame({"order": np.arange(LATENTS).repeat(LAYERS)})
    table["layer"] = np.tile(range(LAYERS), LATENTS)
    table["probs"] = np.linspace(0.1, 0.5, len(table))
    table["probs_gaussian"] = (1 - table.probs).where(table.order < LATENTS - 1)
    return table.assign(latent_probs=table.order + 10, latent_probs_gaussian=table.order + 20)


def totals():
    table = aggregate()[["order", "layer"]]
    return table.assign(latent=table.order, total=table.layer + 1.5, share=table.layer / 2)


def prompts():
    rows = [("p", 7, 0, 0), ("p", 7, 1, 0), ("p", 8, 2, 1), ("q", 7, 2, 0)]
    table = pd.DataFrame(rows, columns=["prompt", "latent", "layer", "order"])
    columns = {"probs": 0.25, "probs_by_total": 0.3, "share": 0.49}
    weights = {name: value + 0.01 * np.arange(4) for name, value in columns.items()}
    return table.assign(tokens=[1, 2, 3, 4], activation=[0.5, 1.5, 2.5, 3.5], **weights)


def ratios():
    columns = {"value": 0.5, "low": 0.4, "high": 0.6, "permuted": 0.9, "gaussian": 0.8}
    rows = [
        {"sweep": sweep, "run": run, "position": i, "ratio": ratio}
        for sweep, runs in (("R", ["1", "2"]), ("k", ["4"]))
        for i, run in enumerate(runs)
        for ratio in ("Eq. 11", "Eq. 12")
    ]
    numbers = {name: value + 0.01 * np.arange(len(rows)) for name, value in columns.items()}
    return pd.DataFrame(rows).assign(**numbers)


def parts():
    table = ratios().drop_duplicates(["sweep", "run"])[["sweep", "run", "position"]]
    stacked = [
        table.assign(part=part, place=place, share=share, variance=[1.0, 2.0, 3.0])
        for place, (part, share) in enumerate((("inside", 0.3), ("between", 0.7)))
    ]
    return pd.concat(stacked)


def passage():
    table = aggregate()[["order", "layer"]]
    return table.assign(latent=table.order + 30, activation=table.layer + 0.5 * table.order)


def rivals():
    table = aggregate()[["order", "layer"]]
    return pd.concat([table.assign(panel=p, probability=q) for p, q in (("A", 0.2), ("B", 0.7))])


def chosen_sources(table, *titles):
    return layers.aggregate(table, SOURCES, *titles)


def of_a_token(table, *titles):
    return layers.passage(table, "a'\"b", *titles)


def of_rivals(table, *titles):
    return layers.guess(table, {"A": "random", "B": "trained"}, "B", *titles)


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
    "passage": (of_a_token, passage, {"rect": 12 + 3}, {"after_block": 2}, {"rect": 12 + 3}),
    "guess": (of_rivals, rivals, {"rect": 24}, {"guess": "B"}, {"rect": 24}),
    "totals": (layers.totals, totals, {"rect": 12}, {"power": 1}, {"rect": 12}),
    "prompts": (layers.prompts, prompts, {"rect": 3}, {"layers_prompt": "q"}, {"rect": 1}),
    "ratios": (
        layers.variance_ratios,
        ratios,
        {"symbol": 12},
        {"ratio_sweep": "k"},
        {"symbol": 6},
    ),
    "parts": (layers.variance_parts, parts, {"rect": 6}, {"unit": "variance"}, {"rect": 6}),
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


# --- what the marks say -----------------------------------------------------------------------


def choices(name, parameter):
    """What the reader can choose, by the words that the control shows."""
    [found] = [p for p in specification(name)["params"] if p["name"] == parameter]
    return dict(zip(found["bind"]["labels"], found["bind"]["options"], strict=True))


def test_norms_are_drawn_with_two_standard_errors_to_either_side():
    spec, table = specification("norms"), norms()
    where = {"model": table.model, "Relative layer (layer / number of layers)": [0, 0.5] * 2}
    title = "Mean L2 norm (activation units, log scale)"
    low, high = table.norm - 0.2, table.norm + 0.2
    assert_drawn(spec, "point", **where, **{title: table.norm, "layer": table.layer})
    assert_drawn(spec, "point", model=table.model, norm=table.norm, low=low, high=high)
    assert_drawn(spec, "rule mark", **where, **{title: low, "high": high})


def test_cosines_are_those_of_the_chosen_vectors():
    title = "Mean cosine similarity of adjacent layers"
    measures = choices("cosines", "measure")
    assert measures == {"about each layer's mean": "centred", "not centred": "raw"}
    for measure, rows in cosines().groupby("measure"):
        spec = chosen(specification("cosines"), measure=measure)
        assert_drawn(spec, "point", **{"model": rows.model, title: rows.value})
        assert_drawn(spec, "point", model=rows.model, other=rows.other, high=rows.high)
        assert_drawn(spec, "rule mark", **{"model": rows.model, title: rows.low, "high": rows.high})
    assert choices("matrix", "measure") == measures
    for (model, rows), measure in itertools.product(pairs().groupby("model"), measures.values()):
        spec = chosen(specification("matrix"), matrix_model=model, measure=measure)
        title = "Mean cosine similarity"
        where = {"layer": rows.layer, "other": rows.other}
        assert_drawn(spec, "rect mark", **where, **{title: rows[measure]})
        both = {label: rows[name] for label, name in measures.items()}
        assert_drawn(spec, "rect mark", **where, **both)


def test_cells_are_those_of_the_chosen_source():
    assert choices("aggregate", "source") == {words: name for name, words in SOURCES.items()}
    for source in SOURCES:
        rows = aggregate().dropna(subset=source)
        where = {"4 latents, by their mean layer": rows.order, "Layer": rows.layer}
        what = {"P(layer | latent)": rows[source], "latent": rows[f"latent_{source}"]}
        spec = chosen(specification("aggregate"), source=source)
        assert_drawn(spec, "rect mark", **where, end=rows.order + 1, **what)


def texts(spec, **values):
    svg = vl_convert.vegalite_to_svg(chosen(spec, **values), vl_version="5.8")
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def test_what_the_pictures_are_is_said_once_the_reader_has_guessed():
    spec = specification("guess")
    assert {"A", "B"} <= set(texts(spec))
    assert not [t for t in texts(spec) if t and ("random" in t or "trained" in t)]
    assert {"A: random – wrong", "B: trained"} <= set(texts(spec, guess="A"))
    assert {"A: random", "B: trained – right"} <= set(texts(spec, guess="B"))
    rows = rivals()
    where = {"Layer": rows.layer, "end": rows.order + 1}
    assert_drawn(spec, "rect mark", **where, **{"P(layer | latent)": rows.probability})


def test_a_token_stands_at_its_block_and_later_cells_are_not_seen():
    spec = specification("passage")
    for block in range(LAYERS):
        here = chosen(spec, after_block=block)
        found = texts(here)
        assert found.count("a'\"b") == 1
        assert [t for t in found if t and t.startswith("block")] == [
            f"block {layer}" for layer in range(LAYERS) if layer != block
        ]
        svg = ElementTree.fromstring(vl_convert.vegalite_to_svg(here, vl_version="5.8"))
        cells = [
            path for path in svg.iter(f"{SVG}path") if "latent: " in path.get("aria-label", "")
        ]
        hidden = [path for path in cells if path.get("opacity") == "0"]
        assert (len(cells), len(hidden)) == (12, 4 * (LAYERS - 1 - block))
    rows = passage()
    shown = {"latent": rows.latent, "layer": rows.layer, "Activation": rows.activation}
    assert_drawn(spec, "rect mark", **shown)


def test_totals_are_shaded_by_the_chosen_power_of_their_share():
    table = totals()
    for power in (0.5, 1):
        spec = chosen(specification("totals"), power=power)
        where = {"latent": table.latent, "Layer": table.layer, "total activation": table.total}
        title = "(total / largest total) ^ power"
        assert_drawn(spec, "rect mark", **where, **{title: table.share**power})


def test_prompts_are_shown_in_the_chosen_weighting():
    weightings = choices("prompts", "weighting")
    assert weightings == {
        "mean over active tokens": "probs",
        "activation totals": "probs_by_total",
        "totals, not normalised (square root)": "share",
    }
    for (prompt, rows), name in itertools.product(prompts().groupby("prompt"), weightings.values()):
        spec = chosen(specification("prompts"), layers_prompt=prompt, weighting=name)
        shown = rows[name] ** (0.5 if name == "share" else 1)
        where = {"latent": rows.latent, "Layer": rows.layer, "tokens where active": rows.tokens}
        what = {"P(layer | latent), or as chosen": shown, "total activation": rows.activation}
        assert_drawn(spec, "rect mark", **where, **what)


def test_ratios_stand_in_their_panel_under_the_name_of_what_was_measured():
    kinds = {"value": "trained", "permuted": "layers permuted", "gaussian": "Gaussian input"}
    table = ratios()
    for sweep in ("R", "k"):
        spec = chosen(specification("ratios"), ratio_sweep=sweep)
        rows = table[table.sweep == sweep]
        long = rows.melt(["run", "ratio", "low", "high"], list(kinds), "kind", "shown")
        of = long.kind.map(kinds)
        assert_drawn(spec, "point", run=long.run, of=of, shown=long.shown, low=long.low)
        for ratio, title in (
            ("Eq. 11", "Eq. 11: variance of one latent over its tokens (of the total)"),
            ("Eq. 12", "Eq. 12: variance at one token (of that of its latent)"),
        ):
            [panel] = [p for p in spec["vconcat"] if title in json.dumps(p)]
            one, here = {**spec, "vconcat": [panel]}, rows[rows.ratio == ratio]
            mine = long[long.ratio == ratio]
            assert_drawn(one, "point", **{"run": mine.run, "of": of[mine.index], title: mine.shown})
            assert_drawn(one, "rule mark", **{"run": here.run, title: here.low, "high": here.high})


def test_parts_are_stacked_in_their_order_in_the_chosen_unit():
    units, table = choices("parts", "unit"), parts()
    assert units == {"fraction of Var(L)": "share", "squared layers": "variance"}
    for unit in units.values():
        spec = chosen(specification("parts"), unit=unit)
        assert len(spec["vconcat"]) == 2
        for panel, (sweep, rows) in zip(
            spec["vconcat"], table.groupby("sweep", sort=False), strict=True
        ):
            title = panel["encoding"]["x"]["title"] or "shown"
            what = {"part": rows.part, sweep: rows.run, "place": rows.place, title: rows[unit]}
            assert_drawn({**spec, "vconcat": [panel]}, "bar", **what)
            assert panel["encoding"]["color"]["sort"] == ["inside", "between"]
