"""Charts of the chapter on planted truth."""

from __future__ import annotations

import altair as alt
import pandas as pd

from mlsae_book.charts import _level_axis_title, _select, _table, _titled

#: Axis titles of the estimators, with their units.
ESTIMATORS = {
    "ratio_latent": "Eq. 11, E[Var(L | J)] / Var(L) (ratio)",
    "ratio_latent_by_total": "Eq. 11 weighted by activation totals (ratio)",
    "ratio_token": "Eq. 12, E[Var(L | J, T)] / E[Var(L | J)] (ratio)",
    "mean_entropy": "Mean entropy of P(layer | latent) (fraction of its maximum)",
    "active_layers": "Active layers, above 0.1 % of tokens (fraction)",
    "mmcs_recall": "MMCS of the truth with the learned rows (cosine)",
    "mmcs_precision": "MMCS of the learned rows with the truth (cosine)",
    "recovered": "True directions with a row at 0.9 or more (fraction)",
    "latents_per_feature": "Different latents per recovered feature (count)",
    "adjacent_cosine": "Cosine of adjacent layers (mean over pairs)",
    "fvu": "FVU, global variance (fraction)",
    "l0": "L0 (active latents per vector)",
}


def estimators(
    table: pd.DataFrame,
    title: str,
    subtitle: str | None = None,
    x: str = "drift",
    x_title: str = "Drift (degrees from a layer to the next)",
) -> alt.LayerChart:
    """One estimator against a setting of the world; the reader chooses the estimator.

    ``table`` has one row per (setting, estimator, series): the column ``x``, ``estimator`` (of
    `ESTIMATORS`), ``series`` (truth, oracle or estimate), ``value``, ``low`` and ``high``.
    """
    table = _table(table, "planted.estimators", x, "estimator", "series", "value", "low", "high")
    present = set(table["estimator"])
    names = [name for name in ESTIMATORS if name in present]
    labels = [ESTIMATORS[name].split(" (")[0] for name in names]
    chosen = _select("estimator", names, "Estimator", labels)
    base = (
        alt.Chart(table)
        .transform_filter(alt.datum.estimator == chosen)
        .encode(x=alt.X(f"{x}:Q", title=x_title))
    )
    order = ["truth", "oracle", "estimate"]
    lines = base.mark_line(point=True).encode(
        y=alt.Y("value:Q", title=None),
        color=alt.Color("series:N", title=None, sort=order),
        strokeDash=alt.StrokeDash("series:N", sort=order, legend=None),
        tooltip=[f"{x}:Q", "series:N", "value:Q", "low:Q", "high:Q"],
    )
    bars = (
        # Without an interval the bar has no length; a layer without rows would have no scale.
        base.transform_calculate(
            least="isValid(datum.low) ? datum.low : datum.value",
            most="isValid(datum.high) ? datum.high : datum.value",
        )
        .mark_rule(strokeDash=[1, 0], strokeWidth=2)
        .encode(y="least:Q", y2="most:Q", color=alt.Color("series:N", title=None, sort=order))
    )
    layers = alt.layer(
        lines.properties(name="planted_values"), bars.properties(name="planted_intervals")
    )
    return _titled(
        _level_axis_title(layers, "estimator", ESTIMATORS, names, chosen), title, subtitle
    )


def splits(table: pd.DataFrame, title: str, subtitle: str | None = None) -> alt.Chart:
    """Different latents that a feature has at its layers, against drift, one line a kind.

    ``table`` has one row per (drift, kind): ``drift`` in degrees, ``kind``, ``latents`` (mean
    count), ``recovered`` (fraction of the feature's layers).
    """
    table = _table(table, "planted.splits", "drift", "kind", "latents", "recovered")
    labels = ["Different latents", "Share of layers recovered"]
    value = _select("split_value", ["latents", "recovered"], "Show", labels)
    chart = (
        alt.Chart(table, name="planted_splits")
        .transform_calculate(shown="datum[split_value]")
        .mark_line(point=True)
        .encode(
            x=alt.X("drift:Q", title="Drift (degrees from a layer to the next)"),
            y=alt.Y("shown:Q", title="Mean over features (latents, or fraction of layers)"),
            color=alt.Color("kind:N", title=None),
            strokeDash=alt.StrokeDash("kind:N", title=None),
            tooltip=["kind:N", "drift:Q", "latents:Q", "recovered:Q"],
        )
        .add_params(value)
    )
    return _titled(chart.properties(height=280), title, subtitle)
