"""Names for people: what a reader sees in the place of a column's name, in tables and charts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

#: Columns, and rows that are called by a column's name. What is missing here is a word already.
NAMES = {
    # how well a dictionary reconstructs
    "fvu": "FVU",
    "fvu_global": "global FVU",
    "fvu_global_half": "global FVU, half precision",
    "fvu_per_dimension": "FVU per dimension",
    "mse": "MSE",
    "l0": "L0",
    "auxk": "AuxK",
    "nowhere": "at no layer",
    "l1": "L1",
    "kl": "KL",
    "delta_ce": "delta CE",
    "delta_ce_low": "delta CE, low",
    "delta_ce_high": "delta CE, high",
    "delta_ce_half": "delta CE, half precision",
    "ce_original": "CE, original",
    "ce_replaced": "CE, reconstructed",
    "ce_zero": "CE, zero instead",
    "ce_mean": "CE, mean instead",
    "ce_recovered_zero": "CE recovered, of zero",
    "ce_recovered_mean": "CE recovered, of the mean",
    # over layers and positions
    "active_layers": "active layers",
    "one_layer": "at one layer",
    "relative_layer": "relative layer",
    "mean_layer": "mean layer",
    "partner_mean_layer": "partner's mean layer",
    "same_layer": "same layer",
    "null_same": "same, null model",
    "null_same_layer": "same layer, null model",
    "null_neighbouring": "neighbouring, null model",
    "null_next": "next, null model",
    "self_next": "itself next",
    "excess_low": "excess, low",
    "excess_high": "excess, high",
    "single_low": "single, low",
    "single_high": "single, high",
    "blocks_low": "blocks, low",
    "blocks_high": "blocks, high",
    "q05": "5 % quantile",
    "q25": "25 % quantile",
    "q50": "median",
    "q75": "75 % quantile",
    "q95": "95 % quantile",
    "std": "standard deviation",
    # drift and geometry
    "norm_first": "norm, first layer",
    "norm_last": "norm, last layer",
    "adjacent": "adjacent layers",
    "adjacent_raw": "adjacent layers, not centred",
    "ends": "first and last layer",
    "ends_raw": "first and last layer, not centred",
    "ends_perpendicular": "first and last layer, if updates were perpendicular",
    "raw": "not centred",
    "mmcs": "MMCS",
    "as_activations": "rows as activations",
    # one dictionary or several
    "mlsae": "MLSAE",
    "sae": "SAE",
    "best_at_own": "own is best, layers",
    "spread_own": "spread, own",
    "spread_mlsae": "spread, MLSAE",
    "own_moved": "own, moved",
    "own_gaussian": "own, random directions",
    "transfer_matched": "transfer, moved",
    "everywhere_matched": "everywhere, moved",
    "r_l0": "uniformity of importance",
    "r_activation": "uniformity of activations",
    "latents_low": "latents, low",
    "latents_high": "latents, high",
    "aux_alpha": "weight of AuxK",
    "training_memory_mb": "memory of training, MB",
    "expansion_factor": "R",
    # one latent
    "one_token": "with one token",
    "activation_before": "activation before",
    "activation_after": "activation after",
    "relative_change": "change of the stream",
    "logit_change": "change of the logit",
    # language models and lenses
    "training_tokens": "training tokens",
    "validation_loss": "validation loss",
    "unigram_loss": "loss of unigrams",
    "bigram_loss": "loss of bigrams",
    "logit_lens": "logit lens",
    "tuned_lens": "tuned lens",
    "gaussian": "Gaussian",
    # a planted truth
    "ratio_latent": "Eq. 11",
    "ratio_latent_by_total": "Eq. 11, by activation totals",
    "ratio_token": "Eq. 12",
    "mean_entropy": "mean entropy",
    "mmcs_recall": "MMCS of the truth",
    "mmcs_precision": "MMCS of the learned rows",
    "latents_per_feature": "latents per feature",
    "adjacent_cosine": "cosine of adjacent layers",
    "latent_variance": "variance of the latent",
    "latent_variance_by_total": "variance of the latent, by activation totals",
    # speed
    "per_second": "in a second",
    "times_ours": "times as long",
    "share_of_limit": "share of the limit",
    "hours_for_1e9_tokens": "hours for 10⁹ tokens",
    "peak_megabytes": "peak memory, MB",
}

#: Whole numbers from here on get separators; below it they may number a latent.
LONG = 10_000
MISSING = "–"
#: Parts of a chart that hold rows and not what is said of them.
DATA = ("data", "datasets")


def named(table: pd.DataFrame) -> pd.DataFrame:
    """The same table with names for people, in its head, of its axes and of its rows."""
    table = table.rename(columns=NAMES, index=NAMES)
    return table.rename_axis(columns=NAMES, index=NAMES)


def html(table: pd.DataFrame) -> str:
    """HTML of a table as notebooks show it: nothing is cut, what is missing is a dash.

    >>> "<td>12,345</td>" in html(pd.DataFrame({"tokens": [12345]}))
    True
    """
    shown = named(table).apply(_filled)
    formats = [_format(shown.iloc[:, number]) for number in range(shown.shape[1])]
    with pd.option_context("display.max_colwidth", None):
        return shown.to_html(formatters=formats, na_rep=MISSING, notebook=True)


def _filled(column: pd.Series) -> pd.Series:
    """pandas shows a None among other things as "None", whatever is to stand for what is missing."""
    return column.where(column.notna(), MISSING) if column.dtype == object else column


def _format(column: pd.Series) -> Callable[[Any], str] | None:
    """Whole numbers are written as such, also large ones among floats; others as pandas does."""
    if column.dtype.kind == "f":
        whole = (column.dropna() % 1 == 0).all() and column.max() >= 100
        return (lambda value: MISSING if pd.isna(value) else _whole(int(value))) if whole else None
    return _whole if column.dtype.kind in "iuO" else None


def _whole(value: Any) -> str:
    number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return f"{value:,}" if number and abs(value) >= LONG else str(value)


def explained(spec: Any) -> Any:
    """The same chart, whose tooltips have names for people where they have no title."""
    if isinstance(spec, list):
        return [explained(one) for one in spec]
    if not isinstance(spec, dict):
        return spec
    made = {key: value if key in DATA else explained(value) for key, value in spec.items()}
    tips = made.get("tooltip")
    if tips is not None:
        made["tooltip"] = (
            [_titled(one) for one in tips] if isinstance(tips, list) else _titled(tips)
        )
    return made


def _titled(tip: Any) -> Any:
    name = NAMES.get(tip.get("field")) if isinstance(tip, dict) else None
    return {**tip, "title": tip.get("title", name)} if name else tip


def show() -> None:
    """Let the notebook that runs this show its tables in this way."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        shell.display_formatter.formatters["text/html"].for_type(pd.DataFrame, html)
