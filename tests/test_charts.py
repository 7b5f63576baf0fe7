"""Charts: what they draw, that they draw it the same way everywhere, and what they refuse."""

import json
import subprocess
import sys
from functools import cache
from xml.etree import ElementTree

import altair as alt
import numpy as np
import pandas as pd
import pytest
import vl_convert

from mlsae_book import charts

LAYERS, LATENTS, STEPS = 6, 40, 12


def training_log():
    step, layer = np.meshgrid(np.arange(STEPS), np.arange(LAYERS), indexing="ij")
    fvu = 0.1 + 0.02 * layer + np.exp(-step / (3 + layer))
    log = {"step": step, "tokens": 1000 * (step + 1), "layer": layer, "fvu": fvu}
    log |= {"loss": fvu.mean(axis=1, keepdims=True) + 0 * fvu, "dead_fraction": 0.01 * step}
    return pd.DataFrame({name: values.ravel() for name, values in log.items()})


def evaluation():
    values = np.linspace(0.1, 0.2, LAYERS) / 3
    return pd.DataFrame({"layer": range(LAYERS), **dict.fromkeys(charts.METRICS, values)})


def loss_log():
    tokens = np.arange(1, 9) * 1e6
    frames = [
        pd.DataFrame({"tokens": tokens, "split": split, "loss": 3 + gap + np.exp(-tokens / 2e6)})
        for split, gap in (("train", 0.0), ("validation", 0.1))
    ]
    return pd.concat(frames).assign(model="m")


def distributions():
    latent, layer = np.meshgrid(np.arange(LATENTS), np.arange(LAYERS), indexing="ij")
    weight = np.exp(-((layer - LAYERS * latent / LATENTS) ** 2) / 2)
    table = {"latent": latent, "order": latent, "layer": layer}
    table["probability"] = weight / weight.sum(axis=1, keepdims=True)
    return pd.DataFrame({name: values.ravel() for name, values in table.items()})


def prompt_norms():
    prompts = {"a b c": ["a", " b", " c"], "x\ny": ["x", "\n", "y"]}
    rows = [
        {"prompt": prompt, "position": i, "token": token, "layer": layer, "norm": 1 + i + layer / 3}
        for prompt, tokens in prompts.items()
        for i, token in enumerate(tokens)
        for layer in range(LAYERS)
    ]
    return pd.DataFrame(rows)


# name: (function, its table, the marks that must be drawn)
CASES = {
    "training_curves": (charts.training_curves, training_log, {"line": LAYERS + 1, "area": 1}),
    "metric_by_layer": (charts.metric_by_layer, evaluation, {"line": 2, "symbol": 2 * LAYERS}),
    "loss_curve": (charts.loss_curve, loss_log, {"line": 2}),
    "heatmap": (charts.heatmap, distributions, {"rect": LATENTS * LAYERS}),
    "prompt_norms": (charts.prompt_norms, prompt_norms, {"rect": 3 * LAYERS}),
}
every_chart = pytest.mark.parametrize("name", CASES)


def draw(name):
    function, table, _ = CASES[name]
    return json.dumps(function(table(), "A finding", "How to read it").to_dict())


@cache
def drawn(name):
    return draw(name)


def specification(name):
    return json.loads(drawn(name))


def chosen(spec, **values):
    """The chart when the reader has made these choices."""
    spec = json.loads(json.dumps(spec))
    params = {param["name"]: param for param in spec["params"]}
    for name, value in values.items():
        params[name]["value"] = value
    return spec


def said(spec, kind):
    """What each mark of a kind tells a screen reader: what is encoded, by the title of its axis or
    legend, and the tooltip. One row a mark."""
    svg = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec, vl_version="5.8"))
    labels = [e.get("aria-label") for e in svg.iter() if e.get("aria-roledescription") == kind]
    parts = [[part.rpartition(": ") for part in label.split("; ")] for label in labels]
    return pd.DataFrame([{title: value for title, _, value in one} for one in parts])


def number(value):
    """What is a number, also in the words of a chart; other text as it is."""
    text = str(value).replace("−", "-")
    factor = {"%": 0.01, "k": 1e3, "M": 1e6}.get(text[-1:], 1)
    try:
        return float(text if factor == 1 else text[:-1]) * factor
    except ValueError:
        return text


def assert_drawn(spec, kind, /, **columns):
    """Marks of a kind are one a row and show these columns by these titles, to three digits.

    The first columns tell the rows apart, since marks come in any order.
    """
    found = said(spec, kind)[list(columns)].map(number).sort_values(list(columns))
    expected = pd.DataFrame({name: [*map(number, values)] for name, values in columns.items()})
    expected = expected.sort_values(list(columns))
    pd.testing.assert_frame_equal(
        found.reset_index(drop=True), expected.reset_index(drop=True), rtol=2e-3, atol=1e-9
    )


def drawn_marks(spec):
    """Marks of the drawn chart by type: the paths of every mark group of Vega's SVG."""
    svg = ElementTree.fromstring(vl_convert.vegalite_to_svg(spec, vl_version="5.8"))
    marks = {}
    for group in svg.iter("{http://www.w3.org/2000/svg}g"):
        classes = (group.get("class") or "").split()
        if "role-mark" in classes:
            kind = classes[0].removeprefix("mark-")
            paths = [p for p in group if p.tag.endswith("path") and p.get("d")]
            marks[kind] = marks.get(kind, 0) + len(paths)
    return marks


@every_chart
def test_every_row_is_drawn_by_the_oldest_vega_lite_at_hand(name):
    """JupyterLab 4.6 carries Vega-Lite 5.6; 5.8 is the oldest that vl-convert carries."""
    marks = drawn_marks(specification(name))
    for kind, count in CASES[name][2].items():
        assert marks[kind] == count, marks


def test_marks_stand_where_the_table_says():
    fvu = "FVU (fraction of variance unexplained, log scale)"
    spec, log = specification("training_curves"), training_log()
    first = log[log.step == 0]  # of a line its first point is told
    values = {"Layer": first.layer, fvu: first.fvu, "loss of the step": first.loss}
    marks = said(spec, "line mark").dropna(subset="Layer")
    assert_drawn(spec, "area mark", **{"Dead latents (fraction of all)": [0], "dead": [0]})
    for title, column in values.items():
        assert [*map(number, marks[title])] == pytest.approx(column.tolist(), rel=2e-3)
    for metric, title in charts.METRICS.items():
        table = evaluation().assign(**{metric: np.arange(2.0, 2.0 + LAYERS)})
        spec = charts.metric_by_layer(table, "A finding", beneath="none").to_dict()
        spec = chosen(spec, metric=metric)
        assert_drawn(spec, "point", layer=table.layer, value=table[metric], Layer=table.layer)
        [parameter] = spec["params"]
        labels = dict(zip(parameter["bind"]["options"], parameter["bind"]["labels"], strict=True))
        assert title.startswith(labels[metric])
        assert f">{title}</text>" in vl_convert.vegalite_to_svg(spec, vl_version="5.8")
    table = loss_log()
    shown = {"split": table.split[0], "Loss (nats per token)": table.loss[0]}
    assert_drawn(specification("loss_curve"), "line mark", **shown)
    table = distributions()
    shown = {"40 latents": table.order, "end": table.order + 1, "Layer": table.layer}
    shown |= {"P(layer | latent)": table.probability, "latent": table.latent}
    peak = table.groupby("latent").probability.transform("max")
    assert_drawn(specification("heatmap"), "rect mark", **shown, **{"largest over layers": peak})
    table = prompt_norms()
    for prompt, rows in table.groupby("prompt"):
        names = rows.position.astype(str) + " " + rows.token.str.replace(r"\s", "␣", regex=True)
        shown = {"Layer": rows.layer, "Token": names, "L2 norm (log scale)": rows.norm}
        spec = chosen(specification("prompt_norms"), prompt=prompt)
        assert_drawn(spec, "rect mark", **shown)


def test_metrics_are_named_after_what_they_measure():
    words = {
        "fvu_global": "global variance",
        "fvu_per_dimension": "per-dimension variance",
        "mse": "MSE (squared activation units",
        "l1": "L1 (sum of latent activations",
        "l0": "L0 (active latents",
        "delta_ce": "Delta CE (nats",
        "kl": "KL, original to replaced (nats",
    }
    assert charts.METRICS.keys() == words.keys()
    assert all(words[name] in title for name, title in charts.METRICS.items())


@every_chart
def test_same_table_same_specification(name):
    assert draw(name) == drawn(name)


@every_chart
def test_nothing_is_named_by_a_counter(name):
    for automatic in ("view_", "param_", "concat_"):
        assert f'"{automatic}' not in drawn(name)


@every_chart
def test_width_is_left_to_the_page(name):
    """JupyterLab's tab hangs on Vega-Lite's width "container"."""
    spec = specification(name)
    assert '"container"' not in drawn(name)
    assert not [part for part in (spec, *spec.get("vconcat", [])) if "width" in part]


@every_chart
def test_charts_carry_four_digits_and_only_the_columns_they_draw(name):
    function, table, _ = CASES[name]
    spec = function(table().assign(unused=1.0), "A finding").to_dict()
    rows = [row for rows in spec["datasets"].values() for row in rows]
    assert not any("unused" in row for row in rows)
    floats = [value for row in rows for value in row.values() if isinstance(value, float)]
    assert floats
    assert all(value == float(f"{value:.4g}") for value in floats)


@every_chart
def test_a_missing_column_is_named(name):
    function, table, _ = CASES[name]
    whole = table()
    required = [c for c in whole if c not in charts.METRICS]
    for column in required:
        with pytest.raises(ValueError, match=f"{name}: the table lacks the column {column};"):
            function(whole.drop(columns=column), "A finding")


def test_a_table_without_a_single_metric_is_refused():
    with pytest.raises(ValueError, match="at least one of the columns fvu_global"):
        charts.metric_by_layer(pd.DataFrame({"layer": [0], "loss": [1.0]}), "A finding")


@every_chart
def test_an_empty_or_too_long_table_is_refused(name):
    function, table, _ = CASES[name]
    with pytest.raises(ValueError, match="no rows"):
        function(table().iloc[:0], "A finding")
    copies = charts.MAX_ROWS // len(table()) + 1
    with pytest.raises(ValueError, match="at most 5000; aggregate"):
        function(pd.concat([table()] * copies), "A finding")


def test_the_reader_chooses_the_metric_in_the_chart_itself():
    """Another value of the bound parameter draws other points and another axis title."""
    table = evaluation().assign(l0=np.arange(LAYERS, 0, -1.0))
    spec = charts.metric_by_layer(table, "A finding").to_dict()
    for name, first in (("metric", "fvu_global"), ("beneath", "delta_ce")):
        [parameter] = [p for p in spec["params"] if p["name"] == name]
        assert parameter["bind"]["options"] == list(charts.METRICS)
        before = vl_convert.vegalite_to_svg(spec, vl_version="5.8")
        after = vl_convert.vegalite_to_svg(chosen(spec, **{name: "l0"}), vl_version="5.8")
        assert charts.METRICS[first] in before
        assert charts.METRICS["l0"] in after
        assert charts.METRICS[first] not in after


def test_layers_of_deep_and_shallow_models_are_placed_by_their_fraction_of_all():
    shallow = evaluation().assign(model="shallow").head(2)
    deep = evaluation().assign(model="deep").head(4)
    table = pd.concat([shallow, deep]).assign(l0=range(6))
    options = {"color": "model", "relative": True, "beneath": "none"}
    spec = charts.metric_by_layer(table, "A finding", **options).to_dict()
    columns = {
        "model": table.model,
        "layer": table.layer,
        "relative_layer": [0, 1 / 2, 0, 1 / 4, 1 / 2, 3 / 4],
    }
    assert_drawn(chosen(spec, metric="l0"), "point", **columns)


def test_the_threshold_counts_the_latents_that_reach_it():
    table = distributions()
    spec = charts.heatmap(table, "A finding").to_dict()
    spec["params"][0]["value"] = 0.45
    kept = int((table.groupby("latent")["probability"].max() >= 0.45).sum())
    assert 0 < kept < LATENTS
    svg = vl_convert.vegalite_to_svg(spec, vl_version="5.8")
    assert f"{kept} of {LATENTS} latents ({kept / LATENTS:.0%})" in svg


def test_the_tokens_of_the_chosen_prompt_are_written_beneath_it():
    spec = charts.prompt_norms(prompt_norms(), "A finding").to_dict()
    spec["params"][0]["value"] = "x\ny"
    svg = vl_convert.vegalite_to_svg(spec, vl_version="5.8")
    assert ">␣</text>" in svg
    single = prompt_norms().query("prompt == 'a b c'")
    assert "bind" not in charts.prompt_norms(single, "A finding").to_dict()["params"][0]


def test_title_and_subtitle_are_also_what_a_screen_reader_reads():
    for name in CASES:
        spec = specification(name)
        assert spec["title"] == {"text": "A finding", "subtitle": "How to read it"}
        assert spec["description"] == "A finding. How to read it"


def test_the_book_renderer_emits_one_mime_type_beside_plain_text(monkeypatch):
    renderer, theme = alt.renderers.active, alt.theme.active
    try:
        charts.use_book_theme()
        bundle = charts.loss_curve(loss_log(), "A finding")._repr_mimebundle_()
        assert set(bundle) == {charts.MIME, "text/plain"}
        assert bundle["text/plain"] == "Chart: A finding"
        assert bundle[charts.MIME]["$schema"] == charts.SCHEMA
        assert bundle[charts.MIME]["config"] == charts.theme()
    finally:
        alt.renderers.enable(renderer)
        alt.theme.enable(theme)


def test_importing_charts_imports_neither_torch_nor_the_rest_of_the_package():
    code = (
        "import sys, mlsae_book.charts; "
        "print([m for m in sys.modules if m == 'torch' or m.startswith('mlsae')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "['mlsae_book', 'mlsae_book.charts.names', 'mlsae_book.charts']"


# Colours ----------------------------------------------------------------------------------------


def linear(color):
    """Linear light of "#rrggbb", per channel."""
    srgb = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def contrast(a, b):
    """Contrast ratio of WCAG 2."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (a, b))
    return (high + 0.05) / (low + 0.05)


def lab(rgb):
    """CIELAB (D65) of linear light."""
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    ratio = to_xyz @ np.clip(rgb, 0, 1) / [0.9505, 1.0, 1.089]
    f = np.where(ratio > 0.008856, np.cbrt(ratio), 7.787 * ratio + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), severity 1
DEFICIENCIES = {
    "none": np.eye(3),
    "protan": np.array(
        [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0519]]
    ),
    "deutan": np.array(
        [[0.3673, 0.8606, -0.2280], [0.2801, 0.6727, 0.0473], [-0.0118, 0.0429, 0.9689]]
    ),
}


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_colours_contrast_with_the_page(mode):
    page = charts.PAGE[mode]
    assert contrast(charts.INK[mode], page) >= 7
    assert contrast(charts.MUTED[mode], page) >= 4.5
    for color in charts.CATEGORY[mode]:
        assert contrast(color, page) >= 3, color


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
@pytest.mark.parametrize("mode", ["light", "dark"])
def test_categories_can_be_told_apart(mode, deficiency):
    """The first four, in CIELAB distance, also without red or green cones."""
    points = [lab(DEFICIENCIES[deficiency] @ linear(c)) for c in charts.CATEGORY[mode][:4]]
    for i, a in enumerate(points):
        for b in points[:i]:
            assert np.linalg.norm(a - b) > 15


def test_a_chart_that_leads_to_cards_is_the_same_otherwise():
    plain = charts.heatmap(distributions(), "A finding")
    before = plain.to_dict()
    leading = charts.with_cards(plain).to_dict()
    assert leading.pop("usermeta") == {"cards": "explorer.html"}
    assert leading == before == plain.to_dict()
