"""Heatmaps of latents over layers, and the variance ratios of many runs."""

from __future__ import annotations

import json

import altair as alt
import pandas as pd

from mlsae_book.charts import (
    NEUTRAL,
    _by_run,
    _latent_cells,
    _select,
    _select_prompt,
    _table,
    _titled,
)

WEIGHTINGS = {
    "probs": "mean over active tokens",
    "probs_by_total": "activation totals",
    "share": "totals, not normalised (square root)",
}


def aggregate(
    table: pd.DataFrame, sources: dict[str, str], title: str, subtitle: str | None = None
) -> alt.Chart:
    """P(layer | latent) over all tokens (Fig. 2); the reader chooses weighting or null model.

    ``table`` is what `tables.layers.aggregate_table` returns, ``sources`` its columns that can
    be chosen and how the reader is told of them.
    """
    latents = [f"latent_{name}" for name in sources]
    table = _table(table, "layers.aggregate", "order", "layer", *sources, *latents)
    source = _select("source", list(sources), "Shown", list(sources.values()))
    width = int(table["order"].max()) + 1
    base = (
        alt.Chart(table, name="aggregate")
        .transform_calculate(
            probability=f"datum[{source.name}]", latent=f"datum['latent_' + {source.name}]"
        )
        .transform_filter("isValid(datum.probability)")
    )
    chart = (
        _latent_cells(base, f"{width} latents, by their mean layer", width)
        .encode(
            color=alt.Color("probability:Q", title="P(layer | latent)").scale(domain=[0, 1]),
            tooltip=["latent:O", "layer:O", "probability:Q"],
        )
        .add_params(source)
    )
    return _titled(chart.properties(height=220), title, subtitle)


#: Pixels: of a block in `passage`, and up to where its name reaches.
BLOCK, NAMES = 22, 96


def passage(
    table: pd.DataFrame, token: str, title: str, subtitle: str | None = None
) -> alt.LayerChart:
    """A token on its way through the blocks, and the latents that a dictionary of all layers reads
    after each; the reader moves it up.

    ``table`` is what `tables.layers.passage` returns.
    """
    table = _table(table, "layers.passage", "latent", "layer", "activation", "order")
    last, width = int(table["layer"].max()), int(table["order"].max()) + 1
    here = alt.param(
        name="after_block",
        value=last // 2,
        bind=alt.binding_range(min=0, max=last, step=1, name="The token is after block "),
    )
    place = alt.Scale(domain=[0, width], nice=False, range=[NAMES, alt.ExprRef("width")])
    axis = alt.Axis(labels=False, ticks=False, titleAnchor="end")
    cells = (
        _latent_cells(alt.Chart(table), f"{width} latents, by their mean layer here", width)
        .encode(
            x=alt.X("order:Q", title=f"{width} latents, by their mean layer here", axis=axis).scale(
                place
            ),
            y=alt.Y("layer:O", title=None, sort="descending", axis=None),
            color=alt.Color("activation:Q", title="Activation").scale(domainMin=0),
            opacity=alt.when(alt.datum.layer <= here).then(alt.value(1)).otherwise(alt.value(0)),
            tooltip=["latent:O", "layer:O", "activation:Q"],
        )
        .properties(name="cells")
    )
    layers = alt.Chart(pd.DataFrame({"layer": range(last + 1)})).encode(
        y=alt.Y("layer:O", sort="descending", axis=None)
    )
    stream = (
        alt.Chart(alt.InlineData([{}]), name="stream")
        .mark_rule(strokeDash=[], strokeWidth=3)
        .encode(x=alt.value(BLOCK / 2), y=alt.value(0), y2=alt.value("height"))
    )
    blocks = layers.mark_rect(
        height={"band": 0.55}, cornerRadius=3, color=NEUTRAL, aria=False
    ).encode(x=alt.value(0), x2=alt.value(BLOCK))
    names = (
        layers.transform_calculate(
            label=f"datum.layer == {here.name} ? {json.dumps(token)} : 'block ' + datum.layer"
        )
        .mark_text(align="left")
        .encode(
            x=alt.value(BLOCK + 6),
            text="label:N",
            opacity=alt.when(alt.datum.layer == here).then(alt.value(1)).otherwise(alt.value(0.6)),
            size=alt.when(alt.datum.layer == here).then(alt.value(15)).otherwise(alt.value(12)),
        )
    )
    parts = [blocks.properties(name="blocks"), names.properties(name="names")]
    chart = alt.layer(stream, *parts, cells).add_params(here)
    return _titled(chart.properties(height=220), title, subtitle)


def guess(
    table: pd.DataFrame,
    panels: dict[str, str],
    trained: str,
    title: str,
    subtitle: str | None = None,
) -> alt.VConcatChart:
    """Heatmaps beneath each other; the reader is asked which of them is of the trained model.

    ``table`` is what `tables.layers.guess_table` returns, ``panels`` what each panel is, and
    ``trained`` the one asked for. What they are, and whether the guess was right, is written above
    them once it has been made.
    """
    table = _table(table, "layers.guess", "panel", "order", "layer", "probability")
    made = _select("guess", [None, *panels], "The trained model is", ["…", *panels])
    width = int(table["order"].max()) + 1

    def panel(name: str, what: str) -> alt.LayerChart:
        own = table[table["panel"] == name].drop(columns="panel")
        axis = f"{width} latents of each, by their mean layer" if name == [*panels][-1] else None
        cells = (
            _latent_cells(alt.Chart(own), axis, width)
            .encode(
                color=alt.Color("probability:Q", title="P(layer | latent)").scale(domain=[0, 1]),
                tooltip=["layer:O", "probability:Q"],
            )
            .properties(name=f"cells_{name}")
        )
        verdict = "right" if name == trained else "wrong"
        said = f": {what}' + ({made.name} == '{name}' ? ' – {verdict}' : '')"
        label = (
            alt.Chart(alt.InlineData([{}]), name=f"label_{name}")
            .mark_text(
                align="right",
                baseline="bottom",
                fontWeight="bold",
                text=alt.ExprRef(f"{made.name} ? '{name}{said} : '{name}'"),
            )
            .encode(x=alt.value("width"), y=alt.value(-6))
        )
        return alt.layer(cells, label).properties(height=90)

    parts = [panel(name, what) for name, what in panels.items()]
    chart = alt.vconcat(*parts, spacing=24).add_params(made)
    return _titled(chart, title, subtitle)


def totals(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """Activation totals, not normalised (Fig. 25); the reader chooses the power of the colour.

    ``table`` is what `tables.layers.totals_table` returns.
    """
    table = _table(table, "layers.totals", "latent", "layer", "order", "total", "share")
    power = alt.param(
        name="power",
        value=0.5,
        bind=alt.binding_range(min=0.1, max=1, step=0.1, name="Power of the colour "),
    )
    width = int(table["order"].max()) + 1
    base = alt.Chart(table, name="totals").transform_calculate(
        shade=f"pow(datum.share, {power.name})"
    )
    chart = (
        _latent_cells(base, f"{width} latents, by their mean layer", width)
        .encode(
            color=alt.Color("shade:Q", title="(total / largest total) ^ power").scale(
                domain=[0, 1]
            ),
            tooltip=[
                "latent:O",
                "layer:O",
                alt.Tooltip("total:Q", title="total activation"),
                alt.Tooltip("share:Q", title="of the largest"),
            ],
        )
        .add_params(power)
    )
    return _titled(chart.properties(height=220), title, subtitle)


def prompts(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.LayerChart:
    """Latents over layers for single prompts (Fig. 3 and 26); the reader chooses the prompt.

    ``table`` is what `tables.layers.prompt_distributions` returns.
    """
    names = ("prompt", "latent", "layer", "order", "tokens", "activation")
    table = _table(table, "layers.prompts", *names, *WEIGHTINGS)
    options = list(table["prompt"].unique())
    prompt = _select_prompt("layers_prompt", options, 60)
    weighting = _select("weighting", list(WEIGHTINGS), "Shown", list(WEIGHTINGS.values()))
    base = alt.Chart(table).transform_filter(alt.datum.prompt == prompt)
    layers = sorted(int(layer) for layer in table["layer"].unique())
    cells = (
        _latent_cells(
            base.transform_calculate(
                shown=f"{weighting.name} == 'share' ? sqrt(datum.share) : datum[{weighting.name}]"
            ),
            "Latents, by their mean layer",
        )
        .encode(
            y=alt.Y("layer:O", title="Layer", sort="descending").scale(domain=layers[::-1]),
            color=alt.Color("shown:Q", title="P(layer | latent), or as chosen").scale(
                domain=[0, 1]
            ),
            tooltip=[
                "latent:O",
                "layer:O",
                alt.Tooltip("tokens:Q", title="tokens where active"),
                alt.Tooltip("activation:Q", title="total activation"),
                alt.Tooltip("shown:Q", title="shown"),
            ],
        )
        .properties(name="cells")
    )
    count = (
        base.transform_aggregate(layers="count()", groupby=["latent"])
        .transform_calculate(alone="datum.layers == 1 ? 1 : 0")
        .transform_aggregate(alone="sum(alone)", all="count()")
        .transform_calculate(
            label="datum.alone + ' of ' + datum.all + ' latents are active at one layer only'"
        )
        .mark_text(align="right", baseline="bottom")
        .encode(x=alt.value("width"), y=alt.value(-8), text="label:N")
        .properties(name="count")
    )
    chart = alt.layer(cells, count).add_params(prompt, weighting)
    return _titled(chart.properties(height=220), title, subtitle)


def variance_ratios(
    table: pd.DataFrame, title: str, subtitle: str | None = None
) -> alt.VConcatChart:
    """The ratios of Eq. 11 and Eq. 12 of many runs with intervals and null models (Fig. 5, 27).

    ``table`` has one row per run and ratio: ``sweep``, ``run``, ``position`` (what
    `tables.sweeps.stack` gives), ``ratio``, ``value``, ``low``, ``high``, ``permuted``,
    ``gaussian``. The reader chooses the sweep.
    """
    names = ("sweep", "run", "position", "ratio", "value", "low", "high", "permuted", "gaussian")
    table = _table(table, "layers.variance_ratios", *names)
    sweep = _select("ratio_sweep", list(table["sweep"].unique()), "Sweep")
    kinds = {"value": "trained", "permuted": "layers permuted", "gaussian": "Gaussian input"}
    shapes = alt.Scale(domain=list(kinds.values()))

    def panel(ratio: str, meaning: str) -> alt.LayerChart:
        base = (
            alt.Chart(table[table["ratio"] == ratio])
            .transform_filter(alt.datum.sweep == sweep)
            .encode(x=_by_run(labelAngle=-30, labelOverlap=False))
        )

        def y(column: str) -> alt.Y:
            axis = alt.Axis(format=".0%", tickCount=5)
            return alt.Y(f"{column}:Q", title=meaning, axis=axis).scale(domain=[0, 1])

        points = (
            base.transform_fold(list(kinds), as_=["kind", "shown"])
            .transform_calculate(of=f"{_lookup(kinds)}[datum.kind]")
            .mark_point()
            .encode(
                y=y("shown"),
                color=alt.Color("of:N", title=None, scale=shapes),
                shape=alt.Shape("of:N", title=None, scale=shapes),
                tooltip=["run:N", "of:N", "shown:Q", "low:Q", "high:Q"],
            )
            .properties(name=f"points_{ratio[-2:]}")
        )
        spans = base.mark_rule(strokeDash=[], strokeWidth=2).encode(y=y("low"), y2="high:Q")
        spans = spans.properties(name=f"intervals_{ratio[-2:]}")
        return alt.layer(spans, points).properties(height=170)

    panels = [
        panel("Eq. 11", "Eq. 11: variance of one latent over its tokens (of the total)"),
        panel("Eq. 12", "Eq. 12: variance at one token (of that of its latent)"),
    ]
    chart = alt.vconcat(*panels, spacing=30).add_params(sweep)
    return _titled(chart, title, subtitle)


def variance_parts(
    table: pd.DataFrame, title: str, subtitle: str | None = None
) -> alt.VConcatChart:
    """The three parts of Var(L) of many runs, stacked (Eq. 14 and 15), one panel a sweep.

    ``table`` has one row per run and part: ``sweep``, ``run``, ``position``, ``part``, ``place``,
    ``share`` (fraction of Var(L)) and ``variance`` (squared layers).
    """
    names = ("sweep", "run", "position", "part", "place", "share", "variance")
    table = _table(table, "layers.variance_parts", *names)
    units = {"share": "fraction of Var(L)", "variance": "squared layers"}
    unit = _select("unit", list(units), "Unit", list(units.values()))
    parts = list(table.drop_duplicates("part").sort_values("place")["part"])
    order = alt.EncodingSortField("position", op="min")
    panels = []
    for number, (sweep, own) in enumerate(table.groupby("sweep", sort=False)):
        last = number == table["sweep"].nunique() - 1
        axis = alt.Axis(labels=last, ticks=last, domain=last, grid=False, tickCount=5)
        panels.append(
            alt.Chart(own, name=f"parts_{number}", height=18 * own["run"].nunique())
            .transform_calculate(shown=f"datum[{unit.name}]")
            .mark_bar()
            .encode(
                x=alt.X(
                    "shown:Q", title="Var(L), unit as chosen" if last else None, axis=axis
                ).scale(nice=False),
                y=alt.Y("run:O", title=sweep, sort=order),
                color=alt.Color(
                    "part:N", title=None, sort=parts, legend=alt.Legend(labelLimit=260, columns=1)
                ),
                order=alt.Order("place:Q"),
                tooltip=["run:N", "part:N", alt.Tooltip("share:Q", format=".1%"), "variance:Q"],
            )
        )
    chart = alt.vconcat(*panels, spacing=28).add_params(unit).resolve_scale(x="shared")
    return _titled(chart, title, subtitle)


def _lookup(names: dict[str, str]) -> str:
    return "{" + ", ".join(f"{key!r}: {value!r}" for key, value in names.items()) + "}"
