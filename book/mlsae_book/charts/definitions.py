"""The chart of the chapter on definitions."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _select, _table, _titled


def differences(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """Our number and the released one against a setting; the reader chooses the quantity.

    ``table`` has one row per (quantity, x, series): ``quantity``, ``setting`` (what ``x`` is, with
    its unit), ``x``, ``series`` (ours or released) and ``value``.
    """
    columns = ("quantity", "setting", "x", "series", "value")
    table = _table(table, "definitions.differences", *columns)
    quantity = _select("quantity", list(table["quantity"].unique()), "Quantity")
    base = alt.Chart(table).transform_filter(alt.datum.quantity == quantity)
    lines = (
        base.mark_line(point=True)
        .encode(
            x=alt.X("x:Q", title=None),
            y=alt.Y("value:Q", title="Value (unit of the quantity)"),
            color=alt.Color("series:N", title=None),
            strokeDash=alt.StrokeDash("series:N", title=None),
            tooltip=["quantity:N", "setting:N", "x:Q", "series:N", "value:Q"],
        )
        .properties(name="differences")
    )
    # An axis title cannot change with the choice, so the setting is written where it would stand.
    setting = (
        base.transform_aggregate(groupby=["setting"])
        .mark_text(align="center", baseline="top")
        .encode(
            text="setting:N",
            x=alt.value(alt.ExprRef("width / 2")),
            y=alt.value(alt.ExprRef("height + 28")),
        )
        .properties(name="setting")
    )
    chart = alt.layer(lines, setting).add_params(quantity)
    return _titled(chart.properties(height=280), title, subtitle)
