"""Charts in which what is measured stands beside its null models, each with its interval."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _select, _table, _titled

#: Labels too long for their place: a word a line, or two short ones.
WORDS = (
    "length(datum.label) > 12"
    r" ? split(replace(replace(datum.label, regexp(' ', 'g'), '|'),"
    r" regexp('(^|[|])([^|]{1,5})[|]([^|]{1,4})(?=[|]|$)', 'g'), '$1$2 $3'), '|')"
    " : datum.label"
)


def beside(
    table: pd.DataFrame,
    x: tuple[str, str],
    y: tuple[str, str],
    series: str,
    title: str,
    subtitle: str | None = None,
    choices: dict[str, str] | None = None,
) -> alt.LayerChart:
    """Points with intervals, those of one place side by side; the reader makes the choices.

    ``table`` has one row per point: the column of ``x``, that of ``y``, ``low`` and ``high``, and
    ``series``, whose values come in the order of the table.

    Args:
        x, y: column and title of the axis, with its unit.
        choices: column → what the reader is asked to choose, the first value first.
    """
    choices = choices or {}
    table = _table(table, "beside", x[0], y[0], "low", "high", series, *choices)
    base, params = alt.Chart(table), []
    for column, label in choices.items():
        name = f"chosen_{column}".replace(" ", "_")
        params.append(_select(name, list(table[column].unique()), label))
        base = base.transform_filter(alt.datum[column] == params[-1])
    names = list(table[series].unique())
    base = base.encode(
        x=alt.X(
            f"{x[0]}:O",
            title=x[1],
            sort=None,
            axis=alt.Axis(labelAngle=0, labelLimit=90, labelExpr=WORDS),
        ),
        xOffset=alt.XOffset(f"{series}:N", sort=names),
        color=alt.Color(f"{series}:N", title=None, sort=names, legend=alt.Legend(columns=2)),
    )
    value = alt.Y(f"{y[0]}:Q", title=y[1])
    points = (
        base.mark_point()
        .encode(y=value, tooltip=[f"{series}:N", f"{x[0]}:O", f"{y[0]}:Q", "low:Q", "high:Q"])
        .properties(name="points")
    )
    # Without an interval the line is as long as its point, so that Vega finds where the axis ends.
    ends = {
        f"drawn_{end}": alt.expr.if_(
            alt.expr.isValid(alt.datum[end]), alt.datum[end], alt.datum[y[0]]
        )
        for end in ("low", "high")
    }
    spans = (
        base.transform_calculate(**ends)
        .mark_rule(strokeDash=[], strokeWidth=2, opacity=0.6)
        .encode(y=alt.Y("drawn_low:Q", title=y[1]), y2="drawn_high:Q")
        .properties(name="intervals")
    )
    chart = alt.layer(spans, points)
    if params:
        chart = chart.add_params(*params)
    return _titled(chart.properties(height=280), title, subtitle)
