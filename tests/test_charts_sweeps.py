"""Charts of many runs: valid Vega-Lite, one control each, and what they refuse."""

import pandas as pd
import pytest
import vl_convert
from test_charts import assert_drawn, chosen

from mlsae_book.charts import sweeps

RUNS = pd.DataFrame(
    {
        "sweep": ["R", "R", "k", "k"],
        "run": ["1", "16", "4", "8"],
        "position": [0, 1, 0, 1],
        "value": [0.1, 0.2, 0.3, 0.4],
        "low": [0.0, 0.1, 0.2, 0.3],
        "high": [0.2, 0.3, 0.4, 0.5],
        "kind": ["a", "b", "a", "b"],
    }
)
BINS = pd.DataFrame(
    {
        "run": ["1"] * 4 + ["2"] * 4,
        "rows": ["a", "a", "b", "b"] * 2,
        "low": [0.0, 0.5] * 4,
        "high": [0.5, 1.0] * 4,
        "share": [0.25, 0.75, 0.0, 1.0] * 2,
    }
)
CELLS = pd.DataFrame(
    {
        "run": ["1"] * 4 + ["2"] * 4,
        "latent": [3, 3, 5, 5] * 2,
        "layer": [0, 1] * 4,
        "probability": [1.0, 0.0, 0.5, 0.5] * 2,
        "order": [0, 0, 1, 1] * 2,
    }
)
THRESHOLDS = pd.DataFrame(
    {
        "sweep": "k",
        "run": ["4"] * 3 + ["8"] * 3,
        "position": [0] * 3 + [1] * 3,
        "threshold": [1e-4, 1e-3, 1e-2] * 2,
        "active_layers": [0.9, 0.5, 0.1] * 2,
    }
)
PARTS = pd.DataFrame(
    {
        "rank": [0, 1] * 2,
        "latent": [8, 4] * 2,
        "part": ["at one token"] * 2 + ["between tokens"] * 2,
        "variance": [0.25, 0.5, 1.0, 2.0],
    }
)


def controls(spec):
    return {p["name"]: p["bind"] for p in spec.get("params", []) if "bind" in p}


def made():
    points = {"value": "value", "axis": "Value (units)", "title": "T"}
    bins = {"axis": "Cosine", "title": "T"}
    return {
        "points": sweeps.points(RUNS, **points),
        "points with series": sweeps.points(
            RUNS, interval=("low", "high"), series="kind", subtitle="S", **points
        ),
        "histogram": sweeps.histogram(BINS[BINS["rows"] == "a"], **bins),
        "two panels": sweeps.histogram(BINS, series="rows", logarithmic=True, **bins),
        "gallery": sweeps.gallery(CELLS, "T"),
        "two texts": sweeps.gallery(pd.concat([CELLS.assign(of=of) for of in "ab"]), "T"),
        "active layers": sweeps.active_layers(THRESHOLDS, "T"),
        "variance by rank": sweeps.variance_by_rank(PARTS, "T"),
    }


@pytest.mark.parametrize("name", made())
def test_every_chart_is_drawn_and_has_a_control_where_it_shows_a_part(name):
    spec = made()[name].to_dict()
    assert bool(controls(spec)) == (name != "gallery")
    svg = vl_convert.vegalite_to_svg(spec)
    assert "T" in svg
    assert svg.count("<path") > 3


def test_controls_offer_what_the_table_has():
    charts = {name: controls(chart.to_dict()) for name, chart in made().items()}
    assert charts["points"]["sweep"]["options"] == ["R", "k"]
    assert charts["two texts"]["of"]["options"] == ["a", "b"]
    slider = charts["active layers"]["step"]
    assert (slider["min"], slider["max"]) == (0, 2)
    assert charts["variance by rank"]["rank"]["max"] == 1


def test_the_slider_begins_at_the_papers_threshold_and_says_so():
    spec = sweeps.active_layers(THRESHOLDS, "T").to_dict()
    (step,) = [p for p in spec["params"] if p["name"] == "step"]
    assert step["value"] == 1
    assert "threshold 0.1 %" in vl_convert.vegalite_to_svg(spec)


def test_the_sum_of_the_chosen_latent_is_written_out():
    svg = vl_convert.vegalite_to_svg(sweeps.variance_by_rank(PARTS, "T").to_dict())
    assert "latent 8: 0.250 + 1.000 = 1.250" in svg


def test_tables_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="points: the table lacks the column value"):
        sweeps.points(RUNS.drop(columns="value"), "value", "axis", "T")
    with pytest.raises(ValueError, match="gallery: the table has no rows"):
        sweeps.gallery(CELLS[:0], "T")
    with pytest.raises(ValueError, match="histogram: the table has 8000 rows"):
        sweeps.histogram(pd.concat([BINS] * 1000), "axis", "T")


# --- what the marks say -----------------------------------------------------------------------


def test_points_and_intervals_are_those_of_the_chosen_sweep():
    for sweep, rows in RUNS.groupby("sweep"):
        spec = chosen(made()["points with series"].to_dict(), sweep=sweep)
        where = {"run": rows.run, "kind": rows.kind, "Value (units)": rows.value}
        assert_drawn(spec, "point", **where, low=rows.low, high=rows.high)
        shown = {"run": rows.run, "Value (units)": rows.low, "high": rows.high}
        assert_drawn(spec, "rule mark", **shown)


def test_bars_reach_from_edge_to_edge_and_lines_are_those_of_the_chosen_run():
    table = BINS[BINS["rows"] == "a"].assign(share=[0.25, 0.75, 0.4, 0.6])
    chart = sweeps.histogram(table, axis="Cosine", title="T").to_dict()
    for run, rows in table.groupby("run"):
        edges = [f"{low:g} – {high:g}" for low, high in zip(rows.low, rows.high, strict=True)]
        assert_drawn(chosen(chart, run=run), "bar", Cosine=edges, Share=rows.share)
    [linear, logarithmic] = made()["two panels"].to_dict()["vconcat"]
    fields = {part["encoding"]["y"]["field"] for part in (linear, logarithmic)}
    assert fields == {"share"}
    assert "type" not in linear["encoding"]["y"].get("scale", {})
    assert logarithmic["encoding"]["y"]["scale"]["type"] == "log"
    for panel in (linear, logarithmic):
        assert panel["encoding"]["x"]["field"] == "low"
        assert panel["encoding"]["color"]["field"] == "rows"


def test_what_lies_above_a_limit_is_written_for_every_series():
    options = {"axis": "Cosine", "title": "T", "series": "rows", "logarithmic": True}
    table = BINS.assign(share=[0.25, 0.75, 0.0, 1.0, 0.5, 0.5, 0.9, 0.1])
    spec = sweeps.histogram(table, limit=0.5, **options).to_dict()
    for run, shares in (("1", (7500, 10000)), ("2", (5000, 1000))):
        one = chosen(spec, run=run)
        one["vconcat"] = one["vconcat"][2:]
        labels = [f"{rows} {share}" for rows, share in zip("ab", shares, strict=True)]
        assert_drawn(one, "bar", **{"above": shares, "Above 0.5, of 10,000": labels})
    assert len(sweeps.histogram(BINS, **options).to_dict()["vconcat"]) == 2


def test_what_is_said_of_a_run_stands_above_its_panel():
    of = {"a": CELLS, "b": CELLS}
    table = pd.concat([cells.assign(of=name) for name, cells in of.items()])
    table["note"] = table.run + table.of
    for name in of:
        svg = vl_convert.vegalite_to_svg(chosen(sweeps.gallery(table, "T").to_dict(), of=name))
        assert [note for note in ("1a", "1b", "2a", "2b") if f">{note}<" in svg] == [
            f"1{name}", f"2{name}"
        ]  # fmt: skip


def test_every_run_has_a_panel_with_the_cells_of_the_chosen_text():
    table = pd.concat([CELLS.assign(of=of) for of in "ab"], ignore_index=True)
    table["probability"] = [0.01 * (i + 1) for i in range(len(table))]
    for of, rows in table.groupby("of"):
        spec = chosen(sweeps.gallery(table, "T", swept="k = ").to_dict(), of=of)
        for panel, run in zip(spec["vconcat"], ("1", "2"), strict=True):
            cells = rows[rows.run == run]
            where = {"latent": cells.latent, f"k = {run}, by layer": cells.layer}
            shown = {"P(layer | latent)": cells.probability, "end": cells.order + 1}
            one = {**panel, "data": spec["data"], "datasets": spec["datasets"]}
            one["params"] = spec["params"]
            assert_drawn(one, "rect mark", **where, **shown)


def test_one_run_needs_no_panels():
    spec = sweeps.gallery(CELLS[CELLS.run == "1"], "T").to_dict()
    assert "vconcat" not in spec
    assert spec["encoding"]["y"]["title"] == "Layer"


def test_runs_are_shown_at_the_chosen_threshold():
    table = THRESHOLDS.assign(active_layers=[0.9, 0.5, 0.1, 0.8, 0.4, 0.2])
    title = "Active layers (fraction of all layers)"
    for step, threshold in enumerate((1e-4, 1e-3, 1e-2)):
        spec = chosen(sweeps.active_layers(table, "T").to_dict(), step=step)
        rows = table[table.threshold == threshold]
        assert_drawn(spec, "point", **{"run": rows.run, title: rows.active_layers})
        assert_drawn(spec, "rule mark", **{"Mean of threshold": [threshold]})
    first = table[table.threshold == 1e-4]
    shown = {"Run": first.position, "run": first.run, title: first.active_layers}
    assert_drawn(spec, "line mark", **shown)


def test_both_parts_of_the_chosen_latent_are_summed():
    first = PARTS[PARTS["rank"] == 0]
    shown = {"part": first.part, "latent": first.latent}
    title = "Variance of the layer (squared layers)"
    chart = sweeps.variance_by_rank(PARTS, "T").to_dict()
    assert_drawn(chart, "area mark", **shown, **{title: first.variance})
    other = vl_convert.vegalite_to_svg(chosen(chart, rank=1))
    assert "latent 4: 0.500 + 2.000 = 2.500" in other
