"""Charts over R and k and of transfer, and the tables of many runs that they draw."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import vl_convert
from test_charts import assert_drawn, drawn_marks, said
from test_charts import chosen as choose

from mlsae_book import charts
from mlsae_book.charts import fidelity, transfer
from mlsae_book.tables import fidelity as tables
from mlsae_book.tables import sweeps

LAYERS, FACTORS = 12, (1, 2, 64)  # twelve: "10" comes after "9", not after "1"


def evaluation(scale=1.0, n_layers=LAYERS):
    layer = np.arange(n_layers)
    values = {"fvu_global": scale * (0.1 + 0.01 * layer), "delta_ce": scale * (1.0 + layer)}
    return pd.DataFrame({"layer": layer, **values, "l0": 16 * scale, "dead": 0.25 * scale})


def swept(label="expansion_factor", values=FACTORS):
    return pd.concat(
        [evaluation(1 / v).assign(**{label: v})[[label, *evaluation()]] for v in values]
    )


def over():
    return tables.over(sweeps.stack({"R": swept(), "k": swept("k", (4, 8))}))


def matrix():
    """Positive FVU, and a delta CE of which one cell is negative."""
    rows = [
        {"trained": trained, "layer": layer, "last": trained == "2" or layer == 2}
        for trained in ("0", "1", "2", "all (MLSAE)")
        for layer in range(3)
    ]
    table = pd.DataFrame(rows)
    fvu = table.assign(metric="fvu_global", value=np.geomspace(0.01, 1, len(table)))
    loss = table.assign(metric="delta_ce", value=np.linspace(-0.1, 1, len(table)))
    return pd.concat([fvu, loss], ignore_index=True)


def course():
    log = pd.DataFrame({"run": [1] * 4 + [2] * 2, "tokens": [10, 20, 30, 40, 50, 100]})
    log = log.assign(auxk=[0.0, 1.0, 2.0, 4.0, 5.0, 7.0], dead_fraction=[0.0, 0.2, 0.4, 0.4, 0, 1])
    return log.assign(fvu=0.5, fvu_0=0.25, fvu_1=[0.5, 0.7, 0.5, 0.3, 0.9, 0.8])


# name: (function, its table, the marks that must be drawn)
CASES = {
    "over_sweep": (fidelity.over_sweep, over, {"line": 2 * (LAYERS + 1)}),
    "repeated": (
        fidelity.repeated,
        lambda: tables.repeated(swept("seed"), "seed"),
        {"rule": 0, "symbol": LAYERS + 1},
    ),
    "against_sparsity": (
        fidelity.against_sparsity,
        swept,
        {"line": LAYERS, "symbol": 3 * LAYERS},
    ),
    "last_layer": (
        fidelity.last_layer,
        lambda: tables.last_layer(swept(), "expansion_factor"),
        {"line": 2, "rect": 3},
    ),
    "dead_latents": (
        fidelity.dead_latents,
        lambda: tables.auxiliary(course(), "run", 2),
        {"line": 3 * 2},
    ),
    "matrix": (transfer.matrix, matrix, {"rect": 2 * 2 + 2}),
}
every_chart = pytest.mark.parametrize("name", CASES)


def specification(name):
    function, table, _ = CASES[name]
    return function(table(), "A finding", "How to read it").to_dict()


def svg(spec):
    return vl_convert.vegalite_to_svg(json.dumps(spec), vl_version="5.8")


@every_chart
def test_every_row_is_drawn_and_nothing_is_named_by_a_counter(name):
    spec = specification(name)
    marks = drawn_marks(spec)
    for kind, count in CASES[name][2].items():
        assert marks.get(kind, 0) >= count, marks
        assert kind in ("rule", "symbol") or marks[kind] == count, marks
    text = json.dumps(spec)
    assert not any(f'"{automatic}' in text for automatic in ("view_", "param_", "concat_"))
    assert '"container"' not in text
    assert spec["description"] == "A finding. How to read it"


@every_chart
def test_same_table_same_specification(name):
    assert specification(name) == specification(name)


@every_chart
def test_a_missing_column_is_named_and_an_empty_table_refused(name):
    function, table, _ = CASES[name]
    with pytest.raises(ValueError, match=f"{name}: the table has no rows"):
        function(table().iloc[:0], "A finding")
    column = next(c for c in ("layer", "run") if c in table())
    with pytest.raises(ValueError, match=f"{name}: the table lacks the column {column}"):
        function(table().drop(columns=column), "A finding")


def chosen(name, **values):
    """The chart when the reader has made these choices."""
    return choose(specification(name), **values)


def test_a_sweeps_points_are_those_of_the_table():
    table = over()
    for metric, rows in table.groupby("metric"):
        columns = {name: rows[name] for name in ("sweep", "layer", "run", "value")}
        assert_drawn(chosen("over_sweep", metric=metric), "point", **columns)
        means = {name: column[rows.layer == "mean"] for name, column in columns.items()}
        assert_drawn(chosen("over_sweep", metric=metric, shown="mean"), "point", **means)


def test_ranges_are_drawn_from_their_low_to_their_high_end():
    table = tables.repeated(swept("seed"), "seed")
    for metric, rows in table.groupby("metric"):
        spec = chosen("repeated", metric=metric)
        ends = {"low": rows.low, "high": rows.high, "mean": rows["mean"]}
        for kind, drawn in (("point", ["mean"]), ("rule mark", ["low", "high"])):
            assert_drawn(spec, kind, layer=rows.layer, **ends)
            first = list(said(spec, kind))[: 1 + len(drawn)]  # what is encoded comes first
            assert first == ["Layer", *drawn]


def test_what_is_lost_stands_against_the_active_latents():
    table = swept()
    for metric in ("fvu_global", "delta_ce"):
        spec = chosen("against_sparsity", metric=metric)
        title = "L0 (active latents per token, log scale)"
        where = {"Layer": table.layer, title: table.l0}
        assert_drawn(spec, "point", **where, value=table[metric])


def test_the_last_layer_is_called_so_and_dead_latents_stand_beneath():
    spec = specification("last_layer")
    table = tables.last_layer(swept(), "expansion_factor")
    long = table.melt("run", ["last", "others"])
    names = long.variable.map({"last": "last layer", "others": "mean of the others"})
    title = charts.METRICS["fvu_global"]
    assert_drawn(spec, "point", **{"run": long.run, "layers": names, title: long.value})
    shown = {"Expansion factor R": [1, 2, 64], "dead": [0.25, 0.125, 0.004]}
    assert_drawn(spec, "bar", **shown)


def test_the_cells_numbers_are_those_of_the_table():
    for metric, rows in matrix().groupby("metric"):
        spec = chosen("matrix", metric=metric, last_layer=True)
        where = {"trained": rows.trained, "layer": rows.layer}
        for kind in ("rect mark", "text mark"):
            marks = said(spec, kind).dropna(subset="layer")
            assert len(marks) == len(rows)
            found = marks.set_index(["trained", "layer"]).value.str.replace("−", "-").astype(float)
            for trained, layer, value in zip(*where.values(), rows.value, strict=True):
                assert found[trained, str(layer)] == pytest.approx(value, rel=5e-3, abs=1e-9)


def test_the_reader_chooses_metric_and_layers_and_sees_every_sweep():
    default = svg(specification("over_sweep"))
    assert all(f">{value}</text>" in default for value in (*FACTORS, 4, 8))
    assert all(f", over {sweep}</text>" in default for sweep in "Rk")
    assert charts.METRICS["fvu_global"] in default
    order = re.findall(r">(\d+)</text>", default)
    assert [label for label in order if label in ("9", "10", "11")] == ["9", "10", "11"]
    assert charts.METRICS["delta_ce"] in svg(chosen("over_sweep", metric="delta_ce"))
    assert drawn_marks(chosen("over_sweep", shown="mean"))["line"] == 2


def test_the_last_layer_of_the_matrix_is_shown_on_demand():
    assert drawn_marks(chosen("matrix", last_layer=True))["rect"] == 3 * 3 + 3
    assert charts.METRICS["delta_ce"] in svg(chosen("matrix", metric="delta_ce"))


def test_a_matrix_without_the_row_beneath_names_the_layers_itself():
    square = matrix().query("trained != 'all (MLSAE)'")
    spec = transfer.matrix(square, "A finding").to_dict()
    assert drawn_marks(spec)["rect"] == 2 * 2
    assert "Measured at layer" in svg(spec)


def test_shades_order_the_cells_of_a_metric_also_where_some_are_negative():
    spec = specification("matrix")
    rows = [row for rows in spec["datasets"].values() for row in rows if "shade" in row]
    for metric in ("fvu_global", "delta_ce"):
        cells = sorted((r["value"], r["shade"]) for r in rows if r["metric"] == metric)
        shades = [shade for _, shade in cells]
        assert len(shades) == 12
        assert shades == sorted(shades)
        assert (shades[0], shades[-1]) == (0, 0.75)


# Tables -------------------------------------------------------------------------------------------


def test_the_mean_over_layers_is_a_layer_of_its_own():
    table = tables.over(sweeps.stack({"R": swept()}))
    assert len(table) == len(FACTORS) * (LAYERS + 1) * 2
    found = table.set_index(["run", "layer", "metric"]).value
    assert found["2", "3", "delta_ce"] == 2.0
    assert found["2", "mean", "delta_ce"] == pytest.approx((1 + 12) / 2 / 2)
    assert found["64", "mean", "fvu_global"] == pytest.approx(0.155 / 64)


def test_the_range_over_seeds_is_that_of_the_runs():
    table = tables.repeated(swept("seed", (1, 2, 4)), "seed").set_index(["layer", "metric"])
    row = table.loc[("1", "delta_ce")]
    assert (row["mean"], row.low, row.high, row.runs) == (pytest.approx(3.5 / 3), 0.5, 2.0, 3)
    # The range of the means is that of each run's own mean, not the mean of the ranges' ends.
    opposed = pd.DataFrame({"seed": [0, 0, 1, 1], "layer": [0, 1, 0, 1], "kl": [1.0, 3, 3, 1]})
    mean = tables.repeated(opposed, "seed").set_index("layer").loc["mean"]
    assert (mean.low, mean.high) == (2, 2)


def test_intervals_stand_in_brackets_behind_their_value():
    table = pd.DataFrame({"layer": [2, 5], "mse": [1.0, 2.0], "kl": [0.5, 0.125]})
    table = table.assign(kl_low=[0.4, 0.1], kl_high=[0.6, 0.15])
    found = tables.with_intervals(table, ["kl"], 2)
    assert found.kl.to_dict() == {2: "0.50 [0.40, 0.60]", 5: "0.12 [0.10, 0.15]"}


def test_the_last_layer_is_set_beside_the_others():
    table = tables.last_layer(swept(), "expansion_factor").set_index("run")
    assert table["last"][2] == pytest.approx(0.21 / 2)
    assert table.others[2] == pytest.approx((0.155 * 12 - 0.21) / 11 / 2)
    assert table.dead.tolist() == [0.25, 0.125, 0.25 / 64]


def test_the_auxiliary_loss_is_a_mean_over_each_part_of_the_training():
    found = tables.auxiliary(course(), "run", 2).set_index(["run", "part"])
    assert found.auxk.to_dict() == {(1, 1): 0.5, (1, 2): 3.0, (2, 1): 5.0, (2, 2): 7.0}
    assert found.dead[1, 2] == pytest.approx(0.4)
    assert found.tokens.tolist() == [20, 40, 50, 100]
    assert found["last"].tolist() == pytest.approx([0.6, 0.4, 0.9, 0.8])
    assert found.fvu.eq(0.5).all()


def test_dead_latents_stand_above_the_last_layers_fvu():
    rows = tables.auxiliary(course(), "run", 2)
    spec = fidelity.dead_latents(rows, "Dead", by="Weight").to_dict()
    titles = {"dead": "Dead latents (fraction of all)", "last": "FVU of the last layer (log scale)"}
    first = rows.drop_duplicates("run")  # of a line its first point is told
    for panel, (column, title) in zip(spec["vconcat"][:2], titles.items(), strict=True):
        alone = {**spec, "vconcat": [panel]}
        assert_drawn(alone, "line mark", Weight=first.run, **{title: first[column]})


def test_pairs_are_of_the_same_layers():
    table = swept("case", (1, 2)).assign(case=lambda t: t.case.map({1: "a", 2: "b"}))
    pair = tables.paired(table, "case", "a", "b", "delta_ce")
    assert pair.difference.tolist() == pytest.approx([(1 + layer) / 2 for layer in range(LAYERS)])
    with pytest.raises(ValueError, match="expected a and b at the same layers"):
        tables.paired(table[1:], "case", "a", "b", "delta_ce")
    with pytest.raises(ValueError, match="expected a and c"):
        tables.paired(table, "case", "a", "c", "delta_ce")


def test_one_mlsae_has_a_layers_share_of_the_parameters_and_as_many_vectors():
    made = pd.DataFrame({"tokens": [1000] * 3, "seconds": [5.0] * 3})
    table = tables.costs(made, made[:1].assign(seconds=9.0), d_model=4, expansion_factor=2)
    one, each = table.loc["one MLSAE"], table.loc["one SAE per layer"]
    weights = 4 * 8 + 8 * 4 + 4  # encoder, decoder and pre-encoder bias
    assert (one.parameters, each.parameters) == (weights, 3 * weights)
    assert one.training_memory_mb == pytest.approx(16e-6 * weights)
    assert one.vectors == each.vectors == 3000
    assert (one.seconds, each.seconds) == (9, 15)


def test_means_are_over_layers():
    table = tables.means(swept(), "expansion_factor", ["delta_ce"])
    assert table.delta_ce.tolist() == pytest.approx([6.5, 3.25, 6.5 / 64])
