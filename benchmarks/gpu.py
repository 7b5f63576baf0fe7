"""On a machine with a GPU: is it right, how fast is it, and where does the time go?

    python -m benchmarks.gpu [PHASE ...] [--json FILE]

Phases run in order, in about four minutes; each prints as it goes, none stops the next, and FILE
has all of it (of a whole run on a GPU benchmarks/gpu.json, which the chapter on speed shows). Text
and language models are random, but for `real`, which trains the book's default run; so nothing is
downloaded. Parts stand beside their roofline: the larger of the bytes that must be moved over the
speed of a copy, and the operations over the speed of a large product in that precision, both
measured by `env`. What stays in the L2 cache can be faster. Without a GPU everything runs at tiny
shapes, which proves nothing but that it runs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import json
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from benchmarks import bench_train
from benchmarks.bench_loop import Shape, random_lm
from mlsae_core import kernels, objective, pipeline, store
from mlsae_core import train as training
from mlsae_core.activations import TextSource
from mlsae_core.lm import LanguageModel
from mlsae_core.sae import MLSAE
from mlsae_core.spec import (
    DataSpec,
    ModelSpec,
    RunSpec,
    SaeSpec,
    SiteSpec,
    TrainSpec,
    load_experiment,
    run_from_dict,
)
from mlsae_core.text import TokenBlocks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"

# The shape of Pythia-70m at the paper's default, R = 64 and k = 32; and of larger models. Sequences
# and positions are those of a micro-batch. 2304 is divided by 9 heads of 256.
SHAPES = {
    "tiny": Shape(2, 32, 2, 97, 256, 4, 2, 16),
    "Pythia-70m": Shape(6, 512, 8, 50304, 32768, 32, 4, 2048),
    "Pythia-1b": Shape(16, 2048, 8, 50304, 131072, 32, 1, 2048),
    "Gemma 2 2B": Shape(26, 2304, 9, 256000, 147456, 32, 1, 2048),
}
SHAPE = SHAPES["Pythia-70m" if CUDA else "tiny"]
D, M, K = SHAPE.d_model, SHAPE.n_latents, SHAPE.k
N = SHAPE.n_layers * SHAPE.tokens  # vectors of a micro-batch
AUX = MLSAE(D, D, 1).aux_k
DEAD = M // 8
MICRO_BATCHES = 16 if CUDA else 2  # of a step: the paper's 131,072 tokens

rows: list[dict] = []
speed = {"copy": 3e12, "bf16": 7e14, "tf32": 4e14, "fp32": 5e13}  # a second; measured by `env`


def note(what: str, **values):
    """Keep and print one row of results."""
    rows.append({"phase": note.phase, "what": what, **values})
    shown = ", ".join(
        f"{v:,.4g} {k}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items()
    )
    print(f"{what:<60}{shown}", flush=True)


def wait():
    if CUDA:
        torch.cuda.synchronize()


def milliseconds(function: Callable, warm: int = 2, rounds: int = 7) -> float:
    """Median over rounds, each waited for."""
    if not CUDA:
        warm, rounds = 0, 1
    for _ in range(warm):
        function()
    times = []
    for _ in range(rounds):
        wait()
        began = time.perf_counter()
        function()
        wait()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def part(what: str, function: Callable, gigabytes: float = 0, tera: float = 0, kind: str = "bf16"):
    """Time something beside its roofline: GB moved and TFLOP of products."""
    took = milliseconds(function)
    limit = 1e3 * max(gigabytes * 1e9 / speed["copy"], tera * 1e12 / speed[kind])
    note(what, ms=took, roofline_ms=limit, share=limit / took)


# --- phases -----------------------------------------------------------------------------------


def env():
    name = torch.cuda.get_device_name() if CUDA else "none measured"
    note(
        "card",
        name=name,
        torch=torch.__version__,
        commit=store.provenance()["commit"],
        date=time.strftime("%Y-%m-%d", time.gmtime()),
    )
    if not CUDA:
        return
    a = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    speed["copy"] = 2 * a.numel() / milliseconds(lambda: b.copy_(a)) * 1e3
    note("copy, bytes read and written", tera_per_second=speed["copy"] / 1e12)
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in "xy")
        speed[kind] = 2 * 8192**3 / milliseconds(lambda x=x, y=y: x @ y, 2, 5) * 1e3
        note(f"product of 8192 x 8192 matrices, {kind}", tera_per_second=speed[kind] / 1e12)
    torch.backends.cuda.matmul.allow_tf32 = False


def right():
    """The largest relative error of results and gradients against float64 on the CPU; twice."""
    generator = torch.Generator().manual_seed(0)
    for n, d, m, k, aux, dead in (
        (20, 24, 300, 8, 16, 64),
        (777, 130, 3001, 16, 65, 500),
        (300, 512, 32768, 32, 256, 4000),
    )[: 3 if CUDA else 1]:
        x, b = torch.randn(n, d, generator=generator), torch.randn(d, generator=generator)
        weights = [F.normalize(torch.randn(m, d, generator=generator)) for _ in "ed"]
        which = torch.randperm(m, generator=generator)[:dead].sort()[0]
        results = {}
        for kernel in ("dense", "sparse", "triton", "triton again"):
            device, dtype = DEVICE, torch.float32
            if kernel == "dense":
                device, dtype = "cpu", torch.float64
            tensors = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, *weights, b)]
            name = kernel.split()[0]
            y, y_dead, _ = kernels.autoencode(*tensors, k, which.to(device), aux, name)
            (y.sin().sum() + y_dead.square().sum()).backward()
            results[kernel] = [t.detach().cpu().double() for t in (y, y_dead)]
            results[kernel] += [t.grad.cpu().double() for t in tensors]
        same = all(map(torch.equal, results["triton"], results["triton again"]))
        note(f"triton twice: {n} vectors", verdict="the same bits" if same else "NOT THE SAME")
        for kernel in ("sparse", "triton"):
            pairs = zip(results[kernel], results["dense"], strict=True)
            worst = max(float((a - e).norm() / e.norm()) for a, e in pairs)
            verdict = "ok" if worst < 1e-5 else "WRONG"
            shape = f"{n} vectors, d = {d}, {m} latents, k = {k}, {aux} of {dead} dead"
            note(f"{kernel}: {shape}", relative_error=worst, verdict=verdict)


def parts():
    from mlsae_core import triton_kernels

    x = torch.randn(N, D, device=DEVICE)
    encoder, decoder = (F.normalize(torch.randn(M, D, device=DEVICE)) for _ in "ed")
    bf16 = x.bfloat16()
    columns = encoder.bfloat16().T
    rows = min(N, kernels.chunk_rows(M, DEVICE))
    out = torch.empty(rows, M, dtype=torch.bfloat16, device=DEVICE)
    tera, scores = 2e-12 * N * M * D, N * M * 2e-9

    def product():
        for chunk in bf16.split(rows):
            torch.mm(chunk, columns, out=out[: len(chunk)])

    def chosen(top: Callable):
        for chunk in bf16.split(rows):
            top(torch.mm(chunk, columns, out=out[: len(chunk)]), K)

    part("scores", product, scores, tera)
    part("scores and selection", lambda: chosen(triton_kernels.topk), scores, tera)
    part("… by groups in PyTorch", lambda: chosen(kernels.group_topk), scores, tera)
    part("… by torch.topk", lambda: chosen(lambda s, k: s.topk(k)), scores, tera)
    values, indices = torch.rand(N, K, device=DEVICE), torch.randint(M, (N, K), device=DEVICE)
    half, bias = decoder.bfloat16(), torch.zeros(D, device=DEVICE)
    moved = N * K * D * 2e-9
    part("decode", lambda: triton_kernels.decode(values, indices, half, bias), moved)

    def backward(indices):
        return triton_kernels._backward(values, indices, None, bf16, bf16, decoder)

    part("backward by latent", lambda: backward(indices), 2 * moved)
    busy = indices.clone()
    busy[:, :2] = torch.arange(2, device=DEVICE)
    part("… with two latents that are active everywhere", lambda: backward(busy), 2 * moved)
    dead = torch.randn(N, DEAD, device=DEVICE, dtype=torch.bfloat16)
    keep = triton_kernels.keep_largest
    part("the largest scores of the dead, in place", lambda: keep(dead, AUX), N * DEAD * 4e-9)


def make_step(kernel: str, precision: torch.dtype | None, n_dead: int) -> Callable:
    sae = MLSAE(D, M, K, AUX, kernel=kernel, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = torch.randn(SHAPE.n_layers, SHAPE.tokens, D, device=DEVICE)
    dead = torch.arange(n_dead, device=DEVICE)

    def step():
        with torch.autocast(DEVICE, precision or torch.bfloat16, enabled=precision is not None):
            loss = objective.loss(sae, x, dead=dead)
        loss.total.backward()
        return sae.fired(loss.topk)

    step.sae = sae
    return step


def step():
    """Loss and gradients of a micro-batch."""
    for kernel in ("sparse", "triton"):
        for name, precision in (("fp32", None), ("bf16", torch.bfloat16)):
            for n_dead in (0, DEAD):
                one = make_step(kernel, precision, n_dead)
                with peak() as gigabytes:
                    took = milliseconds(one, 2, 5)
                rate = N / took * 1e3
                what = f"micro-batch, {kernel}, {name}, {n_dead} dead"
                note(what, ms=took, vectors_per_second=rate, peak_gb=gigabytes())
    optimizer = one.sae.make_optimizer()
    part("optimiser", optimizer.step, 2 * M * D * 4e-9 * 7)
    state = {"sae": one.sae.state_dict(), "optimizer": optimizer.state_dict()}
    with tempfile.TemporaryDirectory() as folder:
        write = functools.partial(store.save_checkpoint, Path(folder, "checkpoint"), state)
        note("checkpoint", ms=milliseconds(write, 0, 3))


@contextlib.contextmanager
def peak():
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield lambda: torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0.0


def loop():
    """Whole training runs, and what the host waits for."""
    cases = [("sparse", False)]
    if CUDA:
        cases += [("triton", False), ("triton", True)]
    for n_dead in (0, DEAD):
        for kernel, compile in cases[1:] if n_dead and CUDA else cases:
            steps = 16 if CUDA else 3
            with host_waits() as waits:
                log = train_random(SHAPE, steps, n_dead, kernel, compile)
            model = "compiled model, " if compile else ""
            note_rate(f"loop, {kernel}, {model}{n_dead} dead", log)
            for place, count in waits.most_common(3):
                note(f"  host waits a step at {place}", times=count / steps)


def paper():
    """The paper's default for half a minute."""
    with peak() as gigabytes:
        log = train_random(SHAPE, 240 if CUDA else 3, 0, "triton" if CUDA else "sparse", CUDA)
        rate = note_rate("the paper's default", log)
        note("1 billion tokens at that rate", minutes=1e9 / rate / 60, peak_gb=gigabytes())


#: Parts of the names of kernels → what these do.
KINDS = {
    "_by_latent": "backward by latent",
    "_group_maxima": "selection",
    "_select": "selection",
    "_decode": "decode",
    "nvjet": "products of matrices",
    "gemm": "products of matrices",
    "sdpa": "attention",
    "flash": "attention",
    "triton_": "elementwise, compiled",
    "elementwise": "elementwise and copies",
}


def busy():
    """How much of the time the card computes in the loop at its fastest, and what: a trace.

    What the tracing adds is the host's, so the share is a lower bound.
    """
    if not CUDA:
        return
    from torch.autograd import DeviceType

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as traced:
        train_random(SHAPE, 8, 0, "triton", True)
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in traced.events()
        if event.device_type == DeviceType.CUDA
    ]
    spans.sort()
    first = spans[0][0] + (spans[-1][1] - spans[0][0]) * 3 / 4  # the start and compilation left out
    until, computed, by_kind = first, 0.0, collections.Counter()
    for start, end, name in spans:
        if start >= first:
            computed += max(end - max(start, until), 0)
            until = max(until, end)
            by_kind[next((kind for part, kind in KINDS.items() if part in name), "the rest")] += (
                end - start
            )
    whole, together = until - first, sum(by_kind.values())
    note("the card computes", of_time=computed / whole, ms=whole / 1e3)
    for kind, took in by_kind.most_common():
        note(f"… {kind}", of_time=took / together)


def checkpoints():
    """What it costs the loop to write one checkpoint after the other, all the time."""
    for seconds in (1e9, 0.0):
        with tempfile.TemporaryDirectory() as folder:
            before, training.CHECKPOINT_EVERY = training.CHECKPOINT_EVERY, 0
            try:
                path = {"checkpoint": Path(folder, "one"), "checkpoint_seconds": seconds}
                log = train_random(
                    SHAPE, 64 if CUDA else 3, 0, "triton" if CUDA else "sparse", CUDA, path
                )
            finally:
                training.CHECKPOINT_EVERY = before
        note_rate("none is written" if seconds else "one after the other is written", log)


def train_random(
    shape: Shape, steps: int, n_dead: int, kernel: str, compile: bool, options: dict | None = None
):
    """The log of a run on random text; that many latents start dead, and hardly listen at first."""
    run = run_spec(shape, steps, MICRO_BATCHES)
    lm, blocks = inputs(shape, run)
    build = training.build_sae

    def planted(*args):
        sae = build(*args)
        with torch.no_grad():
            sae.encoder[:n_dead] /= 100
        sae.tokens_since_active[:n_dead] = sae.dead_tokens
        return sae

    training.build_sae = planted
    try:
        model = lm.compiled("inductor" if CUDA else "aot_eager") if compile else lm
        source = TextSource(model, blocks, run.site)
        return training.train(run, source, kernel=kernel, **(options or {})).log
    finally:
        training.build_sae = build


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
            precision="bf16" if CUDA else "fp32",
        ),
    )


def inputs(shape: Shape, run: RunSpec) -> tuple[LanguageModel, TokenBlocks]:
    """A language model of random weights, in bfloat16 on a GPU, and random text."""
    lm = random_lm(shape, DEVICE, torch.bfloat16 if CUDA else torch.float32)
    generator = torch.Generator().manual_seed(1)
    size = max(run.train.batch_tokens // shape.positions, 64), shape.positions
    tokens = torch.randint(1, shape.vocabulary, size, generator=generator)
    tokens[tokens % 512 == 1] = 0  # ends of documents, whose vectors are left out
    return lm, TokenBlocks(tokens.int().numpy())


def note_rate(what: str, log) -> float:
    """Tokens a second of the second half of a run."""
    seconds, half = log.tokens / log.tokens_per_second, len(log) // 2
    rate = (log.tokens.iloc[-1] - log.tokens.iloc[half]) / (seconds.iloc[-1] - seconds.iloc[half])
    last = log.iloc[-1]
    note(what, tokens_per_second=float(rate), dead=float(last.dead_fraction), loss=float(last.loss))
    return float(rate)


@contextlib.contextmanager
def host_waits():
    """Count where PyTorch makes the host wait for the device."""
    waits: collections.Counter = collections.Counter()
    if not CUDA:
        yield waits
        return

    def show(message, category, filename, line, *_):
        if "synchroni" in str(message):
            frames = [f for f in traceback.extract_stack() if "mlsae_core" in f.filename]
            if frames:  # else the language model is moved to the device, once
                waits[f"{Path(frames[-1].filename).name}:{frames[-1].lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before, warnings.showwarning = warnings.showwarning, show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before


def peer():
    """A whole step, optimiser included, beside sparsify's, both under bf16 autocast."""
    shape = bench_train.Shape(SHAPE.n_layers, SHAPE.tokens, D, M, K)
    for n_dead in (0, DEAD):
        x = torch.randn(SHAPE.n_layers, SHAPE.tokens, D, device=DEVICE)
        work = bench_train.Work(shape, n_dead, x)
        makers = {
            "mlsae_core": lambda work: bench_train.ours(work, "triton" if CUDA else "sparse"),
            "sparsify": bench_train.sparsify,
        }
        for name, make in makers.items():
            with peak() as gigabytes:
                one = make(work)

                def step(one=one):
                    with torch.autocast(DEVICE, torch.bfloat16):
                        one()

                took = milliseconds(step, 2, 5)
                what = f"step, {name}, {n_dead} dead"
                note(what, ms=took, vectors_per_second=N / took * 1e3, peak_gb=gigabytes())


def real():
    """The book's default run, on its own text, tokenised before by any command that reads it."""
    run = run_from_dict({"model": "neox-6l-128d", "expansion_factor": 16, "k": 16, "tokens": 2048})
    lm = LanguageModel.load(run.model, DEVICE)
    from mlsae_core import text

    blocks = text.blocks(run.data, lm.tokenizer, "train")
    for precision, dtype in (("bf16", "bfloat16"), ("tf32", "float32"), ("fp32", "float32")):
        fields = {"expansion_factor": 16, "k": 16, "tokens": 4_000_000, "precision": precision}
        if not CUDA:
            fields |= {"tokens": 20_000, "precision": "fp32"}
        run = run_from_dict({"model": {"path": "neox-6l-128d", "dtype": dtype}, **fields})
        lm = LanguageModel.load(run.model, DEVICE)
        kernel, began = "triton" if CUDA else "sparse", time.perf_counter()
        log = training.train(run, TextSource(lm, blocks, run.site), kernel=kernel).log
        took = time.perf_counter() - began
        note(f"the book's default run, {precision}", fvu=float(log.fvu.iloc[-1]), seconds=took)


def measures():
    """Stages of the book's default run, on its shipped dictionary, beside the CPU's results."""
    from mlsae_book import stages  # noqa: F401 (registered)

    experiment = load_experiment(store.ROOT / "book/experiments/default.yml")
    settings = experiment.evaluate if CUDA else replace(experiment.evaluate, tokens=2048)
    ((_, run),) = experiment.runs
    for stage in ("evaluate", "distributions"):
        cpu = pipeline.Session("read-only").make(stage, run, experiment.evaluate)
        began = time.perf_counter()
        made = pipeline.Session("force").make(stage, run, settings)
        took = {"seconds": time.perf_counter() - began, "cpu_seconds": cpu.meta["seconds"]}
        note(f"{stage} of the default run", **took)
        for name in cpu.meta["files"]:
            for what, ours, cpus in _numbers(made.path / name, cpu.path / name):
                if cpus.any():
                    apart = float(np.abs(ours - cpus).sum() / np.abs(cpus).sum())
                    note(f"  {stage}: {what}", relative_difference=apart)


def _numbers(ours: Path, cpus: Path):
    """What two files of a result have in common that nothing random is in: name, and both."""
    if ours.suffix == ".csv":
        tables = [pd.read_csv(path).select_dtypes("number") for path in (ours, cpus)]
        for name in tables[0]:
            yield name, *(table[name].to_numpy(float) for table in tables)
    elif ours.suffix == ".safetensors":
        found = [load_file(path) for path in (ours, cpus)]
        for name in ("totals", "counts", "active_tokens"):
            yield name, *(tensors[name].double().numpy() for tensors in found)
    else:
        found = [json.loads(path.read_text()) for path in (ours, cpus)]
        for name in ("ratio_latent", "ratio_token"):
            yield name, *(np.array([values[name]["value"]]) for values in found)


def large():
    """Two steps at the shapes of larger models: do they fit?"""
    for name in ("Pythia-1b", "Gemma 2 2B") if CUDA else ():
        with peak() as gigabytes:
            log = train_random(SHAPES[name], 2, DEAD, "triton", False)
            rate = float(log.tokens_per_second.iloc[-1])
            note(f"{name}, R = 64, the start included", tokens_per_second=rate, peak_gb=gigabytes())


_PHASES = (env, right, parts, step, loop, busy, checkpoints, paper, peer, real, measures, large)
PHASES = {phase.__name__: phase for phase in _PHASES}


def main():
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--json", type=Path, help="default: benchmarks/gpu.json, of a whole run")
    options = parser.parse_args()
    if unknown := set(options.phases) - set(PHASES):
        parser.error(f"expected phases of {', '.join(PHASES)}, got {', '.join(unknown)}")
    if options.json is None and CUDA and not options.phases:
        options.json = Path(__file__).with_suffix(".json")
    for name in options.phases or PHASES:
        note.phase, began = name, time.perf_counter()
        try:
            PHASES[name]()
        except Exception as error:
            traceback.print_exc(limit=6)
            note("failed", error=f"{type(error).__name__}: {str(error)[:200]}")
        print(f"--- {name}: {time.perf_counter() - began:.0f} s", flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
