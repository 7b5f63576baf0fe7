"""Charts of dictionaries measured where they were not trained."""

from __future__ import annotations

import altair as alt
import numpy as np
import pandas as pd

from mlsae_book.charts import METRICS, _chosen_title, _table, _titled
from mlsae_book.charts.fidelity import _metric

# Cells take the paler part of the scheme and are half transparent: ink is read on all of them, on
# light pages and on dark ones.
_OPACITY, _DARKEST = 0.45, 0.75


def matrix(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.VConcatChart:
    """Layer × layer, and set apart beneath it the row of the MLSAE; the reader chooses the metric.

    ``table`` is what `tables.transfer.matrix` gives: ``trained`` (text: a layer, or the name of
    the MLSAE's row, if there is one), ``layer`` (where it was measured), ``metric``, ``value`` and
    ``last``, whether the cell belongs to the last layer, which is shown on demand.  Shades follow
    the logarithm of a metric where all of its values are positive.
    """
    table = _table(table, "matrix", "trained", "layer", "metric", "value", "last")
    metric, metrics = _metric(table)
    shown = alt.param(name="last_layer", value=False)
    shown.param.bind = alt.binding_checkbox(name="Last layer too ")
    shade = table.groupby("metric", sort=False)["value"].transform(_shade).astype(float)
    single = table["trained"].str.isdecimal()
    table = table.assign(shade=shade.round(3))
    alone = bool(single.all())
    square = _cells(table[single], metric, "square", beneath=alone)
    label = _chosen_title("metric_title", METRICS, metrics, metric)
    parts = [alt.layer(*square, label).properties(name="square", height=alt.Step(34))]
    if not alone:
        row = alt.layer(*_cells(table[~single], metric, "mlsae", beneath=True))
        parts.append(row.properties(name="mlsae", height=alt.Step(34)))
    chart = alt.vconcat(*parts, spacing=12).add_params(metric, shown)
    return _titled(chart, title, subtitle)


def _cells(
    table: pd.DataFrame, metric: alt.Parameter, name: str, beneath: bool
) -> tuple[alt.Chart, alt.Chart]:
    """Shaded rectangles and the numbers on them; the layers are named beneath the last part."""
    base = (
        alt.Chart(table)
        .transform_filter(alt.datum.metric == metric)
        .transform_filter("last_layer || !datum.last")
        .encode(
            x=alt.X(
                "layer:O",
                title="Measured at layer" if beneath else None,
                axis=alt.Axis(labelAngle=0, labels=beneath, ticks=False, domain=False),
            ),
            y=alt.Y("trained:O", title=None, sort=list(table["trained"].unique())),
            tooltip=["trained:N", "layer:O", "value:Q"],
        )
    )
    color = alt.Color("shade:Q").scale(domain=[0, 1]).legend(None)
    rects = base.mark_rect(opacity=_OPACITY).encode(color=color)
    numbers = base.mark_text().encode(text=alt.Text("value:Q", format=".3~g"))
    return rects.properties(name=f"{name}_cells"), numbers.properties(name=f"{name}_numbers")


def _shade(values: pd.Series) -> pd.Series:
    """0 for the smallest value, `_DARKEST` for the largest."""
    scaled = np.log(values) if (values > 0).all() else values
    span = scaled.max() - scaled.min()
    return (scaled - scaled.min()) / (span if span > 0 else 1) * _DARKEST
