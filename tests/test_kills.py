"""A few of the kills of kills.py; `make kills` kills more than 100 times."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_a_killed_command_ends_as_if_nothing_had_happened():
    """In a process of its own, which forks before it has threads."""
    done = subprocess.run(
        [sys.executable, HERE / "kills.py", "1"],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    kills = int(done.stdout.splitlines()[-1].split()[0])
    assert kills >= 3, done.stdout
