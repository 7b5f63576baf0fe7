"""Charts of the residual stream's drift over layers."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _select, _table, _titled

#: Measures of `cosines` and `matrix`, as the reader chooses them.
MEASURES = {"centred": "about each layer's mean", "raw": "not centred"}
#: Models differ in colour and in the shape of their points.
SHAPE = alt.Shape("model:N", sort=None, legend=None)


def _highlight(table: pd.DataFrame, dashed: str | None) -> tuple[alt.Parameter, dict]:
    """A dropdown of models, and the encodings that let one stand out; `dashed` is not of the suite."""
    models = list(table["model"].unique())
    chosen = alt.selection_point(
        name="chosen_model",
        fields=["model"],
        bind=alt.binding_select(
            options=[None, *models], labels=["all", *map(str, models)], name="Model "
        ),
    )
    return chosen, {
        "color": alt.Color("model:N", title=None, sort=models, legend=alt.Legend(columns=3)),
        "opacity": alt.when(chosen).then(alt.value(1)).otherwise(alt.value(0.12)),
        "strokeDash": alt.when(alt.datum.model == dashed)
        .then(alt.value([5, 4]))
        .otherwise(alt.value([1, 0])),
    }


def _measure() -> alt.Parameter:
    return _select("measure", list(MEASURES), "Vectors", list(MEASURES.values()))


def norms(
    table: pd.DataFrame, title: str, subtitle: str | None = None, dashed: str | None = None
) -> alt.LayerChart:
    """Mean L2 norm by relative layer, one line a model (Fig. 4); the reader picks one out.

    ``table`` has one row per (model, layer): ``model``, ``layer``, ``relative_layer`` (layer over
    the number of layers), ``norm`` and its standard error ``norm_se`` (activation units). The line
    of the model `dashed` is.
    """
    names = ("model", "layer", "relative_layer", "norm")
    table = _table(table, "drift.norms", *names, "norm_se")
    table = table.assign(low=table.norm - 2 * table.norm_se, high=table.norm + 2 * table.norm_se)
    table = _table(table, "drift.norms", *names, "low", "high")
    chosen, look = _highlight(table, dashed)
    base = alt.Chart(table).encode(
        x=alt.X(
            "relative_layer:Q",
            title="Relative layer (layer / number of layers)",
            axis=alt.Axis(format=".1f", tickCount=5),
        ),
        **look,
    )

    def y(column: str) -> alt.Y:
        title = "Mean L2 norm (activation units, log scale)"
        return alt.Y(f"{column}:Q", title=title).scale(type="log", nice=False)

    lines = base.mark_line(point=True).encode(
        shape=SHAPE,
        y=y("norm"),
        tooltip=["model:N", "layer:O", "norm:Q", alt.Tooltip("low:Q"), alt.Tooltip("high:Q")],
    )
    spans = base.mark_rule(strokeDash=[], strokeWidth=2).encode(y=y("low"), y2="high:Q")
    layers = (lines.properties(name="norms").add_params(chosen), spans.properties(name="errors"))
    return _titled(alt.layer(*layers).properties(height=280), title, subtitle)


def cosines(
    table: pd.DataFrame, title: str, subtitle: str | None = None, dashed: str | None = None
) -> alt.LayerChart:
    """Cosine similarity of adjacent layers by relative layer, one line a model (Fig. 1).

    The reader picks a model out and switches centring off. ``table`` is what
    `tables.drift.adjacent` returns, with ``model``. The line of the model `dashed` is.
    """
    names = ("model", "layer", "other", "relative_pair", "measure", "value", "low", "high")
    table = _table(table, "drift.cosines", *names)
    chosen, look = _highlight(table, dashed)
    measure = _measure()
    base = (
        alt.Chart(table)
        .transform_filter(alt.datum.measure == measure)
        .encode(
            x=alt.X(
                "relative_pair:Q",
                title="Relative layer (earlier layer of the pair / (number of layers − 1))",
                axis=alt.Axis(format=".1f", tickCount=5),
            ),
            **look,
        )
    )
    # One scale for both measures, so that switching shows the difference.
    domain = [min(0.5, float(table["low"].min())), 1]

    def y(column: str) -> alt.Y:
        title = "Mean cosine similarity of adjacent layers"
        return alt.Y(f"{column}:Q", title=title).scale(domain=domain)

    lines = base.mark_line(point=True).encode(
        shape=SHAPE,
        y=y("value"),
        tooltip=["model:N", "layer:O", "other:O", "value:Q", "low:Q", "high:Q"],
    )
    spans = base.mark_rule(strokeDash=[], strokeWidth=2).encode(y=y("low"), y2="high:Q")
    layers = (lines.properties(name="cosines").add_params(chosen), spans.properties(name="errors"))
    chart = alt.layer(*layers).add_params(measure)
    return _titled(chart.properties(height=280), title, subtitle)


def matrix(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """Mean cosine similarity of every two layers; the reader chooses model and measure.

    ``table`` is what `tables.drift.matrix` returns, with ``model``.
    """
    names = ("model", "layer", "other", "centred", "raw")
    table = _table(table, "drift.matrix", *names)
    model = _select("matrix_model", list(table["model"].unique()), "Model")
    measure = _measure()
    chart = (
        alt.Chart(table, name="matrix")
        .transform_filter(alt.datum.model == model)
        .transform_calculate(value=f"datum[{measure.name}]")
        .mark_rect()
        .encode(
            x=alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("other:O", title="Layer", sort="descending"),
            color=alt.Color("value:Q", title="Mean cosine similarity").scale(
                domain=[min(0.0, float(table[["centred", "raw"]].min(axis=None))), 1]
            ),
            tooltip=[
                "layer:O",
                "other:O",
                alt.Tooltip("centred:Q", title=MEASURES["centred"]),
                alt.Tooltip("raw:Q", title=MEASURES["raw"]),
            ],
        )
        .add_params(model, measure)
    )
    return _titled(chart.properties(height=280), title, subtitle)
