"""How fast is the training loop on a GPU, how far from its limit, and what memory does it take?

A GPT-NeoX of random weights, with the layers and width of the model that a case is named after,
reads random tokens that were packed before: nothing is downloaded. The language model is in
bfloat16, and so are the autoencoder's scores, under accelerate. The limit is one product of all
vectors with the encoder in the same precision, and nothing else. Without a GPU the same runs at
tiny shapes, in float32 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from benchmarks.bench_loop import Shape, random_lm, timed_loop
from benchmarks.common import LIMIT, OURS, Case, Implementation, Step
from mlsae_core import kernels
from mlsae_core.lm import LanguageModel
from mlsae_core.spec import DataSpec, ModelSpec, RunSpec, SaeSpec, SiteSpec, TrainSpec
from mlsae_core.text import TokenBlocks

COMPILED = "mlsae_core, compiled model"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = "bf16" if DEVICE == "cuda" else "fp32"
KERNEL = "triton" if DEVICE == "cuda" else "sparse"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32

# Sequences and positions are those of a micro-batch. 2304 is divided by 9 heads of 256.
SHAPES = {
    "tiny": Shape(2, 32, 2, 97, 256, 4, 2, 16),
    "Pythia-70m": Shape(6, 512, 8, 50304, 32768, 32, 4, 2048),
    "Pythia-1b": Shape(16, 2048, 8, 50304, 131072, 32, 1, 2048),
    "Gemma 2 2B": Shape(26, 2304, 9, 256000, 147456, 32, 1, 2048),
}


def cases(quick: bool) -> list[Case]:
    if quick:
        return [_case("tiny", 3, 2)]
    large = [_memory_case(name) for name in ("Pythia-1b", "Gemma 2 2B")]
    return [_case("Pythia-70m", 12, 16), *large]


def _memory_case(name: str) -> Case:
    """Few steps: of the first on, latents are dead and AuxK is on."""
    case = _case(name, 4, 4)
    ours = {OURS: case.implementations[OURS]}
    return replace(case, implementations=ours, rounds=0, shares=None)


def run_spec(shape: Shape, steps: int, micro_batches: int) -> RunSpec:
    batch = shape.tokens * micro_batches
    return RunSpec(
        ModelSpec("random"),
        DataSpec(context_length=shape.positions),
        SiteSpec(),
        SaeSpec(expansion_factor=shape.n_latents // shape.d_model, k=shape.k),
        TrainSpec(
            tokens=steps * batch,
            batch_tokens=batch,
            micro_batch_tokens=shape.tokens,
            precision=PRECISION,
        ),
    )


def _case(name: str, steps: int, micro_batches: int) -> Case:
    shape = SHAPES[name]
    run = run_spec(shape, steps, micro_batches)
    makers = {
        OURS: partial(_loop, shape, run),
        COMPILED: partial(_loop, shape, run, compiled=True),
        LIMIT: partial(_limit, shape, run),
    }
    return Case(
        "gpu",
        name,
        run.train.tokens,
        "tokens",
        {label: Implementation(make) for label, make in makers.items()},
        steps=1,
        rounds=1,
        shares=partial(_shares, shape, run),
        settings=shape.settings()
        | {"steps": steps, "tokens a step": run.train.batch_tokens, "precision": PRECISION},
        device=DEVICE,
    )


def _loop(
    shape: Shape,
    run: RunSpec,
    seconds: dict[str, float] | None = None,
    wait: Callable[[], None] = lambda: None,
    compiled: bool = False,
) -> Step:
    lm, blocks = inputs(shape, run)
    if compiled:
        lm = lm.compiled("inductor" if DEVICE == "cuda" else "aot_eager")
    return timed_loop(run, lm, blocks, {} if seconds is None else seconds, wait, KERNEL)


def inputs(shape: Shape, run: RunSpec) -> tuple[LanguageModel, TokenBlocks]:
    """A language model of random weights, and random text."""
    lm = random_lm(shape, DEVICE, DTYPE)
    generator = torch.Generator().manual_seed(1)
    size = max(run.train.batch_tokens // shape.positions, 64), shape.positions
    tokens = torch.randint(1, shape.vocabulary, size, generator=generator)
    tokens[tokens % 512 == 1] = 0  # ends of documents, whose vectors are left out
    return lm, TokenBlocks(tokens.int().numpy())


def _shares(shape: Shape, run: RunSpec) -> dict[str, float]:
    """Parts of the time of a run in which each part waits for the one before."""
    seconds: dict[str, float] = {}
    _loop(shape, run, seconds, _wait)()
    return {part: spent / sum(seconds.values()) for part, spent in seconds.items()}


def _limit(shape: Shape, run: RunSpec) -> Step:
    vectors = run.train.tokens * shape.n_layers
    rows = min(kernels.chunk_rows(shape.n_latents, DEVICE), vectors)
    options = {"device": DEVICE, "dtype": DTYPE}
    weights, chunk = (torch.randn(n, shape.d_model, **options) for n in (shape.n_latents, rows))
    out = torch.empty(rows, shape.n_latents, **options)

    def step():
        for _ in range(math.ceil(vectors / rows)):
            kernels._matmul(chunk, weights.T, out)
        _wait()

    return step


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
