"""Many runs in one tidy table: a sweep's label becomes a row's name, whatever was swept."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd


def stack(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Tables of several sweeps beneath each other, for charts in which the reader picks a sweep.

    Args:
        tables: name of the sweep, as the reader is to see it → its table, whose first column is
            what was swept, as `experiments.tables` gives it.

    Returns:
        The tables' other columns after ``sweep``, ``run`` (the swept value, as text) and
        ``position`` (0, 1, … in the order of the sweep).

    Raises:
        ValueError: no tables.
    """
    if not tables:
        raise ValueError("tables: expected at least one sweep, got none")
    parts = []
    for name, table in tables.items():
        label = table.columns[0]
        position = pd.factorize(table[label])[0]
        front = pd.DataFrame({"sweep": name, "run": table[label].astype(str), "position": position})
        parts.append(pd.concat([front, table.drop(columns=label)], axis=1))
    return pd.concat(parts, ignore_index=True)


def across(table: Callable[..., pd.DataFrame], made: dict, *arguments) -> pd.DataFrame:
    """One table of every sweep, beneath each other: `stack` of ``table(runs, *arguments)``.

    Args:
        table: makes a table of a sweep's runs, such as `experiments.tables` or `spread.entropies`.
        made: name of the sweep, as the reader is to see it → its runs, as `table` wants them.
    """
    return stack({name: table(runs, *arguments) for name, runs in made.items()})
