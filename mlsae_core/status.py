"""What exists of an experiment, how it was made, and what the rest would cost."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mlsae_core import architecture, fits, models, pipeline, store, text
from mlsae_core.pipeline import EVALUATION_BATCH_TOKENS, MEAN_TOKENS
from mlsae_core.spec import EvaluateSpec, Experiment, RunSpec, SpecError, SubjectSpec
from mlsae_core.store import Artefact

if TYPE_CHECKING:
    from mlsae_core.activations import TextSource

# Operations a second, as `_operations` counts them, of one H100 with `--kernel triton --compile` in
# bfloat16: a test holds it to benchmarks/gpu.json.
GPU_SPEED = 2.57e14
#: What is measured of a stage may take so long, by the speed of a matrix product, and so much
#: memory. Of larger models it is a smaller part.
SAMPLE_SECONDS, SAMPLE_BYTES = 4.0, 6e9
#: A stage of a model that is not here reaches about so much of the speed of a large product.
SHARE_OF_PRODUCT = 0.5
#: Tokens of a sample, at least.
SMALLEST = 256


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
    takes more than `SAMPLE_BYTES`, at that of a matrix product, right within a factor of two.
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
            keyed = pipeline.STAGES[stage].key(run, experiment.evaluate)
            identity = pipeline.here(stage, keyed, run)[0]
            row = {"stage": stage, "key": identity, "state": _state(stage, identity)}
            costs = {"seconds": 0, "gpu_hours": 0.0, "memory_gb": 0.0, "disk_gb": 0.0}
            if row["state"] in ("begun", "missing"):
                training = stage == "train"
                batch = run.train.micro_batch_tokens if training else EVALUATION_BATCH_TOKENS
                alike = stage, run.model, run.data.context_length, batch
                if alike not in speeds:
                    speeds[alike] = _speed(stage, run, experiment.evaluate)
                speed = speeds[alike]
                settings = _there(run, experiment.evaluate, tokens)
                read = run.train.tokens if training else settings.tokens
                operations = _operations(stage, run, read, settings)
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


def _operations(
    stage: str, run: SubjectSpec, tokens: int, settings: EvaluateSpec | None = None
) -> float:
    """Floating-point operations of the products of a stage that reads so many tokens.

    A block has about 12 d_model² weights, and its attention a product of queries and keys and one
    of probabilities and values.
    """
    config = architecture.model_config(run.model)
    width, depth = config.hidden_size, config.num_hidden_layers
    layers = run.site.indices(depth)
    block = 2 * 12 * width**2 + 2 * 2 * width * run.data.context_length
    vectors = 1 if run.site.stacked else len(layers)  # of a token
    if isinstance(run, RunSpec):
        weights = (width * len(layers) // vectors) ** 2 * run.sae.expansion_factor
    else:  # two matrices in float32, at most
        given = run.dictionary
        found = store.dictionary_files(given.path, given.revision, given.folders)
        sizes = [file.stat().st_size for files in found.values() for file in files]
        weights = sum(sizes) / len(found) / 8
    encode = 2 * vectors * weights
    read = (layers[-1] + 1) * block  # the model is left after the last of the layers
    if stage == "train":  # decoding and the gradients touch k latents: a tenth of it
        return tokens * (read + 1.1 * encode)
    if stage == "distributions":  # and of Gaussian vectors
        return tokens * (read + 2 * encode)
    scored, choices = settings.replaced or tokens, 3 if settings.ablations else 1
    above = sum(depth - 1 - layer for layer in layers)
    logits = 2 * config.vocab_size * width
    replace = depth * block + logits + choices * (above * block + len(layers) * logits)
    again = read if settings.replaced else 0  # then those that are scored are read by themselves
    means = min(MEAN_TOKENS, tokens) * read if settings.ablations else 0
    return means + tokens * (again + encode) + scored * replace


def _there(run: SubjectSpec, settings: EvaluateSpec | None, known: dict) -> EvaluateSpec | None:
    """The settings of an analysis with no more tokens than the text has."""
    if settings is None or not (counted := _tokens(run, known)):
        return settings
    tokens = min(settings.tokens, max(counted[settings.split], run.data.context_length))
    return replace(
        settings, tokens=tokens, replaced=settings.replaced and min(settings.replaced, tokens)
    )


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
    product = SHARE_OF_PRODUCT * _product_speed()
    training = stage == "train"
    batch = run.train.micro_batch_tokens if training else EVALUATION_BATCH_TOKENS
    if models.folder(run.model.path) is None:
        return product
    if settings is not None:
        settings = replace(settings, replaced=None)
    sequences = max(batch // run.data.context_length, 1)
    for smaller, part in _smaller(stage, run, sequences):
        tokens = part * smaller.data.context_length
        operations = _operations(stage, smaller, tokens, settings)
        if operations / product < SAMPLE_SECONDS:
            break
    if sum(fits.memory(smaller, training, tokens)) > SAMPLE_BYTES:
        return product
    try:
        work = _sample(stage, smaller, settings, part)
    except SpecError:  # of weights or a tokenizer that is to be fetched
        return product
    return operations / _usual_seconds(work)


def _smaller(stage: str, run: SubjectSpec, sequences: int) -> Iterator[tuple[SubjectSpec, int]]:
    """Parts of a batch of so many sequences, each half of the one before: fewer sequences, then
    fewer layers that are replaced, spread evenly over the model, then shorter sequences."""
    yield run, sequences
    while sequences > 1 and sequences // 2 * run.data.context_length >= SMALLEST:
        sequences //= 2
        yield run, sequences
    layers = run.site.indices(architecture.model_config(run.model).num_hidden_layers)
    number = len(layers) if stage == "evaluate" and not run.site.stacked else 1
    while number > 4:
        number //= 2
        kept = tuple(layers[(2 * i + 1) * len(layers) // (2 * number)] for i in range(number))
        run = replace(run, site=replace(run.site, layers=kept))
        yield run, sequences
    while sequences * (context := run.data.context_length // 2) >= SMALLEST:
        run = replace(run, data=replace(run.data, context_length=context))
        yield run, sequences


def _usual_seconds(work: Callable[[], object]) -> float:
    """Of the middle one of up to three times, after a first that makes what is made only once."""
    taken = [_seconds(work), _seconds(work)]
    while len(taken) < 4 and sum(taken) < SAMPLE_SECONDS:
        taken.append(_seconds(work))
    return statistics.median(taken[1:])


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
        source, sae, sequences, ablations=settings.ablations, progress=False
    )


def _micro_batch(sae, source: TextSource, sequences: int, loss: Callable):
    """Forward and backward pass of a batch."""
    batch = next(source.batches(sequences))
    target = None if batch.target is batch.source else batch.target
    loss(sae, batch.source, target).total.backward()
    sae.decoder.grad.sum().item()  # a GPU has then done it


def _product_speed() -> float:
    """Floating-point operations per second of this machine's matrix product, in float32."""
    a = np.ones((768, 768), np.float32)
    return 2 * 768**3 / min(_seconds(lambda: a @ a) for _ in range(10))
