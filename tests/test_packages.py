"""A machine that trains and measures needs few packages: no charts, no hub, no decompression."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
ABSENT = (
    "altair",
    "datasets",
    "IPython",
    "ipywidgets",
    "jupyter_cache",
    "jupytext",
    "tuned_lens",
    "vl_convert",
    "zstandard",
)
SPEC = """\
model: {model}
data: {{path: {text}, context_length: 8}}
expansion_factor: 2
k: 4
tokens: 256
batch_tokens: 64
"""


def without(program: str, *arguments) -> str:
    """What a program prints in a process in which these packages cannot be imported."""
    start = f"import sys; sys.modules.update(dict.fromkeys({ABSENT}))\n"
    command = [sys.executable, "-c", start + program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_a_dictionary_is_trained_and_evaluated(inputs, tmp_path):
    spec = tmp_path / "spec.yml"
    spec.write_text(SPEC.format(model=inputs / "gpt_neox", text=inputs / "text.jsonl"))
    program = """
from pathlib import Path
from mlsae_core import store
from mlsae_core.__main__ import main
store.DATA = Path(sys.argv[2])
store.SHIPPED, store.STORE = store.DATA / "shipped", store.DATA / "store"
sys.exit(main(["train", sys.argv[1]]) or main(["evaluate", sys.argv[1]]))
"""
    without(program, spec, tmp_path / "data")
    stages = {path.name for path in (tmp_path / "data" / "store").iterdir()}
    assert {"train", "evaluate"} <= stages


def test_the_benchmark_of_a_gpu_is_run(tmp_path):
    program = """
from benchmarks import gpu
sys.argv[1:] = ["env", "loop", "--json", sys.argv[1]]
gpu.main()
"""
    without(program, tmp_path / "gpu.json")
    rows = json.loads((tmp_path / "gpu.json").read_text())
    assert [row["phase"] for row in rows] == ["env", "loop", "loop"]


def test_tests_are_collected():
    program = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    files = ("activations", "kernels", "lm", "objective", "pipeline", "sae", "train")
    paths = [f"tests/test_{name}.py" for name in files]
    options = ("-q", "--collect-only", "-p", "no:nbval", "-o", "addopts=")
    said = without(program, *options, *paths)
    assert all(path in said for path in paths)
