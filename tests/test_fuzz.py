"""A sample of the damaged and hostile inputs of fuzz.py; `make fuzz` tries 2,000."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
def test_good_inputs_work_and_damaged_ones_end_in_one_line(tmp_path):
    """In a process of its own, which is offline from the start and forks before it has threads."""
    done = subprocess.run(
        [sys.executable, HERE / "fuzz.py", "60"],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "0 faults" in done.stdout
    assert "works" in done.stdout
    assert "refused" in done.stdout
