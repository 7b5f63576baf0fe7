"""Charts of how well dictionaries reconstruct, over R and k, and of what sparsity costs."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import (
    METRICS,
    NEUTRAL,
    _by_run,
    _chosen_title,
    _level_axis_title,
    _limited,
    _select,
    _select_metric,
    _table,
    _titled,
)

_MEAN = "mean"  # `tables.fidelity.MEAN`


def _layers(table: pd.DataFrame) -> list[str]:
    """The layers of a table, which are text, in their order; the mean comes last."""
    return sorted(table["layer"].unique(), key=lambda x: (x == _MEAN, len(x), x))


def _metric(table: pd.DataFrame) -> tuple[alt.Parameter, list[str]]:
    found = [name for name in METRICS if name in set(table["metric"])]
    return _select_metric(found), found


def over_sweep(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.VConcatChart:
    """A metric over what was swept, a panel for each; the reader chooses the metric and the layers.

    ``table`` is what `tables.fidelity.over` gives: one row per ``sweep``, ``run``, ``position``,
    ``layer`` (text; "mean" is the mean over layers), ``metric``, ``value``.
    """
    table = _table(table, "over_sweep", "sweep", "run", "position", "layer", "metric", "value")
    metric, metrics = _metric(table)
    shown = _select("shown", ["all", _MEAN], "Layers", ["each, and their mean", "mean alone"])
    is_mean = alt.datum.layer == _MEAN
    panels = []
    for number, sweep in enumerate(table["sweep"].unique()):
        # One mark for both: a layer of which nothing is shown would have no scale.
        lines = (
            alt.Chart(table, name=f"layers_{number}")
            .transform_filter(alt.datum.sweep == sweep)
            .transform_filter(alt.datum.metric == metric)
            .transform_filter(f"datum.layer == '{_MEAN}' || shown == 'all'")
            .mark_line(point=True)
            .encode(
                x=_by_run(),
                y=alt.Y("value:Q", title=None),
                tooltip=["sweep:N", "run:N", "layer:N", "value:Q"],
                color=alt.when(is_mean)
                .then(alt.value(NEUTRAL))
                .otherwise(alt.Color("layer:O", title="Layer").scale(domain=_layers(table)[:-1])),
                strokeDash=alt.when(is_mean).then(alt.value([6, 3])).otherwise(alt.value([1, 0])),
                strokeWidth=alt.when(is_mean).then(alt.value(3.5)).otherwise(alt.value(2)),
            )
        )
        text = _chosen_title(f"title_{number}", METRICS, metrics, metric, f", over {sweep}")
        panels.append(alt.layer(lines, text).properties(height=220))
    chart = alt.vconcat(*panels, spacing=40).resolve_scale(y="shared")
    return _titled(chart.add_params(metric, shown), title, subtitle)


def repeated(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """A metric by layer, its mean over runs and its range; the reader chooses the metric.

    ``table`` is what `tables.fidelity.repeated` gives: ``layer`` (text), ``metric``, ``mean``,
    ``low``, ``high``.
    """
    table = _table(table, "repeated", "layer", "metric", "mean", "low", "high")
    metric, metrics = _metric(table)
    base = (
        alt.Chart(table)
        .transform_filter(alt.datum.metric == metric)
        .encode(x=alt.X("layer:O", title="Layer", sort=_layers(table), axis=alt.Axis(labelAngle=0)))
    )
    tooltip = ["layer:O", "mean:Q", "low:Q", "high:Q"]
    spans = base.mark_rule(strokeDash=[], strokeWidth=3, opacity=0.6).encode(
        y=alt.Y("low:Q", title=None), y2="high:Q", tooltip=tooltip
    )
    points = base.mark_point().encode(y=alt.Y("mean:Q", title=None), tooltip=tooltip)
    both = alt.layer(spans.properties(name="ranges"), points.properties(name="means"))
    return _titled(_level_axis_title(both, "metric", METRICS, metrics, metric), title, subtitle)


def against_sparsity(
    table: pd.DataFrame, title: str, subtitle: str | None = None
) -> alt.LayerChart:
    """What is lost against L0, one line a layer (Gemma Scope, Figures 13 and 14).

    ``table`` has one row per run and ``layer``: ``l0`` (mean active latents per token) and columns
    named in `METRICS`, among which the reader chooses.
    """
    metrics = [name for name in METRICS if name in table and name != "l0"]
    if not metrics:
        raise ValueError(
            f"against_sparsity: expected at least one of the columns {', '.join(METRICS)}; the "
            f"table has {', '.join(map(str, table.columns))}"
        )
    table = _table(table, "against_sparsity", "layer", "l0", *metrics)
    long = table.melt(["layer", "l0"], metrics, "metric", "value")
    metric, metrics = _metric(_limited(long, "against_sparsity"))
    lines = (
        alt.Chart(long, name="against_sparsity")
        .transform_filter(alt.datum.metric == metric)
        .mark_line(point=True)
        .encode(
            x=alt.X(
                "l0:Q", title="L0 (active latents per token, log scale)", axis=alt.Axis(format="~g")
            ).scale(type="log", base=2, nice=False),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("layer:O", title="Layer"),
            tooltip=["layer:O", "l0:Q", "value:Q"],
        )
    )
    return _titled(_level_axis_title(lines, "metric", METRICS, metrics, metric), title, subtitle)


def last_layer(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.VConcatChart:
    """FVU of the last layer and of the others, and beneath it the dead latents (Figure 11).

    ``table`` is what `tables.fidelity.last_layer` gives: ``run``, ``last``, ``others``, ``dead``.
    """
    table = _table(table, "last_layer", "run", "last", "others", "dead")
    table = table.assign(run=table["run"].astype(str))
    order = list(table["run"])
    long = table.melt("run", ["last", "others"], "layers", "fvu")
    long["layers"] = long["layers"].map({"last": "last layer", "others": "mean of the others"})
    x = alt.X("run:O", sort=order, axis=alt.Axis(labelAngle=0))
    fvu = (
        alt.Chart(long, name="fvu", height=220)
        .mark_line(point=True)
        .encode(
            x=x.title(None),
            y=alt.Y("fvu:Q", title=METRICS["fvu_global"]),
            color=alt.Color("layers:N", title=None),
            tooltip=["run:O", "layers:N", "fvu:Q"],
        )
    )
    dead = (
        alt.Chart(table, name="dead", height=90)
        .mark_bar()
        .encode(
            x=x.title("Expansion factor R"),
            y=alt.Y(
                "dead:Q",
                title="Dead latents (fraction of all)",
                axis=alt.Axis(format="~%", tickCount=3),
            ),
            tooltip=["run:O", alt.Tooltip("dead:Q", title="dead", format=".1%")],
        )
    )
    return _titled(alt.vconcat(fvu, dead, spacing=34), title, subtitle)


def dead_latents(
    table: pd.DataFrame, title: str, subtitle: str | None = None, by: str = "Run"
) -> alt.VConcatChart:
    """Dead latents in the course of training, and beneath them the last layer's FVU and AuxK
    (Figure 11), a line a run.

    ``table`` is what `tables.fidelity.auxiliary` gives: ``run``, ``tokens``, ``dead``, ``last``,
    ``auxk``. ``by`` is what tells the runs apart.
    """
    table = _table(table, "dead_latents", "run", "tokens", "dead", "last", "auxk")
    table = table.assign(run=table["run"].astype(str))
    order = list(table["run"].unique())
    panels = []
    for name, axis, height, scale, ticks in (
        ("dead", "Dead latents (fraction of all)", 180, {"zero": True}, {"format": "~%"}),
        ("last", "FVU of the last layer (log scale)", 130, {"type": "log", "nice": False}, {}),
        ("auxk", "AuxK, before its weight (fraction of the error's variance)", 110, {}, {}),
    ):
        x = alt.X("tokens:Q", axis=alt.Axis(format="~s", tickCount=6))
        panels.append(
            alt.Chart(table, name=f"course_{name}", height=height)
            .mark_line()
            .encode(
                x=x.title("Training tokens" if name == "auxk" else None),
                y=alt.Y(f"{name}:Q", title=axis, axis=alt.Axis(tickCount=4, **ticks)).scale(
                    **scale
                ),
                color=alt.Color("run:N", title=by, sort=order),
                strokeDash=alt.StrokeDash("run:N", sort=order, legend=None),
                tooltip=[
                    "run:N",
                    alt.Tooltip("tokens:Q", format="~s"),
                    "dead:Q",
                    "last:Q",
                    "auxk:Q",
                ],
            )
        )
    return _titled(alt.vconcat(*panels, spacing=30), title, subtitle)
