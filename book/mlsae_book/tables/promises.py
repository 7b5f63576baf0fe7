"""What whole runs of `tests/kills.py` and `tests/fuzz.py` found, for the chapter on promises."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd


def kills(path: str | Path) -> pd.DataFrame:
    """Kills of each command in how many runs, what was wrong at their ends, and of which commit."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    table = pd.DataFrame(found).T.rename_axis("command")
    table.loc["together"] = table[["kills", "runs", "faults"]].sum()
    return table.fillna("")


def inputs(path: str | Path) -> pd.DataFrame:
    """What became of the inputs of each kind, and of all together."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    table = pd.DataFrame(found["kinds"]).T.fillna(0).astype(int)
    known = [name for name in ("works", "works, for long", "refused", "stopped") if name in table]
    table = table[[*known, *(name for name in table if name not in known)]]
    table.loc["together"] = table.sum()
    table["faults"] = [""] * (len(table) - 1) + [str(found["faults"])]
    return table.rename_axis(f"commit {found['commit']}, {found['date']}")
