"""How much work a step and an evaluation do, counted and not timed: the same on every machine.

A dense product is one of all (vector, latent) pairs, however it is cut into chunks; there is one
per training step, and no tensor of the chunk's size outlives it.
"""

import dataclasses
import math
from collections import Counter

import pytest
import torch
from test_analysis import tiny_sae
from tiny_lm import N_LAYERS, VOCAB, reading, tiny_lm, tiny_tokens
from torch.utils._python_dispatch import TorchDispatchMode

from mlsae_core import activations, analysis, kernels, objective, pipeline, status, train
from mlsae_core.sae import MLSAE
from mlsae_core.spec import EvaluateSpec, run_from_dict
from mlsae_core.text import TokenBlocks

LAYERS, TOKENS, D, LATENTS, K, ROWS = 2, 96, 8, 1024, 4, 32
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul"}


class Work(TorchDispatchMode):
    """Counts the multiplications of matrix products, and the largest memory made anew.

    multiplications : of all products of dense matrices, attention's among them.
    largest : elements of the largest storage that an operation made.
    """

    def __init__(self):
        super().__init__()
        self.multiplications = self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = _dense([*args, *(kwargs or {}).values()])
        before = {x.untyped_storage().data_ptr() for x in given}
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in PRODUCTS:
            a, b = [x for x in given if x.ndim >= 2][:2]
            self.multiplications += a.numel() * b.shape[-1]
        elif "scaled_dot_product" in name:  # scores, and the sums of values
            queries, keys = given[:2]
            self.multiplications += 2 * queries.numel() * keys.shape[-2]
        for x in _dense(result if isinstance(result, tuple | list) else [result]):
            if x.untyped_storage().data_ptr() not in before:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return result


def _dense(values):
    """The tensors among some values that have a storage; sparse ones hold indices and values."""
    tensors = [x for x in values if isinstance(x, torch.Tensor)]
    return [x for x in tensors if x.layout == torch.strided]


def step_of(sae, dead):
    x = torch.randn(LAYERS, TOKENS, D, generator=torch.Generator().manual_seed(0))
    optimiser = sae.make_optimizer()

    def step():
        sae.tokens_since_active[:dead] = sae.dead_tokens
        loss = objective.loss(sae, x)
        loss.total.backward()
        optimiser.step()
        optimiser.zero_grad()
        sae.count_tokens(sae.fired(loss.topk), TOKENS)

    return step


def work_of_a_step(kernel, dead):
    sae = MLSAE(D, LATENTS, K, kernel=kernel, generator=torch.Generator().manual_seed(1))
    step = step_of(sae, dead)
    step()  # buffers are made in the first
    with Work() as work:
        step()
    return work


@pytest.fixture
def chunks(monkeypatch):
    monkeypatch.setattr(kernels, "chunk_rows", lambda *_: ROWS)


DENSE_PRODUCT = LAYERS * TOKENS * D * LATENTS


@pytest.mark.parametrize("dead", [0, LATENTS // 4])
def test_a_training_step_makes_one_dense_product_and_stores_no_scores(chunks, dead):
    work = work_of_a_step("sparse", dead)
    # The gradient of the bias is one more vector times the encoder.
    assert DENSE_PRODUCT <= work.multiplications <= DENSE_PRODUCT + 2 * D * LATENTS
    # All scores are LAYERS · TOKENS · LATENTS; dead ones are selected from one chunk at a time.
    assert work.largest <= max(ROWS * LATENTS // 2, LATENTS * D)


@pytest.mark.parametrize("dead", [0, LATENTS // 4])
def test_the_guard_sees_what_the_definition_does(chunks, dead):
    """The dense oracle makes five products or more and stores the scores: the counts must show."""
    work = work_of_a_step("dense", dead)
    assert work.multiplications >= 5 * DENSE_PRODUCT
    assert work.largest >= LAYERS * TOKENS * LATENTS


def test_dead_latents_cost_no_product(chunks):
    none, some = (work_of_a_step("sparse", dead) for dead in (0, LATENTS // 4))
    assert none.multiplications == some.multiplications


def test_candidates_cost_one_product_and_no_more_memory(chunks):
    """What is scored again is no dense product; few vectors are done over."""
    work = work_of_a_step("candidates", 0)
    assert DENSE_PRODUCT <= work.multiplications <= 1.3 * DENSE_PRODUCT
    assert work.largest <= max(ROWS * LATENTS, LATENTS * D)


def test_memory_of_a_step_does_not_grow_with_latents_times_vectors(chunks, monkeypatch):
    """Twice the vectors: the largest tensor is still a chunk's or a weight's."""
    first = work_of_a_step("sparse", 0).largest
    monkeypatch.setitem(globals(), "TOKENS", 2 * TOKENS)
    assert work_of_a_step("sparse", 0).largest == first


@pytest.mark.parametrize("ablations", [False, True])
def test_evaluation_runs_the_model_once_and_holds_few_logits(monkeypatch, ablations):
    """Per batch one original pass, one call per block for all replaced layers, few logits."""
    lm, calls, sizes = tiny_lm(), Counter(), []
    passes, blocks, head = lm.original, lm._call_block, lm.logits

    def original(*args):
        calls["original"] += 1
        return passes(*args)

    def call_block(*args):
        calls["blocks"] += 1
        return blocks(*args)

    def logits(rows):
        result = head(rows)
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(lm, "original", original)
    monkeypatch.setattr(lm, "_call_block", call_block)
    monkeypatch.setattr(lm, "logits", logits)
    monkeypatch.setitem(activations.LOGITS_AT_ONCE, "cpu", 2000)
    batches = [tiny_tokens(4, 9, seed=i) for i in range(3)]
    options = {"ablations": ablations, "progress": False}
    analysis.evaluate(reading(lm, batches), tiny_sae(), **options)
    assert calls["original"] == len(batches)
    assert calls["blocks"] == len(batches) * (N_LAYERS - 1)
    assert max(sizes) <= 2000
    streams = 1 + N_LAYERS * (3 if ablations else 1)
    predictions = len(batches) * 4 * 8
    assert sum(sizes) == predictions * streams * VOCAB  # each logit is made once
    assert len(sizes) == len(batches) * math.ceil(4 * 8 / (2000 // (streams * VOCAB)))


@pytest.mark.parametrize("layers", ["all", [0], [0, 2]])
@pytest.mark.parametrize("stage", ["train", "distributions", "evaluate", "ablations", "replaced"])
def test_what_status_counts_is_done(inputs, data, stage, layers):
    """Products of a model whose blocks have 12 d_model² weights, to what one position more or less
    makes: no prediction is scored at a sequence's last."""
    context, sequences = 16, 32
    run = run_from_dict({
        "model": str(inputs / "gpt2"), "layers": layers, "expansion_factor": 16, "k": 4,
        "data": {"path": str(inputs / "text.jsonl"), "context_length": context},
        "tokens": context * sequences, "batch_tokens": context * sequences,
    })  # fmt: skip
    source = pipeline.Session().source(run)
    tokens = torch.randint(2, 300, (sequences, context), generator=torch.Generator().manual_seed(0))
    source = dataclasses.replace(source, blocks=TokenBlocks(tokens.numpy()))
    sae, settings = train.build_sae(run, source), None
    with Work() as work:
        if stage == "train":
            status._micro_batch(sae, source, sequences, objective.loss)
        elif stage == "distributions":
            analysis.distributions(source, sae, sequences, replicates=2, progress=False)
        else:
            replaced, ablations = (2 if stage == "replaced" else None), stage == "ablations"
            settings = EvaluateSpec(
                tokens=tokens.numel(), ablations=ablations, replaced=replaced and replaced * context
            )
            analysis.evaluate(
                source, sae, sequences, ablations=ablations, replaced=replaced, progress=False
            )
    name = stage if stage in ("train", "distributions") else "evaluate"
    counted = status._operations(name, run, tokens.numel(), settings)
    assert 2 * work.multiplications == pytest.approx(counted, rel=1 / context)
