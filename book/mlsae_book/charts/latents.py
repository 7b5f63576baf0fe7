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


#: What activations are multiplied with: a gradient of `tables.importance.GRADIENTS`, or nothing.
OF = {
    "own": "the next token's gradient",
    "another": "another token's gradient",
    "random": "a random direction",
    "alone": "activation alone",
}


def uniformity(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """Uniformity of active latent importance by layer, beside its null models.

    ``table`` is what `tables.importance.beside_activations` gives: one row per layer and ``of``
    (keys of `OF`), ``r_l0``, ``low`` and ``high``.
    """
    table = _table(table, "uniformity", "layer", "of", "r_l0", "low", "high")
    base = alt.Chart(table.assign(of=table["of"].map(OF))).encode(
        x=alt.X("layer:O", title="Layer", axis=alt.Axis(labelAngle=0)), color=_of()
    )
    axis = "Uniformity over the active latents (fraction)"
    points = base.mark_line(point=True).encode(
        y=alt.Y("r_l0:Q", title=axis).scale(domain=[0, 1]),
        strokeDash=alt.StrokeDash("of:N", sort=list(OF.values()), legend=None),
        tooltip=["layer:O", "of:N", "r_l0:Q", "low:Q", "high:Q"],
    )
    spans = _spans(base, alt.Y("low:Q", title=axis), "high")
    chart = alt.layer(points.properties(name="uniformity"), spans.properties(name="interval"))
    return _titled(chart.properties(height=240), title, subtitle)


def uniformity_over_sparsity(
    table: pd.DataFrame, title: str, subtitle: str | None = None
) -> alt.VConcatChart:
    """The same against L0 (Gemma Scope, Figure 16), and beneath it how many latents that is.

    ``table`` is as for `uniformity`, of several runs, with ``l0`` (active latents per vector) and
    ``latents``, ``latents_low``, ``latents_high``.  The reader chooses the layer.
    """
    shares, numbers = ("r_l0", "low", "high"), ("latents", "latents_low", "latents_high")
    names = ("layer", "of", "l0", *shares, *numbers)
    table = _table(table, "uniformity_over_sparsity", *names)
    table = table.assign(of=table["of"].map(OF))
    layers = [int(layer) for layer in sorted(table["layer"].unique())]
    layer = _select("layer_shown", layers, "Layer", value=layers[len(layers) // 2])
    logarithmic = {"type": "log", "base": 2, "nice": False}
    powers = alt.Axis(format="~g", values=[2**i for i in range(16)])
    l0 = alt.X("l0:Q", axis=powers).scale(**logarithmic)
    panels = []
    share, number = "Uniformity over the active latents (fraction)", "That many latents (log scale)"
    for (value, low, high), axis, scale, ticks, x in (
        (shares, share, {"domain": [0, 1]}, alt.Axis(), None),
        (numbers, number, logarithmic, powers, "L0 (active latents, log scale)"),
    ):
        base = alt.Chart(table).transform_filter(alt.datum.layer == layer)
        base = base.encode(x=l0.title(x), color=_of())
        lines = base.mark_line(point=True).encode(
            y=alt.Y(f"{value}:Q", title=axis, axis=ticks).scale(**scale),
            strokeDash=alt.StrokeDash("of:N", sort=list(OF.values()), legend=None),
            tooltip=["layer:O", "of:N", "l0:Q", f"{value}:Q", f"{low}:Q", f"{high}:Q"],
        )
        spans = _spans(base, alt.Y(f"{low}:Q", title=axis), high)
        both = alt.layer(lines.properties(name=value), spans.properties(name=f"{value}_interval"))
        panels.append(both.properties(height=200))
    chart = alt.vconcat(*panels, spacing=34).add_params(layer)
    return _titled(chart, title, subtitle)


def _of() -> alt.Color:
    legend = alt.Legend(labelLimit=300, columns=1)
    return alt.Color("of:N", title=None, sort=list(OF.values()), legend=legend)


def _spans(base: alt.Chart, low: alt.Y, high: str) -> alt.Chart:
    """Intervals where there are any; none of the activations alone."""
    there = base.transform_filter(f"isValid(datum.{high})")
    return there.mark_rule(strokeDash=[]).encode(y=low, y2=f"{high}:Q")


def _change(change: float | str) -> str:
    """How a legend names a change of a latent's activation."""
    return "ablate" if change == "ablate" else f"{float(change):+.3g}"
