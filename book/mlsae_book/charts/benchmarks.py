"""The charts of the chapter on speed."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _select, _table, _titled


def rates(
    table: pd.DataFrame, name: str, axis: str, title: str, subtitle: str | None = None
) -> alt.LayerChart:
    """Rates of implementations side by side; the reader chooses the case.

    ``table`` has one row per (case, implementation): ``case``, ``implementation``, ``per_second``
    (median), ``slowest`` and ``fastest`` of the rounds, in the unit that ``axis`` says.  Rows
    without a rate, of what was not installed or failed, are not drawn.
    """
    columns = ("case", "implementation", "per_second", "slowest", "fastest")
    table = _table(table, "rates", *columns).dropna(subset="per_second")
    case = _select(f"{name}_case", list(table["case"].unique()), "Case")
    order = list(table["implementation"].unique())
    base = (
        alt.Chart(table)
        .transform_filter(alt.datum.case == case)
        .encode(
            y=alt.Y("implementation:N", title=None, sort=order, axis=alt.Axis(labelLimit=200)),
            tooltip=["implementation:N", "per_second:Q", "slowest:Q", "fastest:Q"],
        )
    )
    bars = base.mark_bar(opacity=0.6).encode(x=alt.X("per_second:Q", title=axis))
    spans = base.mark_rule(strokeDash=[], strokeWidth=2).encode(x="slowest:Q", x2="fastest:Q")
    layers = [bars.properties(name=f"{name}_medians"), spans.properties(name=f"{name}_ranges")]
    chart = alt.layer(*layers).add_params(case).properties(height=28 * len(order))
    return _titled(chart, title, subtitle)
