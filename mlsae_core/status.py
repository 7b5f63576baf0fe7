"""What exists of an experiment, how it was made, and what the rest would cost."""

from __future__ import annotations

import time

import numpy as np
import pandas as pd

from mlsae_core import architecture, fits, pipeline, store
from mlsae_core.pipeline import EVALUATION_BATCH_TOKENS
from mlsae_core.spec import EvaluateSpec, Experiment, RunSpec, SubjectSpec
from mlsae_core.store import Artefact

# Operations a second, as `_operations` counts them, of one H200 with `--kernel triton --compile` in
# bfloat16: a test holds it to benchmarks/gpu.json.
GPU_SPEED = 5.8e14


def provenance(artefact: Artefact) -> dict:
    """How a result was made, in one row: stage, key, tokens, seconds, commit, date."""
    names = ("stage", "tokens", "seconds", "commit", "written")
    row = {name: artefact.meta.get(name) for name in names}
    return {"stage": row.pop("stage"), "key": artefact.key, **row}


def stages(experiment: Experiment, run: SubjectSpec) -> list[str]:
    """The stages of one run of an experiment, also those that other packages compute."""
    trained = ["train"] if isinstance(run, RunSpec) else []
    if experiment.evaluate is None:
        return trained
    # One vector a token has no layers to be distributed over.
    left_out = ("distributions",) if run.site.stacked else ()
    return [*trained, *(name for name in experiment.analyses if name not in left_out)]


def status(experiment: Experiment) -> pd.DataFrame:
    """One row per result: shipped, stored, begun or missing, and what it would still take.

    ``seconds`` on this machine, by a count of floating-point operations and the measured speed of a
    matrix product; expect it to be right within a factor of two. ``gpu_hours`` by the speed of
    training on one H200, as it was measured at the size of Pythia-70m; several share them.
    ``memory_gb`` of each process, at least (`fits.memory`). ``disk_gb`` of the weights and the last
    checkpoint. A run that was begun continues from its checkpoint and takes less.
    """
    rows, speed = [], None
    for labels, run in experiment.runs:
        for stage in ("train", "evaluate", "distributions"):
            if stage not in stages(experiment, run):
                continue
            identity = pipeline.STAGES[stage].key(run, experiment.evaluate)[0]
            row = {"stage": stage, "key": identity, "state": _state(stage, identity)}
            costs = {"seconds": 0, "gpu_hours": 0.0, "memory_gb": 0.0, "disk_gb": 0.0}
            if row["state"] in ("begun", "missing"):
                speed = speed or _speed()
                operations = _operations(stage, run, experiment.evaluate)
                training = stage == "train"
                batch = run.train.micro_batch_tokens if training else EVALUATION_BATCH_TOKENS
                memory = fits.memory(run, training, batch)
                costs = {
                    "seconds": round(operations / speed),
                    "gpu_hours": operations / GPU_SPEED / 3600,
                    "memory_gb": sum(memory) / 1e9,
                    # The dictionary, and in a checkpoint once more, with Adam's two moments.
                    "disk_gb": 4 * memory.dictionary * training / 1e9,
                }
            rows.append(labels | row | costs)
    return pd.DataFrame(rows)


def _state(stage: str, identity: str) -> str:
    for name, root in (("shipped", store.SHIPPED), ("stored", store.STORE)):
        if (root / stage / identity / "meta.json").is_file():
            return name
    return "begun" if pipeline.checkpoints(identity) else "missing"


def _operations(stage: str, run: SubjectSpec, settings: EvaluateSpec | None) -> float:
    """Floating-point operations of a stage, at the share of peak speed that was measured."""
    config = architecture.model_config(run.model)
    width, depth, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    model = 24 * depth * width**2 + 4 * depth * width * run.data.context_length
    layers = len(run.site.indices(depth))
    if isinstance(run, RunSpec):
        numbers = width * width * run.sae.expansion_factor
    else:  # two matrices in float32, at most
        given = run.dictionary
        found = store.dictionary_files(given.path, given.revision, given.folders)
        sizes = [file.stat().st_size for files in found.values() for file in files]
        numbers = sum(sizes) / len(found) / 8
    encode = 2 * layers * numbers
    if stage == "train":  # decoding and the gradients touch k latents: a tenth of it
        return run.train.tokens * (model + 1.1 * encode) * 2
    read = settings.tokens * (model + encode)
    if stage == "evaluate":  # half of the blocks lie above a layer, and the output embeddings
        choices = 3 if settings.ablations else 1
        each = layers * choices * (model / 6 + 8 / 3 * vocabulary * width)
        read += (settings.replaced or settings.tokens) * each
    return read * 2


def _speed() -> float:
    """Floating-point operations per second of this machine's matrix product, in float32."""
    a = np.ones((768, 768), np.float32)
    a @ a
    start = time.perf_counter()
    for _ in range(5):
        a @ a
    return 5 * 2 * 768**3 / (time.perf_counter() - start)
