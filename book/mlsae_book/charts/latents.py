"""Charts of single latents: where they live, what they respond to, and what they do."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _level_axis_title, _select, _table, _titled


def steering_cost(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """KL of the predictions against the strength of steering.

    ``table`` has one row per strength: ``alpha`` (activations added) and ``kl`` (nats per token).
    """
    table = _table(table, "steering_cost", "alpha", "kl")
    chart = (
        alt.Chart(table, name="steering_cost", height=220)
        .mark_line(point=True)
        .encode(
            x=alt.X("alpha:Q", title="Added to the latent's activation (activations)"),
            y=alt.Y("kl:Q", title="KL, original to steered (nats per token)"),
            tooltip=["alpha:Q", "kl:Q"],
        )
    )
    return _titled(chart, title, subtitle)


def promoted(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """The tokens whose logits rise and fall most; the reader chooses the change.

    ``table`` has one row per (change, direction, rank): ``token`` and ``logit_change`` (mean over
    positions, relative to the vocabulary's mean).
    """
    table = _table(table, "promoted", "change", "direction", "rank", "token", "logit_change")
    table = table.assign(change=table["change"].map(_change))
    options = list(dict.fromkeys(table["change"]))
    change = _select("change", options, "Change", value=options[-1])
    tokens = alt.Axis(labelExpr="replace(slice(datum.label, 3), /^ /, '␣')", labelLimit=200)
    chart = (
        alt.Chart(table, name="promoted", height=16 * int(table["change"].value_counts().max()))
        .transform_filter(alt.datum.change == change)
        .transform_calculate(
            label="(datum.direction == 'promoted' ? 'p' : 's') + pad(datum.rank, 2, '0', 'left')"
            " + replace(datum.token, /\\n/g, '↵')"
        )
        .mark_bar()
        .encode(
            x=alt.X("logit_change:Q", title="Change of the logit"),
            y=alt.Y(
                "label:O",
                title=None,
                sort=alt.EncodingSortField("logit_change", order="descending"),
                axis=tokens,
            ),
            color=alt.Color("direction:N", title=None),
            tooltip=["token:N", "direction:N", "logit_change:Q"],
        )
        .add_params(change)
    )  # fmt: skip
    return _titled(chart, title, subtitle)


def later_layers(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """How far changes reach: mean activation of the latent from the changed layer on.

    ``table`` has one row per (change, layer): ``activation_after``, ``activation_before`` and
    ``relative_change`` of the residual vectors.  The reader chooses which of the last two effects
    to see.
    """
    table = _table(
        table, "later_layers", "change", "layer", "activation_before", "activation_after",
        "relative_change",
    )  # fmt: skip
    table = table.assign(change=table["change"].map(_change))
    order = list(dict.fromkeys(table["change"]))
    titles = {
        "activation_after": "Mean activation of the latent",
        "relative_change": "Change of the residual stream, ‖Δx‖ / ‖x‖",
    }
    measure = _select("measure", list(titles), "Effect on", list(titles.values()))
    chart = (
        alt.Chart(table, name="later_layers")
        .transform_calculate(value=f"datum[{measure.name}]")
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("change:N", title="Change", sort=order),
            strokeDash=alt.StrokeDash("change:N", sort=order, legend=None),
            tooltip=[
                "change:N", "layer:O", "activation_before:Q", "activation_after:Q",
                "relative_change:Q",
            ],
        )
    )  # fmt: skip
    chart = _level_axis_title(chart, "later_layers", titles, list(titles), measure)
    return _titled(chart.properties(height=240), title, subtitle)


def handover(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """How often a latent's most similar other is active where it would have taken over.

    ``table`` has one row per (cosine, where, pair): ``cosine`` (a class), ``where`` (such as "next
    layer"), ``pair`` (the most similar latent, or one dealt at random) and ``fraction``.  The
    reader chooses where to look.
    """
    table = _table(table, "handover", "cosine", "where", "pair", "fraction")
    options = list(dict.fromkeys(table["where"]))
    where = _select("where", options, "The other latent is active at the")
    classes = list(dict.fromkeys(table["cosine"]))
    chart = (
        alt.Chart(table, name="handover", height=42 * len(classes))
        .transform_filter(alt.datum.where == where)
        .mark_point()
        .encode(
            x=alt.X(
                "fraction:Q",
                title="Of the (token, layer) pairs at which the latent is active",
                axis=alt.Axis(format=".0%"),
            ).scale(zero=True),
            y=alt.Y("cosine:O", title="Cosine similarity", sort=classes),
            color=alt.Color("pair:N", title=None),
            shape=alt.Shape("pair:N", title=None),
            tooltip=["cosine:O", "pair:N", alt.Tooltip("fraction:Q", format=".2%")],
        )
        .add_params(where)
    )
    return _titled(chart, title, subtitle)


def uniformity(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """Uniformity of active latent importance by layer, with intervals.

    ``table`` has one row per layer: ``r_l0``, ``low``, ``high`` and ``r_activation``.
    """
    table = _table(table, "uniformity", "layer", "r_l0", "low", "high", "r_activation")
    names = {"r_l0": "effect on the next token's logit", "r_activation": "activation alone"}
    long = table.melt(["layer", "low", "high"], list(names), "of", "value")
    long = long.assign(of=long["of"].map(names))
    x = alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0))
    points = (
        alt.Chart(long, name="uniformity")
        .mark_line(point=True)
        .encode(
            x=x,
            y=alt.Y("value:Q", title="Uniformity over the active latents (fraction)").scale(
                domain=[0, 1]
            ),
            color=alt.Color(
                "of:N", title=None, sort=list(names.values()), legend=alt.Legend(labelLimit=300)
            ),
            strokeDash=alt.StrokeDash("of:N", sort=list(names.values()), legend=None),
            tooltip=["layer:O", "of:N", alt.Tooltip("value:Q")],
        )
    )
    interval = (
        alt.Chart(table, name="interval")
        .mark_rule(strokeDash=[])
        .encode(x=x, y="low:Q", y2="high:Q")
    )
    return _titled(alt.layer(points, interval).properties(height=240), title, subtitle)


def _change(change: float | str) -> str:
    """How a legend names a change of a latent's activation."""
    return "ablate" if change == "ablate" else f"{float(change):+.3g}"
