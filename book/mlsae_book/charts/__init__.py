"""Charts: each function takes one finished tidy table and returns one Altair chart.

Nothing is computed here that a reader would quote: sums and means belong to ``analysis``.  A chart
keeps four significant digits of its table, names every view and parameter, and stays within
Vega-Lite 5.6, so that the same table gives the same JSON everywhere and JupyterLab draws it without
a network.  Importing this module imports neither torch nor anything else of ``mlsae_core``.

Colours are set by the theme alone, once for light and once for dark pages.  They follow Okabe and
Ito (2008), "Color universal design", darkened or lightened until they contrast with the page by
3 : 1; layers take a part of the scheme plasma, whose lightness rises with the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np
import pandas as pd

from mlsae_book.charts import names

MIME = "application/vnd.vegalite.v5+json"
SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"
MAX_ROWS = 5000
DIGITS = 4
NOTHING = 1e-12

PAGE = {"light": "#ffffff", "dark": "#121212"}
INK = {"light": "#24292f", "dark": "#e6e6e6"}
MUTED = {"light": "#59636e", "dark": "#a3adb8"}
GRID = {"light": "#e4e7eb", "dark": "#333a44"}
#: For models and other unordered things.
CATEGORY = {
    "light": ["#0072b2", "#c24e00", "#00805d", "#b0508a", "#8a6a00", "#5b5b5b", "#111111"],
    "dark": ["#56b4e9", "#f08a3c", "#2fc49b", "#d07fb0", "#e3c14a", "#b4b4b4", "#fafafa"],
}
#: For what stands for no layer or model among them; it contrasts with both pages.
NEUTRAL = "#808080"
#: For layers: lightness is monotone, so that the order survives a grey print.
LAYERS = {
    "light": {"scheme": "plasma", "extent": [0.0, 0.72]},
    "dark": {"scheme": "plasma", "extent": [0.38, 1.0]},
}
#: For magnitudes: zero has nearly the colour of the page.
HEAT = {"light": {"scheme": "purpleblue"}, "dark": {"scheme": "darkblue"}}

#: Axis titles of the metrics that `metric_by_layer` draws, with their units.
METRICS = {
    "fvu_global": "FVU, global variance (fraction)",
    "fvu_per_dimension": "FVU, per-dimension variance (fraction)",
    "mse": "MSE (squared activation units per dimension)",
    "l1": "L1 (sum of latent activations per token)",
    "l0": "L0 (active latents per token)",
    "delta_ce": "Delta CE (nats per predicted token)",
    "kl": "KL, original to replaced (nats per token)",
}


def theme(dark: bool = False) -> dict[str, Any]:
    """Vega-Lite configuration of every chart; ``dark`` for pages with a dark background."""
    mode = "dark" if dark else "light"
    ink, muted, grid = INK[mode], MUTED[mode], GRID[mode]
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"
    text = {"labelColor": muted, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": PAGE[mode],
        "font": font,
        # Charts name no width: a page stretches them to its column, JupyterLab draws them so wide.
        # (It hangs on Vega-Lite's own "container".)
        "view": {"stroke": None} | dict.fromkeys(("continuousWidth", "discreteWidth"), 600),
        "axis": {
            **text,
            "titleFontWeight": "normal",
            "gridColor": grid,
            "domainColor": muted,
            "tickColor": muted,
            "labelOverlap": True,
        },
        "axisX": {"grid": False, "titlePadding": 8},
        # The title of the y axis stands level above it, where it can be read.
        "axisY": {
            "domain": False,
            "ticks": False,
            "titleAngle": 0,
            "titleAlign": "left",
            "titleAnchor": "end",
            "titleX": 0,
            "titleY": -12,
        },
        "legend": {
            **text,
            "titleFontWeight": "normal",
            "orient": "top",
            "offset": 34,
            "symbolStrokeWidth": 3,
            "gradientThickness": 10,
        },
        "title": {
            "anchor": "start",
            "color": ink,
            "subtitleColor": muted,
            "fontSize": 16,
            "subtitleFontSize": 12,
            "offset": 18,
        },
        "range": {
            "category": CATEGORY[mode],
            "ordinal": LAYERS[mode],
            "heatmap": HEAT[mode],
            "ramp": HEAT[mode],
        },
        "line": {"strokeWidth": 2, "color": CATEGORY[mode][0]},
        "point": {"filled": True, "size": 45, "color": CATEGORY[mode][0]},
        "area": {"color": CATEGORY[mode][0], "opacity": 0.35},
        "bar": {"color": CATEGORY[mode][0]},
        "text": {"color": ink, "fontSize": 12},
        "rule": {"color": muted, "strokeDash": [4, 3]},
    }


def use_book_theme() -> None:
    """Make Altair draw in the book's theme and emit the one mime type that works everywhere; tables
    and tooltips get names for people.

    The static page (through ``mlsae_book.sphinx_ext``) and JupyterLab both draw Vega-Lite 5 JSON from
    files of their own; Altair's default html would load its scripts from the network.
    """
    names.show()

    def book(spec: dict, **_: Any) -> dict[str, Any]:
        return {MIME: {**names.explained(spec), "$schema": SCHEMA}, "text/plain": _plain(spec)}

    alt.renderers.register("book", book)
    alt.renderers.enable("book")
    alt.theme.register("book", enable=True)(lambda: alt.theme.ThemeConfig({"config": theme()}))


def training_curves(log: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.VConcatChart:
    """FVU of every layer, and beneath it the fraction of dead latents, against tokens seen.

    ``log`` has one row per (step, layer): ``step``, ``tokens``, ``layer``, ``fvu``, ``loss`` and
    ``dead_fraction`` (0 to 1); the last two repeat over the layers of a step.
    """
    log = _table(log, "training_curves", "step", "tokens", "layer", "fvu", "loss", "dead_fraction")
    layers = [int(layer) for layer in sorted(log["layer"].unique())]
    chosen = alt.selection_point(
        name="chosen_layer",
        fields=["layer"],
        bind=alt.binding_select(
            options=[None, *layers], labels=["all", *map(str, layers)], name="Layer "
        ),
    )
    tokens = alt.X("tokens:Q", axis=alt.Axis(format="~s", tickCount=6))
    fvu = (
        alt.Chart(log, name="fvu", height=260)
        .mark_line()
        .encode(
            x=tokens.title(None),
            y=alt.Y("fvu:Q", title="FVU (fraction of variance unexplained, log scale)").scale(
                type="log", nice=False
            ),
            color=alt.Color("layer:O", title="Layer"),
            opacity=alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.12)),
            tooltip=[
                alt.Tooltip("tokens:Q", title="tokens", format="~s"),
                alt.Tooltip("layer:O", title="layer"),
                alt.Tooltip("fvu:Q", title="FVU"),
                alt.Tooltip("loss:Q", title="loss of the step"),
            ],
        )
        .add_params(chosen)
    )
    steps = log.drop_duplicates("step")
    dead = (
        alt.Chart(steps, name="dead", height=70)
        .mark_area(line={"strokeWidth": 1.5})
        .encode(
            x=tokens.title("Training tokens"),
            y=alt.Y(
                "dead_fraction:Q",
                title="Dead latents (fraction of all)",
                axis=alt.Axis(format=".0%", tickCount=3),
            ).scale(domain=[0, max(0.1, float(steps["dead_fraction"].max()))]),
            tooltip=[
                alt.Tooltip("tokens:Q", title="tokens", format="~s"),
                alt.Tooltip("dead_fraction:Q", title="dead", format=".1%"),
            ],
        )
    )
    return _titled(alt.vconcat(fvu, dead, spacing=30), title, subtitle)


def metric_by_layer(
    table: pd.DataFrame,
    title: str,
    subtitle: str | None = None,
    color: str | None = None,
    relative: bool = False,
    beneath: str = "delta_ce",
) -> alt.LayerChart | alt.VConcatChart:
    """Two metrics per layer, one above the other; the reader chooses either.

    ``table`` has one row per ``layer`` (and per value of the column named by ``color``, such as
    ``model``) and at least one column named in `METRICS`. The first of these is drawn, and
    ``beneath`` where it is another. With ``relative`` layers are placed by their fraction of the
    layers of each ``color``.
    """
    metrics = [name for name in METRICS if name in table]
    if not metrics:
        raise ValueError(
            f"metric_by_layer: expected at least one of the columns {', '.join(METRICS)}; "
            f"the table has {', '.join(map(str, table.columns))}"
        )
    keys = ["layer", color] if color else ["layer"]
    table = _table(table, "metric_by_layer", *keys, *metrics)
    x = alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0))
    if relative:
        count = table.groupby(color).layer.transform("max") + 1
        table, keys = table.assign(relative_layer=table.layer / count), [*keys, "relative_layer"]
        axis = alt.Axis(format=".1f", tickCount=5)
        title_of_x = "Relative layer (layer / number of layers)"
        x = alt.X("relative_layer:Q", title=title_of_x, axis=axis)
    long = table.melt(id_vars=keys, value_vars=metrics, var_name="metric").dropna(subset="value")
    if color:
        long[color] = long[color].replace(names.NAMES)
    long = _limited(long, "metric_by_layer")
    chosen = {"metric": metrics[0], "beneath": beneath}
    if beneath not in metrics[1:]:
        del chosen["beneath"]
    panels = []
    for name, first in chosen.items():
        metric = _select_metric(metrics, name, first)
        points = (
            alt.Chart(long, name=f"{name}_by_layer")
            .transform_filter(alt.datum.metric == metric)
            .mark_line(point=True)
            .encode(
                x=x,
                y=alt.Y("value:Q", title=None),
                tooltip=[*keys, alt.Tooltip("value:Q")],
            )
        )
        if color:
            legend = alt.Legend(title=None, columns=3 if relative else 4)
            order = {"sort": list(long[color].unique())} if relative else {}
            shape = alt.Shape(f"{color}:N", legend=None)
            colors = alt.Color(f"{color}:N", legend=legend, **order)
            points = points.encode(color=colors, shape=shape)
        panels.append(_level_axis_title(points, name, METRICS, metrics, metric))
    if len(panels) == 1:
        return _titled(panels[0], title, subtitle)
    panels = [panel.properties(height=220) for panel in panels]
    return _titled(alt.vconcat(*panels, spacing=40), title, subtitle)


def loss_curve(log: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """Loss of language models against tokens seen; the reader chooses the model.

    ``log`` has one row per (model, tokens, split): ``model``, ``tokens``, ``split`` (such as
    "train" and "validation") and ``loss`` in nats per token.
    """
    log = _table(log, "loss_curve", "model", "tokens", "split", "loss")
    models = list(log["model"].unique())
    model = _select("model", models, "Model")
    chart = (
        alt.Chart(log, name="loss")
        .transform_filter(alt.datum.model == model)
        .mark_line()
        .encode(
            x=alt.X("tokens:Q", title="Training tokens", axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("loss:Q", title="Loss (nats per token)").scale(
                domain=[float(np.floor(log["loss"].min())), float(np.ceil(log["loss"].max()))]
            ),
            color=alt.Color("split:N", title=None),
            strokeDash=alt.StrokeDash("split:N", title=None),
            tooltip=[
                "model:N",
                alt.Tooltip("tokens:Q", title="tokens", format="~s"),
                alt.Tooltip("split:N"),
                alt.Tooltip("loss:Q", title="nats per token"),
            ],
        )
        .add_params(model)
    )
    return _titled(chart.properties(height=280), title, subtitle)


def heatmap(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """P(layer | latent) of many latents; the reader chooses how sharp a latent has to be.

    ``table`` has one row per (latent, layer): ``latent``, ``layer``, ``probability`` (sums to one
    over the layers of a latent) and ``order`` (0, 1, … from left to right: the sort rule belongs
    into the subtitle).  The slider fades the latents whose largest probability is smaller, and
    the line above the picture says how many are left.
    """
    table = _table(table, "heatmap", "latent", "layer", "probability", "order")
    threshold = alt.param(
        name="least_peak",
        value=0,
        bind=alt.binding_range(min=0, max=1, step=0.05, name="Largest probability at least "),
    )
    base = alt.Chart(table).transform_joinaggregate(peak="max(probability)", groupby=["latent"])
    width = int(table["order"].max()) + 1
    cells = (
        _latent_cells(base, f"{width} latents", width)
        .encode(
            color=alt.Color("probability:Q", title="P(layer | latent)").scale(domain=[0, 1]),
            opacity=alt.when(alt.datum.peak >= threshold)
            .then(alt.value(1))
            .otherwise(alt.value(0.08)),
            tooltip=[
                alt.Tooltip("latent:O"),
                alt.Tooltip("layer:O"),
                alt.Tooltip("probability:Q", title="P(layer | latent)"),
                alt.Tooltip("peak:Q", title="largest over layers"),
            ],
        )
        .properties(name="heatmap")
    )
    share = (
        base.transform_aggregate(peak="max(peak)", groupby=["latent"])
        .transform_calculate(kept=alt.expr.if_(alt.datum.peak >= threshold, 1, 0))
        .transform_aggregate(kept="sum(kept)", all="count()")
        .transform_calculate(
            label="datum.kept + ' of ' + datum.all + ' latents (' + format(datum.kept / datum.all,"
            " '.0%') + ')'"
        )
        .mark_text(align="right", baseline="bottom")
        .encode(x=alt.value("width"), y=alt.value(-8), text="label:N")
        .properties(name="share")
    )
    chart = alt.layer(cells, share).add_params(threshold)
    return _titled(chart.properties(height=220), title, subtitle)


def with_cards(chart: alt.TopLevelMixin) -> alt.TopLevelMixin:
    """The same chart, in which a click on a latent leads to its card in the explorer.

    For charts of the run of ``experiments/default.yml``, whose latents have cards: data with a
    field ``latent``.
    """
    chart = chart.copy()
    chart.usermeta = {"cards": "explorer.html"}
    return chart


def prompt_norms(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """Norm of the activations at every token and layer; the reader chooses the prompt.

    ``table`` has one row per (prompt, position, layer): ``prompt``, ``position`` (0, 1, …),
    ``token`` (its text), ``layer`` and ``norm`` (L2, activation units).
    """
    table = _table(table, "prompt_norms", "prompt", "position", "token", "layer", "norm")
    prompts = list(table["prompt"].unique())
    prompt = _select_prompt("prompt", prompts, 40)
    # Tokens repeat, their positions do not: both make the label, of which the token is shown.
    tokens = alt.Axis(labelExpr="slice(datum.label, indexof(datum.label, ' ') + 1)", labelAngle=-60)
    chart = (
        alt.Chart(table, name="prompt_norms")
        .transform_filter(alt.datum.prompt == prompt)
        .transform_calculate(label="datum.position + ' ' + replace(datum.token, /\\s/g, '␣')")
        .mark_rect()
        .encode(
            x=alt.X("label:O", title="Token", sort=alt.EncodingSortField("position"), axis=tokens),
            y=alt.Y("layer:O", title="Layer", sort="descending"),
            color=alt.Color("norm:Q", title="L2 norm (log scale)").scale(
                type="log", domain=[float(table["norm"].min()), float(table["norm"].max())]
            ),
            tooltip=["token:N", "position:Q", "layer:O", alt.Tooltip("norm:Q", title="L2 norm")],
        )
        .add_params(prompt)
    )
    return _titled(chart.properties(height=220), title, subtitle)


def _select(
    name: str, options: Sequence, label: str, labels: Sequence[str] | None = None, value=None
) -> alt.Parameter:
    """A dropdown, the first option chosen where no value is; without one where nothing differs."""
    param = alt.param(name=name, value=options[0] if value is None else value)
    if len(options) > 1:
        shown = {"labels": list(labels)} if labels else {}
        param.param.bind = alt.binding_select(options=list(options), name=f"{label} ", **shown)
    return param


def _select_metric(
    metrics: Sequence[str], name: str = "metric", first: str | None = None
) -> alt.Parameter:
    """A dropdown of names among `METRICS`, shown without their units."""
    label = "Beneath" if name == "beneath" else "Metric"
    return _select(name, metrics, label, [METRICS[m].split(" (")[0] for m in metrics], first)


def _select_prompt(name: str, prompts: Sequence[str], most: int) -> alt.Parameter:
    """A dropdown of prompts, of which at most so many characters are shown."""
    labels = [p if len(p) < most else f"{p[: most - 2]}…" for p in prompts]
    return _select(name, prompts, "Prompt", labels)


def _latent_cells(base: alt.Chart, title: str, width: int | None = None) -> alt.Chart:
    """Cells of a heatmap of layers over latents, side by side in their ``order``."""
    scale = {} if width is None else {"domain": [0, width]}
    return (
        base.transform_calculate(end="datum.order + 1")
        .mark_rect()
        .encode(
            x=alt.X("order:Q", title=title, axis=alt.Axis(labels=False, ticks=False)).scale(
                nice=False, **scale
            ),
            x2="end:Q",
            y=alt.Y("layer:O", title="Layer", sort="descending"),
        )
    )


def _by_run(**axis) -> alt.X:
    """The runs of a sweep in their order."""
    order = alt.EncodingSortField("position", op="min")
    return alt.X("run:O", title=None, sort=order, axis=alt.Axis(**{"labelAngle": 0, **axis}))


def _level_axis_title(
    chart, name: str, titles: dict, names: Sequence[str], param
) -> alt.LayerChart:
    """Write above the y axis the title of the chosen metric: an axis title cannot change itself."""
    label = _chosen_title(f"{name}_title", titles, names, param)
    return alt.layer(chart, label).add_params(param).properties(height=280)


def _chosen_title(
    name: str, titles: dict, names: Sequence[str], param, where: str = ""
) -> alt.Chart:
    """Text above a y axis: the title of what is chosen, and ``where`` a panel stands."""
    lookup = "{" + ", ".join(f"{n!r}: {titles[n] + where!r}" for n in names) + "}"
    return (
        alt.Chart(alt.InlineData([{}]), name=name)
        .mark_text(align="left", baseline="bottom", text=alt.ExprRef(f"({lookup})[{param.name}]"))
        .encode(x=alt.value(0), y=alt.value(-8))
    )


def _titled(chart, title: str, subtitle: str | None):
    """The title says what is found, the subtitle how to read the chart; both describe it aloud."""
    params = alt.TitleParams(title, subtitle=subtitle) if subtitle else alt.TitleParams(title)
    description = f"{title}. {subtitle}" if subtitle else title
    return chart.properties(title=params, description=description)


def _table(table: pd.DataFrame, chart: str, *columns: str) -> pd.DataFrame:
    missing = [name for name in columns if name not in table]
    if missing:
        raise ValueError(
            f"{chart}: the table lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}; "
            f"it has {', '.join(map(str, table.columns))}"
        )
    if table.empty:
        raise ValueError(f"{chart}: the table has no rows, so there is nothing to draw")
    return _limited(table[list(dict.fromkeys(columns))], chart).apply(_significant)


def _limited(table: pd.DataFrame, chart: str) -> pd.DataFrame:
    if len(table) > MAX_ROWS:
        raise ValueError(
            f"{chart}: the table has {len(table)} rows, a page carries at most {MAX_ROWS}; "
            "aggregate or sample it first"
        )
    return table


def _significant(column: pd.Series) -> pd.Series:
    """Round floats to `DIGITS` significant digits: what a chart shows is then stable.

    What is `NOTHING` beside the column's largest number is a rounding error and becomes 0.
    """
    if not pd.api.types.is_float_dtype(column):
        return column
    least = NOTHING * column.abs().where(np.isfinite(column)).max()
    column = column.mask(column.abs() < least, 0.0)
    return column.map(lambda x: float(f"{x:.{DIGITS}g}") if np.isfinite(x) else x)


def _plain(spec: dict) -> str:
    return f"Chart: {spec.get('description', 'no description')}"
