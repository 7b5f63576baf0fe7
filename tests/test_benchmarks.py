"""The benchmarks: they run, compare numbers before times, and name what is missing."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import vl_convert
from test_charts import assert_drawn, chosen, said

from benchmarks import bench_loop, bench_train, common, gpu, reference
from benchmarks.common import LIMIT, OURS, Case, Implementation
from mlsae_book.charts import benchmarks as charts

ROOT = Path(__file__).parents[1]


def case(**implementations):
    made = {name: Implementation(*parts) for name, parts in implementations.items()}
    return Case("distributions", "none", 10, "things", made, steps=1, rounds=2)


def rows_of(case, monkeypatch):
    monkeypatch.setattr(common, "_peak", lambda *_: {"peak_megabytes": 1.0})
    return {row["implementation"]: row for row in common.run(case, False, 1)}


def test_missing_and_broken_packages_are_named_and_the_rest_is_timed(monkeypatch):
    monkeypatch.setitem(common.PACKAGES, "no_such_module", "no-such-package")

    def fails():
        raise RuntimeError("first line\nsecond")

    rows = rows_of(
        case(
            mlsae_core=(lambda: lambda: 1,),
            limit=(lambda: lambda: 1,),
            missing=(lambda: lambda: 1, "no_such_module"),
            cannot_be_made=(fails, "torch"),
            cannot_run=(lambda: fails, "torch"),
        ),
        monkeypatch,
    )
    assert rows["missing"]["note"] == "not installed: pip install no-such-package"
    for name in ("cannot_be_made", "cannot_run"):
        assert rows[name]["note"] == "failed: RuntimeError: first line second"
        assert rows[name]["per_second"] is None
    ours = rows[OURS]
    assert ours["rounds"] == 2
    assert ours["slowest"] <= ours["per_second"] <= ours["fastest"]
    assert ours["times_ours"] == 1
    assert ours["share_of_limit"] == ours["per_second"] / rows[LIMIT]["per_second"]
    assert "not installed" in common.line(rows["missing"])


def test_our_own_failure_is_no_row_but_an_error(monkeypatch):
    def fails():
        raise RuntimeError("ours")

    with pytest.raises(RuntimeError, match="ours"):
        rows_of(case(mlsae_core=(lambda: fails,)), monkeypatch)


@pytest.mark.parametrize("dead", [0.0, 0.25])
def test_the_described_training_step_gives_the_losses_of_ours(dead):
    compared = bench_train.case("tiny", dead)
    results = {
        name: [step() for _ in range(2)]
        for name, implementation in compared.implementations.items()
        if implementation.package is None and name != LIMIT
        for step in [implementation.make()]
    }
    compared.check(results)
    results[OURS][1] *= 1 + 10 * bench_train.TOLERANCE
    with pytest.raises(AssertionError):
        compared.check(results)


@pytest.mark.parametrize("make", [bench_loop._evaluation_case, bench_loop._distributions_case])
def test_the_references_give_our_numbers(make):
    compared = make("tiny")
    results = {name: [i.make()()] for name, i in compared.implementations.items()}
    compared.check(results)
    results[OURS][0] = results[OURS][0] * 1.01
    with pytest.raises(AssertionError, match="expected agreement"):
        compared.check(results)


def test_the_described_distributions_are_those_of_a_world_worked_out_by_hand():
    """One latent, two tokens, two layers: P = (1/4, 3/4) and (1, 0)."""
    found = reference.Distributions(2, 1)
    values = torch.tensor([[[1.0], [2.0]], [[3.0], [0.0]]])
    found.update(torch.zeros(2, 2, 1, dtype=torch.int64), values)
    result = found.compute()
    assert result["probs"][:, 0].tolist() == [5 / 8, 3 / 8]
    within, between = 3 / 16 / 2, (3 / 8) ** 2
    assert float(result["ratio_token"]) == pytest.approx(within / (within + between))
    assert float(result["ratio_latent"]) == 1  # a single latent


def test_rates_are_drawn_with_their_range_for_the_chosen_case():
    table = pd.DataFrame({"case": ["a", "a", "b", "b"], "implementation": ["x", "y"] * 2})
    table = table.assign(per_second=[2.0, 5, 8, 3], slowest=[1.0, 4, 7, 2], fastest=[3.0, 6, 9, 5])
    for case, rows in table.groupby("case"):
        spec = charts.rates(table, "name", "Things per second", "A finding").to_dict()
        spec = chosen(spec, name_case=case)
        names = {"implementation": rows.implementation}
        assert_drawn(spec, "bar", **names, **{"Things per second": rows.per_second})
        ends = {"slowest": rows.slowest, "fastest": rows.fastest}
        assert_drawn(spec, "rule mark", **names, **ends)
        encoded = ["slowest", "implementation", "fastest"]  # which come before the tooltip
        assert list(said(spec, "rule mark"))[:3] == encoded


def test_the_chart_draws_what_was_measured_and_offers_the_cases():
    rates = {"per_second": 2.0, "slowest": 1.0, "fastest": 3.0}
    rows = [{"case": c, "implementation": i, **rates} for c in ("a", "b") for i in ("x", "y")]
    rows.append({**rows[0], "implementation": "missing", **dict.fromkeys(rates)})
    spec = charts.rates(pd.DataFrame(rows), "name", "Things per second", "A finding").to_dict()
    [shown] = spec["datasets"].values()
    assert {row["implementation"] for row in shown} == {"x", "y"}
    assert [p["bind"]["options"] for p in spec["params"] if "bind" in p] == [["a", "b"]]
    svg = vl_convert.vegalite_to_svg(spec, vl_version="5.8")
    assert "Things per second" in svg
    with pytest.raises(ValueError, match="lacks the column fastest"):
        charts.rates(pd.DataFrame(rows).drop(columns="fastest"), "n", "Axis", "A finding")


@pytest.mark.slow
def test_one_command_writes_rows_of_every_suite_asked_for(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "training step", "distributions", "--quick"]
    subprocess.run([*command, "--json", tmp_path / "r.json"], cwd=ROOT, check=True)
    content = json.loads((tmp_path / "r.json").read_text())
    assert content["quick"]
    assert {row["suite"] for row in content["results"]} == {"training step", "distributions"}
    for row in content["results"]:
        if row["implementation"] == OURS:
            assert row["per_second"] > 0
            assert row["peak_megabytes"] > row["import_megabytes"] > 0
    assert str(Path.home()) not in json.dumps(content)


def test_an_unknown_suite_is_refused():
    command = [sys.executable, "-m", "benchmarks", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "expected suites of training step" in done.stderr


def test_the_phases_for_a_gpu_run_and_say_what_they_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "rows", [])
    out = tmp_path / "gpu.json"
    monkeypatch.setattr(sys, "argv", ["gpu", "env", "loop", "paper", "large", "--json", str(out)])
    gpu.main()
    rows = json.loads(out.read_text())
    assert not [row for row in rows if "error" in row]
    rates = {row["what"]: row for row in rows if "tokens_per_second" in row}
    assert set(rates) == {"loop, sparse, 0 dead", "loop, sparse, 32 dead", "the paper's default"}
    assert rates["loop, sparse, 32 dead"]["dead"] > rates["loop, sparse, 0 dead"]["dead"]
    [minutes] = [row["minutes"] for row in rows if "minutes" in row]
    assert minutes == pytest.approx(1e9 / rates["the paper's default"]["tokens_per_second"] / 60)


def test_a_phase_that_fails_is_named_and_stops_no_other(tmp_path, monkeypatch, capsys):
    def broken():
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu, "rows", [])
    monkeypatch.setattr(gpu, "PHASES", {"broken": broken, "env": gpu.env})
    monkeypatch.setattr(sys, "argv", ["gpu", "--json", str(tmp_path / "gpu.json")])
    gpu.main()
    errors = [row.get("error") for row in json.loads((tmp_path / "gpu.json").read_text())]
    assert errors == ["RuntimeError: out of memory", None]


def test_a_compiled_model_gives_the_same_losses_in_the_loop_for_a_gpu():
    tiny = gpu.SHAPES["tiny"]
    ours, compiled = (gpu.train_random(tiny, 2, 0, "sparse", c).loss for c in (False, True))
    assert ours.to_numpy() == pytest.approx(compiled.to_numpy(), rel=bench_loop.TOLERANCE)


@pytest.mark.parametrize("module", [bench_train, gpu])
def test_larger_shapes_have_the_latents_that_they_name(module):
    for name, latents in (("Pythia-1b", 131072), ("Gemma 2 2B", 147456)):
        shape = module.SHAPES[name]
        assert shape.n_latents == 64 * shape.d_model == latents


def test_memory_at_a_larger_shape_is_measured_in_a_process_of_its_own():
    [measured] = common.cases(["memory"], quick=True)
    [row] = common.run(measured, True, 1)
    assert row["peak_megabytes"] > row["import_megabytes"] > 0
    assert row["per_second"] is None
    assert not row["note"]


def test_some_suites_are_written_beside_the_others_with_their_machine(tmp_path, monkeypatch):
    def results(machine, *suites):
        rows = [{"suite": suite, "of": machine} for suite in suites]
        content = {"quick": False, "machine": machine, "cases": rows, "results": rows}
        joined = common.beside_others(content, file)
        file.write_text(json.dumps(joined))
        assert joined["results"] == joined["cases"]
        return joined["machine"], {
            row["suite"]: (row["of"], row.get("machine")) for row in joined["cases"]
        }

    monkeypatch.setattr(common, "SUITES", ("evaluation", "distributions", "memory"))
    file = tmp_path / "r.json"
    results("a", "evaluation", "distributions")
    machine, found = results("b", "memory")
    assert machine == "a"
    assert found == {"evaluation": ("a", None), "distributions": ("a", None), "memory": ("b", "b")}
    machine, found = results("c", "evaluation")
    assert machine == "a"
    assert found == {"evaluation": ("c", "c"), "distributions": ("a", None), "memory": ("b", "b")}
    machine, found = results("d", "evaluation", "distributions")
    assert machine == "d"
    assert found == {"evaluation": ("d", None), "distributions": ("d", None), "memory": ("b", "b")}
