"""A chart of metrics by position in the sequence."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _level_axis_title, _select, _table, _titled

#: Axis titles of what is measured of a group of tokens; all are drawn on a logarithmic scale.
MEASURES = {
    "norm": "Mean L2 norm (activation units, log scale)",
    "share": "Share of the layer's variance (fraction, log scale)",
    "fvu": "FVU of the group, about the layer's mean (fraction, log scale)",
    "l0": "L0 (active latents per token, log scale)",
    "latents": "Effective number of latents (log scale)",
}
KEPT = {"kept": "all tokens", "excluded": "those without massive activations"}


def by_position(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """Metrics by layer, one line for each group of positions; the reader chooses the metric, and
    whether tokens with massive activations are among the vectors.

    ``table`` is the first that `tables.positions.by_position` returns, without the rows of all
    positions together.
    """
    keys = ("layer", "first", "last", "massive", "tokens")
    table = _table(table, "positions.by_position", *keys, *MEASURES)
    pairs = table[["first", "last"]].drop_duplicates().sort_values("first").to_numpy().tolist()
    names = {(a, b): str(a) if a == b else f"{a} to {b}" for a, b in pairs}
    places = [names[a, b] for a, b in table[["first", "last"]].to_numpy().tolist()]
    table = table.assign(place=places)[["layer", "place", "massive", "tokens", *MEASURES]]
    metric = _select(
        "measure", list(MEASURES), "Metric", [m.split(" (")[0] for m in MEASURES.values()]
    )
    kept = _select("vectors", list(KEPT), "Vectors", list(KEPT.values()))
    order = list(names.values())
    lines = (
        alt.Chart(table, name="by_position")
        .transform_filter(alt.datum.massive == kept)
        .transform_calculate(value=f"datum[{metric.name}]")
        .transform_filter("isValid(datum.value) && datum.value > 0")
        .mark_line(point=alt.OverlayMarkDef(size=16))
        .encode(
            x=alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title=None).scale(type="log", nice=False),
            color=alt.Color("place:O", title="Position", sort=order),
            tooltip=["place:O", "layer:O", "value:Q", "tokens:Q"],
        )
        .add_params(kept)
    )
    chart = _level_axis_title(lines, "measure", MEASURES, list(MEASURES), metric)
    return _titled(chart, title, subtitle)
