"""Charts of tuned lenses."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import METRICS, _level_axis_title, _select, _select_metric, _table, _titled


def divergences(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """KL of what each lens reads at each layer; a value of 0 is left out of the log scale.

    ``table`` is what `tables.lenses.divergences` returns.
    """
    table = _table(table[table["kl"] > 1e-6], "lenses.divergences", "lens", "layer", "kl")
    lenses = list(table["lens"].unique())
    chart = alt.Chart(table, name="divergences").mark_line(point=True)
    chart = chart.encode(
        x=alt.X("layer:O", title="Residual stream after block", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("kl:Q", title="KL to the model's prediction (nats per token, log scale)").scale(
            type="log"
        ),
        color=alt.Color("lens:N", title=None, sort=lenses),
        shape=alt.Shape("lens:N", legend=None, sort=lenses),
        tooltip=["lens:N", "layer:O", alt.Tooltip("kl:Q", title="nats per token")],
    )
    return _titled(chart.properties(height=280), title, subtitle)


def conditions(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """Condition number of I + W by layer at both alignments; the reader chooses the model.

    ``table`` is what `tables.lenses.conditions` returns.
    """
    table = _table(table, "lenses.conditions", "model", "alignment", "layer", "condition")
    models = list(table["model"].unique())
    model = _select("lens_model", models, "Model", value=models[-1])
    chart = (
        alt.Chart(table, name="conditions")
        .transform_filter(alt.datum.model == model)
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", title="Residual stream after block", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("condition:Q", title="Condition number of I + W (ratio, log scale)").scale(
                type="log", domainMin=1
            ),
            color=alt.Color("alignment:N", title=None),
            shape=alt.Shape("alignment:N", legend=None),
            tooltip=["model:N", "alignment:N", "layer:O", "condition:Q"],
        )
        .add_params(model)
    )
    return _titled(chart.properties(height=220), title, subtitle)


def metrics(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """Each case's metrics by layer (Fig. 12 and 22); the reader chooses the metric.

    ``table`` has one row per case and layer: ``case``, ``layer``, ``metric`` (a name among
    `charts.METRICS`) and ``value``.
    """
    table = _table(table, "lenses.metrics", "case", "layer", "metric", "value")
    names = list(table["metric"].unique())
    cases = list(table["case"].unique())
    metric = _select_metric(names, "lens_metric")
    chart = (
        alt.Chart(table, name="metrics")
        .transform_filter(alt.datum.metric == metric)
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("case:N", title=None, sort=cases),
            shape=alt.Shape("case:N", legend=None, sort=cases),
            tooltip=["case:N", "layer:O", "value:Q"],
        )
    )
    return _titled(_level_axis_title(chart, "lens_metric", METRICS, names, metric), title, subtitle)
