"""What exists of an experiment, how it was made, and what the rest would cost."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mlsae_core import architecture, fits, models, pipeline, store, text
from mlsae_core.pipeline import EVALUATION_BATCH_TOKENS
from mlsae_core.spec import EvaluateSpec, Experiment, RunSpec, SpecError, SubjectSpec
from mlsae_core.store import Artefact

if TYPE_CHECKING:
    from mlsae_core.activations import TextSource

# Operations a second, as `_operations` counts them, of one H100 with `--kernel triton --compile` in
# bfloat16: a test holds it to benchmarks/gpu.json.
GPU_SPEED = 5.14e14
#: What is measured of a stage may take so long, by the speed of a matrix product.
SAMPLE_SECONDS = 10.0


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

    ``seconds`` on this machine, by a count of floating-point operations, of no more text than is
    there, at the speed of a sample of the stage with random weights; where the model is not here or
    is too large for one, at that of a matrix product, which is right within a factor of two.
    ``gpu_hours`` by the speed of
    training on one H100, as it was measured at the size of Pythia-70m; several share them.
    ``memory_gb`` of each process, at least (`fits.memory`). ``disk_gb`` of the weights and the last
    checkpoint. A run that was begun continues from its checkpoint and takes less.
    """
    rows, speeds, tokens = [], {}, {}
    for labels, run in experiment.runs:
        for stage in ("train", "evaluate", "distributions"):
            if stage not in stages(experiment, run):
                continue
            identity = pipeline.STAGES[stage].key(run, experiment.evaluate)[0]
            row = {"stage": stage, "key": identity, "state": _state(stage, identity)}
            costs = {"seconds": 0, "gpu_hours": 0.0, "memory_gb": 0.0, "disk_gb": 0.0}
            if row["state"] in ("begun", "missing"):
                training = stage == "train"
                batch = run.train.micro_batch_tokens if training else EVALUATION_BATCH_TOKENS
                alike = stage, run.model, run.data.context_length, batch
                if alike not in speeds:
                    speeds[alike] = _speed(stage, run, experiment.evaluate)
                speed = speeds[alike]
                operations = _operations(stage, run, _there(run, experiment.evaluate, tokens))
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


def _there(run: SubjectSpec, settings: EvaluateSpec | None, known: dict) -> EvaluateSpec | None:
    """The settings of an analysis with no more tokens than the text has."""
    if settings is None or not (counted := _tokens(run, known)):
        return settings
    there = max(counted[settings.split], run.data.context_length)
    return replace(settings, tokens=min(settings.tokens, there))


def remarks(experiment: Experiment) -> list[str]:
    """What is to be known of an experiment's text before a training reads it: `text.remarks`."""
    said, tokens = [], {}
    for _, run in experiment.runs:
        if isinstance(run, RunSpec) and (counted := _tokens(run, tokens)):
            said += text.remarks(run.data, counted, run.train.tokens)
    return list(dict.fromkeys(said))


def _tokens(run: SubjectSpec, known: dict) -> dict[str, int] | None:
    """`text.counted` of a run, for runs of the same text and model once."""
    if (alike := (run.data, run.model)) not in known:
        known[alike] = text.counted(run.data, _tokenizer(run))
    return known[alike]


def _tokenizer(run: SubjectSpec):
    """The tokenizer of a model that is here, else nothing."""
    from transformers import AutoTokenizer

    if (folder := models.folder(run.model.path)) is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError):  # a model that is to be fetched
        return None


# --- how fast this machine is -------------------------------------------------------------------


def _speed(stage: str, run: SubjectSpec, settings: EvaluateSpec | None) -> float:
    """Operations a second, as `_operations` counts them, of a stage on a sample, or a product."""
    product = _product_speed()
    if models.folder(run.model.path) is None:
        return product
    context = run.data.context_length
    if stage == "train":
        batch = max(run.train.micro_batch_tokens // context, 1) * context
        small = replace(run, train=replace(run.train, tokens=batch, batch_tokens=batch))
        operations = _operations(stage, small, None)
    else:
        batch = max(EVALUATION_BATCH_TOKENS // context, 1) * context
        operations = _operations(stage, run, replace(settings, tokens=batch))
    if 2 * operations / product > SAMPLE_SECONDS:
        return product
    try:
        work = _sample(stage, run, settings, batch // context)
    except SpecError:  # of weights or a tokenizer that is to be fetched
        return product
    work()  # what is made only once
    return operations / min(_seconds(work) for _ in range(3))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _sample(
    stage: str, run: SubjectSpec, settings: EvaluateSpec | None, sequences: int
) -> Callable[[], object]:
    """What a stage does with one batch, of random tokens by random weights."""
    import torch

    from mlsae_core import analysis, objective, train

    session = pipeline.Session()
    if run.model.random_weights is None:
        run = replace(run, model=replace(run.model, random_weights=0))
    source = session.source(run)
    generator = torch.Generator().manual_seed(0)
    shape = sequences, run.data.context_length
    tokens = torch.randint(source.lm.vocab_size, shape, generator=generator)
    source = replace(source, blocks=text.TokenBlocks(tokens.numpy()))
    sae = train.build_sae(run, source) if isinstance(run, RunSpec) else session.sae(run)
    if stage == "train":
        return functools.partial(_micro_batch, sae, source, sequences, objective.loss)
    if stage == "distributions":
        return lambda: analysis.distributions(source, sae, sequences, replicates=2, progress=False)
    return lambda: analysis.evaluate(
        source, sae, sequences, ablations=settings.ablations, mean_tokens=1, progress=False
    )


def _micro_batch(sae, source: TextSource, sequences: int, loss: Callable):
    """Forward and backward pass of a batch."""
    batch = next(source.batches(sequences))
    target = None if batch.target is batch.source else batch.target
    loss(sae, batch.source, target).total.backward()


def _product_speed() -> float:
    """Floating-point operations per second of this machine's matrix product, in float32."""
    a = np.ones((768, 768), np.float32)
    a @ a
    return 5 * 2 * 768**3 / _seconds(lambda: [a @ a for _ in range(5)])
