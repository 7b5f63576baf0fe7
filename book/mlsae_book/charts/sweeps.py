"""Charts of many runs, in which the reader chooses the sweep or the run."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _by_run, _latent_cells, _limited, _select, _table, _titled


def _choice(name: str, table: pd.DataFrame, column: str, label: str) -> alt.Parameter:
    return _select(name, list(table[column].unique()), label)


def points(
    table: pd.DataFrame,
    value: str,
    axis: str,
    title: str,
    subtitle: str | None = None,
    interval: tuple[str, str] | None = None,
    series: str | None = None,
) -> alt.LayerChart:
    """One number per run; the reader chooses the sweep.

    ``table`` has one row per run (and value of ``series``): ``sweep``, ``run``, ``position`` (what
    `tables.sweeps.stack` gives), ``value``, and the ends of ``interval``, drawn as a line.
    ``axis`` is the y axis's title, with its unit.
    """
    named = [*([series] if series else []), *(interval or ())]
    table = _table(table, "points", "sweep", "run", "position", value, *named)
    sweep = _choice("sweep", table, "sweep", "Sweep")
    base = (
        alt.Chart(table).transform_filter(alt.datum.sweep == sweep).encode(x=_by_run(labelLimit=90))
    )
    if series:
        base = base.encode(
            color=alt.Color(f"{series}:N", title=None),
            xOffset=alt.XOffset(f"{series}:N"),
        )
    tooltip = ["run:N", *([f"{series}:N"] if series else []), f"{value}:Q"]
    layers = [
        base.mark_point()
        .encode(
            y=alt.Y(f"{value}:Q", title=axis),
            tooltip=tooltip + [f"{end}:Q" for end in interval or ()],
        )
        .properties(name="points")
    ]
    if interval:
        spans = base.mark_rule(strokeDash=[], strokeWidth=2, opacity=0.6).encode(
            y=alt.Y(f"{interval[0]}:Q", title=axis), y2=f"{interval[1]}:Q"
        )
        layers.insert(0, spans.properties(name="intervals"))
    chart = alt.layer(*layers).add_params(sweep).properties(height=280)
    return _titled(chart, title, subtitle)


def active_layers(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.VConcatChart:
    """Active layers against the threshold, and beneath it the runs at the threshold chosen.

    ``table`` has one row per run and threshold: ``sweep``, ``run``, ``position``, ``threshold``
    (fraction of tokens, evenly spaced in its logarithm) and ``active_layers`` (fraction of the
    layers). The slider moves through the thresholds of the table.
    """
    names = ("sweep", "run", "position", "threshold", "active_layers")
    table = _table(table, "active_layers", *names)
    thresholds = sorted(table["threshold"].unique())
    table = table.assign(step=table["threshold"].map(thresholds.index))
    nearest = min(range(len(thresholds)), key=lambda i: abs(thresholds[i] - 1e-3))
    sweep = _choice("sweep", table, "sweep", "Sweep")
    step = alt.param(
        name="step",
        value=nearest,
        bind=alt.binding_range(min=0, max=len(thresholds) - 1, step=1, name="Threshold, step "),
    )
    chosen = alt.Chart(table).transform_filter(alt.datum.sweep == sweep)
    x = alt.X("threshold:Q", title="Threshold (fraction of tokens, log scale)").scale(
        type="log", nice=False
    )
    share = alt.Y("active_layers:Q", title="Active layers (fraction of all layers)")
    lines = (
        chosen.mark_line()
        .encode(
            x=x.axis(format="~g", tickCount=5),
            y=share.scale(domain=[0, 1]),
            detail="run:N",
            opacity=alt.Opacity("position:O", title="Run").scale(range=[0.3, 1]).legend(None),
            tooltip=["run:N", "threshold:Q", alt.Tooltip("active_layers:Q", format=".3f")],
        )
        .properties(name="thresholds")
    )
    here = chosen.transform_filter(alt.datum.step == step)
    rule = here.mark_rule().encode(x="mean(threshold):Q").properties(name="chosen")
    label = (
        here.transform_aggregate(threshold="mean(threshold)")
        .transform_calculate(label="'threshold ' + format(datum.threshold * 100, '.2~g') + ' %'")
        .mark_text(align="right", baseline="bottom")
        .encode(x=alt.value("width"), y=alt.value(-8), text="label:N")
        .properties(name="label")
    )
    runs = (
        here.mark_point()
        .encode(
            x=_by_run(labelLimit=90),
            y=share.scale(domain=[0, 1]),
            tooltip=["run:N", "threshold:Q", alt.Tooltip("active_layers:Q", format=".3f")],
        )
        .properties(name="runs", height=160)
    )
    upper = alt.layer(lines, rule, label).properties(height=220)
    chart = alt.vconcat(upper, runs, spacing=34).add_params(sweep, step)
    return _titled(chart.resolve_scale(opacity="independent"), title, subtitle)


def histogram(
    table: pd.DataFrame,
    axis: str,
    title: str,
    subtitle: str | None = None,
    series: str | None = None,
    logarithmic: bool = False,
    limit: float | None = None,
) -> alt.VConcatChart | alt.Chart:
    """A histogram; the reader chooses the run where there are several.

    ``table`` has one row per bin of a ``run`` (and value of ``series``): ``low``, ``high`` and
    ``share`` (of the run's total). ``axis`` is the x axis's title, with its unit. ``logarithmic``
    draws a second panel beneath, with the shares on a logarithmic axis, and with ``limit``, an edge
    of a bin, a third one, with what each series has above it.
    """
    named = [series] if series else []
    table = _limited(_table(table, "histogram", "run", "low", "high", "share", *named), "histogram")
    run = _choice("run", table, "run", "Run")
    base = alt.Chart(table).transform_filter(alt.datum.run == run)
    tooltip = [*[f"{name}:N" for name in named], "low:Q", "high:Q", "share:Q"]
    x = alt.X("low:Q", title=axis).scale(nice=False)
    if not series:
        bars = base.mark_bar(binSpacing=0).encode(
            x=x.bin("binned"),
            x2="high:Q",
            y=alt.Y("share:Q", title="Share", axis=alt.Axis(format="~%")),
            tooltip=tooltip,
        )
        chart = bars.add_params(run).properties(name="histogram", height=260)
        return _titled(chart, title, subtitle)
    # Names beside the third panel leave little room for those above.
    legend = {} if limit is None else {"legend": alt.Legend(columns=2)}
    lines = base.mark_line(interpolate="step-after", strokeWidth=1.5).encode(
        x=x, color=alt.Color(f"{series}:N", title=None, **legend), tooltip=tooltip
    )
    y = alt.Y("share:Q", title="Share", axis=alt.Axis(format="~g", tickCount=5))
    linear = lines.encode(y=y).properties(name="linear", height=200)
    if not logarithmic:
        return _titled(linear.add_params(run), title, subtitle)
    log = (
        lines.transform_filter(alt.datum.share > 0)
        .encode(
            y=alt.Y(
                "share:Q",
                title="Share (log scale)",
                axis=alt.Axis(format="~g", values=[10.0**-i for i in range(10)]),
            ).scale(type="log", nice=False)
        )
        .properties(name="logarithmic")
    )
    panels = [linear.encode(x=x.title(None)), log.properties(height=200)]
    if limit is not None:
        rule = alt.Chart(alt.InlineData([{"limit": limit}]), name="limit").mark_rule()
        panels[1] = alt.layer(log, rule.encode(x="limit:Q")).properties(height=200)
        panels.append(_above(base, series, limit, table[series].nunique()))
    return _titled(alt.vconcat(*panels, spacing=34).add_params(run), title, subtitle)


def _above(base: alt.Chart, series: str, limit: float, rows: int) -> alt.Chart:
    """How much of each series lies above the limit, as bars with their numbers."""
    return (
        base.transform_calculate(above=f"datum.low >= {limit} ? 1e4 * datum.share : 0")
        .transform_aggregate(above="sum(above)", groupby=[series])
        .transform_calculate(label=f"datum['{series}'] + ' ' + format(datum.above, '.2~f')")
        .mark_bar(size=12)
        .encode(
            x=alt.X("above:Q", axis=None).scale(nice=False),
            y=alt.Y("label:N", title=f"Above {limit:g}, of 10,000"),
            color=alt.Color(f"{series}:N", title=None, legend=alt.Legend(columns=2)),
        )
        .properties(name="above", height=18 * rows)
    )


def gallery(
    table: pd.DataFrame, title: str, subtitle: str | None = None, swept: str = ""
) -> alt.Chart | alt.VConcatChart:
    """P(layer | latent) of some latents of every run, one panel each.

    ``swept`` stands before a run's name above its panel. ``table`` has one row per (run, latent,
    layer): ``run``, ``layer``, ``probability`` (sums to one over the layers of a latent; rows of
    zero may be missing), ``order`` (0, 1, … from left to right), ``latent`` and, where the reader
    is to choose a text as well, ``of``, and where something is to be said above each picture,
    ``note``.
    """
    of, note = (["of"] if "of" in table else []), (["note"] if "note" in table else [])
    columns = ("run", "latent", "layer", "probability", "order", *of, *note)
    table = _table(table, "gallery", *columns)
    width = int(table["order"].max()) + 1
    chosen = [_choice("of", table, "of", "Shown")] if of else []
    runs = list(table["run"].unique())
    panels = []
    for number, run in enumerate(runs):
        base = alt.Chart(table, name=f"gallery_{number}").transform_filter(alt.datum.run == run)
        for text in chosen:
            base = base.transform_filter(alt.datum.of == text)
        last = number == len(runs) - 1
        cells = _latent_cells(base, f"At most {width} latents, by mean layer", width)
        cells = cells.encode(
            color=alt.Color("probability:Q", title="P(layer | latent)").scale(domain=[0, 1]),
            tooltip=[
                "run:N",
                alt.Tooltip("latent:O"),
                alt.Tooltip("layer:O"),
                alt.Tooltip("probability:Q", title="P(layer | latent)"),
            ],
        )
        if not last:
            cells.encoding.x.title = None
        if len(runs) > 1:
            cells.encoding.y.title = f"{swept}{run}, by layer"
        if note:
            said = (
                base.transform_aggregate(cells="count()", groupby=note)
                .mark_text(align="right", baseline="bottom")
                .encode(x=alt.value("width"), y=alt.value(-11), text="note:N")
            )
            cells = alt.layer(cells, said.properties(name=f"note_{number}"))
        panels.append(cells)
    if len(panels) == 1:
        return _titled(panels[0].add_params(*chosen).properties(height=220), title, subtitle)
    panels = [panel.properties(height=84) for panel in panels]
    return _titled(alt.vconcat(*panels, spacing=16).add_params(*chosen), title, subtitle)


def variance_by_rank(table: pd.DataFrame, title: str, subtitle: str | None = None):
    """The two parts of every latent's variance, stacked; a slider picks one latent.

    ``table`` has one row per latent and part: ``rank`` (0, 1, …), ``latent``, ``part`` and
    ``variance`` (squared layers).
    """
    table = _table(table, "variance_by_rank", "rank", "latent", "part", "variance")
    most = int(table["rank"].max())
    rank = alt.param(
        name="rank",
        value=most // 2,
        bind=alt.binding_range(min=0, max=most, step=1, name="Latent, by its variance "),
    )
    base = alt.Chart(table)
    areas = (
        base.mark_area(opacity=0.75)
        .encode(
            x=alt.X("rank:Q", title="Latents, by variance").scale(nice=False),
            y=alt.Y("variance:Q", title="Variance of the layer (squared layers)", stack=True),
            color=alt.Color("part:N", title=None),
            tooltip=["latent:O", "part:N", "variance:Q"],
        )
        .properties(name="parts")
    )
    chosen = base.transform_filter(alt.datum.rank == rank)
    rule = chosen.mark_rule().encode(x="mean(rank):Q", detail="latent:N").properties(name="chosen")
    words = (
        chosen.transform_pivot("part", value="variance", groupby=["latent"])
        .transform_calculate(
            label="'latent ' + datum.latent + ': ' + format(datum['at one token'], '.3f') + ' + ' "
            "+ format(datum['between tokens'], '.3f') + ' = ' "
            "+ format(datum['at one token'] + datum['between tokens'], '.3f')"
        )
        .mark_text(align="left", baseline="top")
        .encode(x=alt.value(8), y=alt.value(8), text="label:N")
        .properties(name="sum")
    )
    chart = alt.layer(areas, rule, words).add_params(rank).properties(height=280)
    return _titled(chart, title, subtitle)
