"""The paper's experiments as they are declared, what they would cost, and how they are launched."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import transformers

from mlsae_core import analysis, architecture, fits, models, status
from mlsae_core.spec import ModelSpec, SpecError, load_experiment

ROOT = Path(__file__).parents[1]
DECLARED = sorted((ROOT / "book" / "experiments" / "paper").glob("*.yml"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def offline(monkeypatch):
    """No configuration can be had from a hub."""

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(transformers.PreTrainedConfig, "get_config_dict", fail)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", fail)


def costs(name):
    experiment = load_experiment(ROOT / "book" / "experiments" / "paper" / f"{name}.yml")
    return experiment, status.status(experiment).set_index("stage", append=True)


@pytest.mark.parametrize("path", DECLARED, ids=lambda path: path.stem)
def test_what_the_papers_experiments_cost_is_known_without_a_network(path, offline, data):
    found = status.status(load_experiment(path))
    assert set(found.state) == {"missing"}
    trained = found[found.stage == "train"]
    assert len(trained) == {"models": 8, "expansion": 9, "sparsity": 6}[path.stem]
    assert (found[["seconds", "gpu_hours", "memory_gb"]] > 0).all(axis=None)
    assert (trained.disk_gb > 0).all()
    with pytest.raises(SpecError, match=r"hub id, got a/b, whose config\.json cannot be read"):
        architecture.model_config(ModelSpec("a/b"))


def test_sizes_are_those_that_the_paper_prints():
    """ "Between 512 and 131072 latents for Pythia-70m"; parameters as the models' authors say."""
    runs = [run for _, run in costs("expansion")[0].runs]
    latents = [run.n_latents(6, architecture.model_config(run.model).hidden_size) for run in runs]
    assert (latents[0], latents[-1]) == (512, 131072)
    parameters = {"70m": 70e6, "160m": 162e6, "410m": 405e6, "1b-": 1.01e9, "1.4b": 1.41e9,
                  "gpt2": 124e6, "gemma": 2.61e9, "Llama": 3.21e9}  # fmt: skip
    for _, run in costs("models")[0].runs:
        (expected,) = (n for name, n in parameters.items() if name in run.model.path)
        # Blocks with gated MLPs and shared keys have somewhat more or fewer.
        assert fits.memory(run, True, 8192).model == pytest.approx(2 * expected, rel=0.15)
    assert {run.model.path for _, run in costs("models")[0].runs} == models.dimensions().keys()


def test_the_costs_of_the_papers_default_are_those_that_were_measured():
    rows = json.loads((ROOT / "benchmarks" / "gpu.json").read_text())
    (measured,) = (row for row in rows if row["what"] == "1 billion tokens at that rate")
    default = costs("models")[1].loc[(0, "train")]
    assert 60 * default.gpu_hours == pytest.approx(measured["minutes"], rel=0.05)
    assert default.memory_gb == pytest.approx(measured["peak_gb"], rel=0.25)


def test_the_memory_of_an_evaluation_is_what_was_measured_and_grows_with_the_layers_to_a_limit(
    monkeypatch,
):
    [(_, run)] = load_experiment(ROOT / "book/experiments/fetched/smollm2.yml").runs
    found = fits.memory(run, False, 2048)
    assert sum(found) / 1e9 == pytest.approx(2.6, rel=0.1)  # the process' largest, with ablations
    width, depth, words = 576, 30, 49_152
    held = depth * width * 2048 + 2 * words * 2048
    assert found.batch == 4 * (16 * analysis.VECTORS_AT_ONCE["cpu"] + held)
    monkeypatch.setitem(analysis.VECTORS_AT_ONCE, "cpu", 1)  # one layer at a time, at least
    assert fits.memory(run, False, 2048).batch == 4 * (16 * 3 * width * 2048 + held)
    monkeypatch.delitem(analysis.VECTORS_AT_ONCE, "cpu")  # as on a GPU
    assert fits.memory(run, False, 2048).batch == 4 * (48 * depth * width * 2048 + held)


def test_the_readmes_table_is_computed():
    rows, sums = [], []
    for labels, run in costs("models")[0].runs:
        memory = fits.memory(run, True, run.train.micro_batch_tokens)
        sums.append(sum(memory) / 1e9)
        cells = [labels["case"], *(f"{size / 1e9:.1f}" for size in (*memory, sum(memory)))]
        rows.append(f"| {' | '.join(cells)} |\n")
    assert "".join(rows) in README, "".join(rows)
    assert max(sums[:-2]) < 40 < min(sums[-2:])  # as it says of cards
    assert max(sums) < 80


def test_the_readmes_batch_script_ends_in_a_checkpoint_and_asks_for_more_time(tmp_path):
    """With stand-ins for the scheduler's commands, and for training: it notes that it was told."""
    (script,) = re.findall(r"```sh\n(#!/bin/bash\n.*?)```", README, re.DOTALL)
    stand_ins = {
        "srun": 'exec "$@"',
        "accelerate": 'trap "echo saved >> log; exit 143" TERM; echo "$*" > started; '
        "while :; do sleep 0.05; done",
        "scontrol": 'echo "$*" >> log',
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "job.sh").write_text(script)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    job = subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=env)
    for _ in range(200):
        if (tmp_path / "started").exists():
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    job.wait(10)
    assert (tmp_path / "started").read_text().startswith("launch --num_processes 8 -m mlsae_core")
    assert (tmp_path / "log").read_text() == "saved\nrequeue 7\n"
