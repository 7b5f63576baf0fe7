"""The page's tables of a GPU against the file that they show."""

import json

from mlsae_book.tables import benchmarks

ROWS = [
    {"phase": "env", "what": "card", "name": "A card", "torch": "2.11.0", "commit": "6e10"},
    {"phase": "parts", "what": "scores", "ms": 2.5, "roofline_ms": 2.25, "share": 0.9},
    {"phase": "loop", "what": "loop, sparse, 0 dead", "tokens_per_second": 434960.0, "dead": 0.0},
    {"phase": "loop", "what": "  host waits a step at train.py:1", "times": 1.0},
    {"phase": "loop", "what": "loop, triton, compiled model, 32 dead", "tokens_per_second": 7.3e5},
]


def test_tables_show_the_numbers_of_the_file(tmp_path):
    (tmp_path / "gpu.json").write_text(json.dumps(ROWS))
    rows = benchmarks.gpu(tmp_path / "gpu.json")
    parts = benchmarks.shown(rows, "parts", "env")
    assert parts.loc["scores"].to_dict() == {
        "card": "", "torch": "", "commit": "",
        "ms": "2.50", "roofline, ms": "2.25", "of roofline": "90%",
    }  # fmt: skip
    assert parts.loc["card", "commit"] == "6e10"  # not a number
    loops = benchmarks.loops(rows)
    assert list(loops["implementation"]) == ["sparse", "triton, compiled model"]
    assert list(loops["case"]) == ["0 latents dead", "32 latents dead"]
    assert list(loops["per_second"]) == list(loops["slowest"]) == [434960.0, 7.3e5]
