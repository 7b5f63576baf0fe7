"""The page of promises: its tests exist, and its tables are what whole runs found."""

import ast
import json
from pathlib import Path

import pandas as pd
import pytest

from mlsae_book import __main__ as book
from mlsae_book.tables import promises
from mlsae_core import __main__ as core

TESTS = Path(__file__).parent
NAMED = pd.read_csv(TESTS.parent / "book/promises.csv")


@pytest.mark.parametrize("name", NAMED["test"])
def test_every_promise_names_a_test_that_exists(name):
    module, function = name.split("::")
    tree = ast.parse((TESTS / f"{module}.py").read_text())
    assert function in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_tables_are_what_the_runs_found(tmp_path):
    about = {"faults": 3, "commit": "abc", "date": "2026-01-02"}
    runs = {"train": about | {"kills": 4, "runs": 2}, "lens": about | {"kills": 5, "runs": 7}}
    (tmp_path / "k").write_text(json.dumps(runs))
    table = promises.kills(tmp_path / "k")
    assert table["kills"].to_dict() == {"train": 4, "lens": 5, "together": 9}
    assert table["runs"].tolist() == [2, 7, 9]
    assert table["faults"].tolist() == [3, 3, 6]
    assert table["commit"].tolist() == ["abc", "abc", ""]
    kinds = {"spec": {"refused": 5, "works": 1}, "lens": {"refused": 2, "crashed": 3}}
    (tmp_path / "f").write_text(json.dumps(about | {"kinds": kinds}))
    table = promises.inputs(tmp_path / "f")
    assert list(table)[:3] == ["works", "refused", "crashed"]
    assert table.loc["lens"].tolist()[:3] == [0, 2, 3]
    assert table.loc["together"].tolist()[:3] == [1, 7, 3]


def killed():
    """The commands of kills.py, which is not imported here: it lets its process ask no hub."""
    tree = ast.parse((TESTS / "kills.py").read_text())
    made = [node.value for node in tree.body if isinstance(node, ast.Assign)
            and node.targets[0].id == "COMMANDS"]  # fmt: skip
    return {name.value for name in made[0].keys}


def test_every_command_that_computes_is_killed():
    commands = {name for module in (core, book) for name in module._commands().names}
    assert killed() == commands - {"status"}


def test_the_page_shows_whole_runs_without_a_fault():
    kills, fuzz = (json.loads((TESTS / f"{name}.json").read_text()) for name in ("kills", "fuzz"))
    assert sum(of["kills"] for of in kills.values()) >= 100
    assert kills.keys() <= killed()
    assert min(of["runs"] for of in kills.values()) >= 10
    assert fuzz["inputs"] == sum(sum(k.values()) for k in fuzz["kinds"].values()) >= 2000
    assert [of["faults"] for of in (*kills.values(), fuzz)] == [0] * (len(kills) + 1)
