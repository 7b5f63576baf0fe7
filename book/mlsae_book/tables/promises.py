"""What whole runs of `tests/kills.py` and `tests/fuzz.py` found, for the chapter on promises."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd


def kills(path: str | Path) -> pd.DataFrame:
    """Kills of each command, their sum and what was wrong at the end, of the runs in the file."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    rows = [*found["commands"].items(), ("together", found["kills"])]
    table = pd.DataFrame(rows, columns=["command", "kills"]).set_index("command")
    table["runs"] = [found["runs"]] * (len(rows) - 1) + [found["runs"] * (len(rows) - 1)]
    return _with_faults(table, found)


def inputs(path: str | Path) -> pd.DataFrame:
    """What became of the inputs of each kind, and of all together."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    table = pd.DataFrame(found["kinds"]).T.fillna(0).astype(int)
    known = [name for name in ("works", "works, for long", "refused", "stopped") if name in table]
    table = table[[*known, *(name for name in table if name not in known)]]
    table.loc["together"] = table.sum()
    return _with_faults(table, found)


def _with_faults(table: pd.DataFrame, found: dict) -> pd.DataFrame:
    """The table, with the number of faults beside the last row; its head says of which commit."""
    table["faults"] = [""] * (len(table) - 1) + [str(found["faults"])]
    return table.rename_axis(f"commit {found['commit']}, {found['date']}")
