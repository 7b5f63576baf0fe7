"""What `benchmarks/gpu.json` says, for the chapter on speed."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd

#: Columns of the file → what a reader sees, and how.
COLUMNS = {
    "name": ("card", str),
    "torch": ("torch", str),
    "commit": ("commit", str),
    "date": ("date", str),
    "tera_per_second": ("10¹² per second", "{:,.0f}".format),
    "relative_error": ("relative error", "{:.0e}".format),
    "verdict": ("verdict", str),
    "ms": ("ms", "{:,.2f}".format),
    "roofline_ms": ("roofline, ms", "{:,.2f}".format),
    "share": ("of roofline", "{:.0%}".format),
    "of_time": ("of the time", "{:.0%}".format),
    "relative_difference": ("relative difference", "{:.0e}".format),
    "seconds": ("seconds", "{:,.0f}".format),
    "cpu_seconds": ("seconds on 2 CPU cores", "{:,.0f}".format),
    "vectors_per_second": ("10⁶ vectors/s", lambda value: f"{value / 1e6:.2f}"),
    "tokens_per_second": ("10⁶ tokens/s", lambda value: f"{value / 1e6:.2f}"),
    "minutes": ("minutes", "{:.1f}".format),
    "peak_gb": ("peak memory, GB", "{:.1f}".format),
    "fvu": ("FVU", "{:.4f}".format),
}


def gpu(path: str | Path) -> pd.DataFrame:
    """The rows of the file, by phase: `what` was measured, and a column for each quantity."""
    rows = json.loads(Path(path).read_text(encoding="utf-8"))
    return pd.DataFrame(rows).set_index("phase")


def shown(rows: pd.DataFrame, *phases: str) -> pd.DataFrame:
    """Rows of some phases as a reader sees them; what was not measured is left blank."""
    chosen = rows.loc[list(phases)].set_index("what")
    kept = [name for name in COLUMNS if name in chosen and chosen[name].notna().any()]
    table = pd.DataFrame(index=chosen.index)
    for name in kept:
        title, form = COLUMNS[name]
        table[title] = [form(value) if pd.notna(value) else "" for value in chosen[name]]
    table.index.name = None
    return table


def loops(rows: pd.DataFrame) -> pd.DataFrame:
    """Rates of whole training runs, with `case` and `implementation`, for `charts.benchmarks.rates`."""
    pattern = r"loop, (?P<implementation>.*), (?P<dead>[0-9]+) dead"
    found = rows.loc["loop"].reset_index(drop=True)
    table = found["what"].str.extract(pattern).assign(per_second=found["tokens_per_second"])
    table = table.dropna().assign(case=lambda t: t["dead"] + " latents dead")
    return table.assign(slowest=table["per_second"], fastest=table["per_second"])
