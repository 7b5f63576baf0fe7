"""Charts of single latents: what they draw, and of which latent or change."""

import itertools
import json
from xml.etree import ElementTree

import pandas as pd
import pytest
import vl_convert
from test_charts import assert_drawn, chosen

from mlsae_book import charts
from mlsae_book.charts import latents

SVG = "{http://www.w3.org/2000/svg}"
CHANGES = pd.DataFrame(
    [
        {"change": c, "direction": d, "rank": r, "token": f"{d[0]}{r}", "logit_change": s / r}
        for c in (1.0, "ablate")
        for d, s in (("promoted", 2.0), ("suppressed", -2.0))
        for r in (1, 2)
    ]
)
LATER = pd.DataFrame(
    [
        {"change": c, "layer": i, "activation_before": 0.1, "activation_after": c / (1 + i)}
        | {"relative_change": 0.3 * c + i}
        for c, i in itertools.product((1.0, 2.0), range(3))
    ]
)
HANDOVER = pd.DataFrame(
    [
        {"cosine": c, "where": w, "pair": p}
        for c in ("0 to 0.3", "0.3 and more")
        for w in ("next layer", "same layer")
        for p in ("most similar latent", "latent at random")
    ]
).assign(fraction=[0.01 * (i + 1) for i in range(8)])
UNIFORMITY = pd.DataFrame(
    [
        {"l0": l0, "layer": layer, "of": kind, "r_l0": r + layer / 10}
        | dict.fromkeys(("low", "high"), float("nan"))
        | ({} if kind == "alone" else {"low": r + layer / 10 - 0.1, "high": r + layer / 10 + 0.1})
        for l0 in (4.0, 8.0)
        for layer in range(3)
        for kind, r in (("own", 0.4), ("another", 0.5), ("random", 0.55), ("alone", 0.7))
    ]
)
for _name, _share in (("latents", "r_l0"), ("latents_low", "low"), ("latents_high", "high")):
    UNIFORMITY[_name] = UNIFORMITY[_share] * UNIFORMITY.l0
ONE = UNIFORMITY[UNIFORMITY.l0 == 8]
COST = pd.DataFrame({"alpha": [-1.0, 0.0, 1.0], "kl": [0.2, 0.0, 0.3]})

CHARTS = {
    "steering_cost": lambda title: latents.steering_cost(COST, title),
    "promoted": lambda title: latents.promoted(CHANGES, title),
    "later_layers": lambda title: latents.later_layers(LATER, title),
    "handover": lambda title: latents.handover(HANDOVER, title),
    "uniformity": lambda title: latents.uniformity(ONE, title),
    "over_sparsity": lambda title: latents.uniformity_over_sparsity(UNIFORMITY, title),
}


def svg(chart, **values):
    """The drawn texts and the whole picture, with some parameters set."""
    spec = chart.to_dict() | {"config": charts.theme()}
    for param in spec["params"] if values else ():
        param["value"] = values.get(param["name"], param.get("value"))
    picture = vl_convert.vegalite_to_svg(json.dumps(spec), vl_version="5.8")
    return [t.text for t in ElementTree.fromstring(picture).iter(f"{SVG}text")], picture


@pytest.mark.parametrize("name", CHARTS)
def test_charts_are_drawn_under_their_title_and_always_alike(name):
    chart = CHARTS[name]("What is found")
    texts, picture = svg(chart)
    assert "What is found" in texts
    assert "NaN" not in picture
    assert CHARTS[name]("What is found").to_json() == chart.to_json()
    for automatic in ("view_", "param_", "concat_"):
        assert f'"{automatic}' not in chart.to_json()
    assert "container" not in chart.to_json()


def test_a_rounding_error_is_drawn_as_nothing():
    table = pd.DataFrame({"alpha": range(5), "kl": [3e-17, -2e-13, 1e-9, 0.25, 0.75]})
    [rows] = latents.steering_cost(table, "A finding").to_dict()["datasets"].values()
    assert [row["kl"] for row in rows] == [0, 0, 1e-9, 0.25, 0.75]


def test_the_reader_chooses_the_change_the_measure_and_the_layer():
    texts, _ = svg(CHARTS["promoted"]("Tokens"), change="ablate")
    assert [t for t in texts if t in ("p1", "p2", "s1", "s2")] == ["p1", "p2", "s2", "s1"]
    options = CHARTS["promoted"]("Tokens").to_dict()["params"][0]["bind"]["options"]
    assert options == ["+1", "ablate"]
    drawn = [svg(CHARTS["later_layers"]("Later"), measure=m)[1] for m in
             ("activation_after", "relative_change")]  # fmt: skip
    assert drawn[0] != drawn[1]
    params = CHARTS["handover"]("Pairs").to_dict()["params"]
    assert params[0]["bind"]["options"] == ["next layer", "same layer"]


def test_tables_that_lack_a_column_are_refused():
    with pytest.raises(ValueError, match="uniformity: the table lacks the column low"):
        latents.uniformity(ONE.drop(columns="low"), "Title")


# --- what the marks say -----------------------------------------------------------------------


def test_steering_costs_what_the_table_says():
    axes = (
        "Added to the latent's activation (activations)",
        "KL, original to steered (nats per token)",
    )
    spec = CHARTS["steering_cost"]("Cost").to_dict()
    assert_drawn(spec, "point", **dict(zip(axes, (COST.alpha, COST.kl), strict=True)))


def test_tokens_are_told_apart_by_what_happened_to_them():
    for change, name in ((1.0, "+1"), ("ablate", "ablate")):
        rows = CHANGES[CHANGES.change == change]
        spec = chosen(CHARTS["promoted"]("Tokens").to_dict(), change=name)
        shown = {"token": rows.token, "direction": rows.direction}
        assert_drawn(spec, "bar", **shown, **{"Change of the logit": rows.logit_change})


def test_later_layers_show_the_measure_that_their_title_names():
    spec = CHARTS["later_layers"]("Later").to_dict()
    [measure] = spec["params"]
    assert dict(zip(measure["bind"]["options"], measure["bind"]["labels"], strict=True)) == {
        "activation_after": "Mean activation of the latent",
        "relative_change": "Change of the residual stream, ‖Δx‖ / ‖x‖",
    }
    for name, title in (
        ("activation_after", "Mean activation of the latent"),
        ("relative_change", "Change of the residual stream, ‖Δx‖ / ‖x‖"),
    ):
        texts, _ = svg(CHARTS["later_layers"]("Later"), measure=name)
        assert title in texts
        shown = {"Change": LATER.change.map("+{:g}".format), "Layer": LATER.layer}
        assert_drawn(chosen(spec, measure=name), "point", **shown, value=LATER[name])


def test_both_pairs_of_the_handover_carry_their_own_fraction():
    title = "Of the (token, layer) pairs at which the latent is active"
    for where, rows in HANDOVER.groupby("where"):
        spec = chosen(CHARTS["handover"]("Pairs").to_dict(), where=where)
        shown = {"pair": rows.pair, "Cosine similarity": rows.cosine, title: rows.fraction}
        assert_drawn(spec, "point", **shown)


def test_uniformity_stands_beside_its_null_models_with_intervals():
    spec = CHARTS["uniformity"]("Uniformity").to_dict()
    title = "Uniformity over the active latents (fraction)"
    shown = {"of": ONE.of.map(latents.OF), "Layer": ONE.layer}
    assert_drawn(spec, "point", **shown, **{title: ONE.r_l0})
    there = ONE[ONE.of != "alone"]
    shown = {"of": there.of.map(latents.OF), "Layer": there.layer}
    assert_drawn(spec, "rule mark", **shown, **{title: there.low, "high": there.high})


def test_over_sparsity_both_panels_are_of_the_layer_chosen():
    spec = CHARTS["over_sparsity"]("Over k").to_dict()
    assert spec["params"][0]["bind"]["options"] == [0, 1, 2]
    assert spec["params"][0]["value"] == 1
    rows = UNIFORMITY[UNIFORMITY.layer == 2]
    names = rows.of.map(latents.OF)
    share, number = spec["vconcat"]
    one, other = (chosen({**spec, "vconcat": [panel]}, layer_shown=2) for panel in (share, number))
    title = "Uniformity over the active latents (fraction)"
    assert_drawn(one, "point", of=names, l0=rows.l0, **{title: rows.r_l0})
    title = "That many latents (log scale)"
    l0 = {"L0 (active latents, log scale)": rows.l0}
    assert_drawn(other, "point", of=names, **l0, **{title: rows.latents})
