"""A first look at a machine with a GPU: is it right, and where does the time of a step go?

    python -m benchmarks.gpu_check [PHASE ...] [--out FOLDER]

Phases run in order; each prints as it goes, none stops the next, and all of it ends up in
FOLDER/gpu_check.json. Parts stand beside their roofline: the larger of bytes over the measured
speed of a copy and operations over the measured speed of a product in that precision. Without a GPU
the same runs at tiny shapes, which proves nothing but that it runs.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import bench_gpu, bench_train
from mlsae_core import kernels, objective, store
from mlsae_core import train as train_module
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.sae import MLSAE
from mlsae_core.spec import run_from_dict
from mlsae_core.text import TokenBlocks

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"
# The paper's default on Pythia-70m: vectors of a micro-batch, d_model, latents, k, aux_k; dead.
N, D, M, K, AUX, DEAD = (49152, 512, 32768, 32, 256, 4096) if CUDA else (96, 32, 512, 8, 16, 64)

found: dict[str, object] = {}
speed = {"copy": 3e12, "bf16": 7e14, "tf32": 4e14, "fp32": 5e13}  # measured by `env`


def sync():
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
        sync()
        began = time.perf_counter()
        function()
        sync()
        times.append(1e3 * (time.perf_counter() - began))
    return sorted(times)[len(times) // 2]


def note(name: str, value):
    found[name] = value
    print(f"{name:<58}{value}", flush=True)


def part(name: str, function: Callable, gigabytes: float = 0, tera: float = 0, kind: str = "bf16"):
    """Time something beside its roofline: GB moved and TFLOP of products."""
    took = milliseconds(function)
    limit = 1e3 * max(gigabytes * 1e9 / speed["copy"], tera * 1e12 / speed[kind])
    note(name, f"{took:.3f} ms, roofline {limit:.3f} ms, {limit / took:.0%}")
    return took


# --- phases -----------------------------------------------------------------------------------


def env():
    note("torch", f"{torch.__version__} on {torch.cuda.get_device_name() if CUDA else 'cpu'}")
    if not CUDA:
        return
    a = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    b = torch.empty_like(a)
    speed["copy"] = 2 * a.numel() / milliseconds(lambda: b.copy_(a)) * 1e3
    note("copy", f"{speed['copy'] / 1e12:.2f} TB/s")
    for kind, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("tf32", torch.float32)):
        torch.backends.cuda.matmul.allow_tf32 = kind == "tf32"
        x, y = (torch.randn(8192, 8192, device=DEVICE, dtype=dtype) for _ in "xy")
        speed[kind] = 2 * 8192**3 / milliseconds(lambda x=x, y=y: x @ y, 2, 5) * 1e3
        note(f"8192³ product, {kind}", f"{speed[kind] / 1e12:.0f} TFLOP/s")
    torch.backends.cuda.matmul.allow_tf32 = False


def right():
    """The largest relative error of results and gradients against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    for n, d, m, k, aux, dead in (
        (500, 64, 1024, 8, 16, 64),
        (777, 130, 3001, 16, 65, 500),
        (300, 512, 32768, 32, 256, 4000),
    )[: 3 if CUDA else 1]:
        x, b = torch.randn(n, d, generator=generator), torch.randn(d, generator=generator)
        weights = [F.normalize(torch.randn(m, d, generator=generator)) for _ in "ed"]
        which = torch.randperm(m, generator=generator)[:dead].sort().values
        results = {}
        for kernel in ("dense", "sparse", "triton"):
            device, dtype = ("cpu", torch.float64) if kernel == "dense" else (DEVICE, torch.float32)
            tensors = [t.to(device, dtype, copy=True).requires_grad_() for t in (x, *weights, b)]
            y, y_dead, _ = kernels.autoencode(*tensors, k, which.to(device), aux, kernel)
            (y.sin().sum() + y_dead.square().sum()).backward()
            results[kernel] = [t.detach().cpu().double() for t in (y, y_dead)]
            results[kernel] += [t.grad.cpu().double() for t in tensors]
        for kernel in ("sparse", "triton"):
            pairs = zip(results[kernel], results["dense"], strict=True)
            worst = max(float((a - e).norm() / e.norm()) for a, e in pairs)
            verdict = "ok" if worst < 1e-4 else "WRONG"
            note(f"{kernel}, largest relative error, {(n, d, m, k)}", f"{worst:.1e} {verdict}")


def parts():
    from mlsae_core import triton_kernels as tk

    x = torch.randn(N, D, device=DEVICE)
    encoder, decoder = (F.normalize(torch.randn(M, D, device=DEVICE)) for _ in "ed")
    bf16 = x.bfloat16()
    columns = encoder.bfloat16().T
    tera, table = 2e-12 * N * M * D, N * M * 2e-9
    for rows in (1024, 2048, 4096, 8192, 16384) if CUDA else (32,):
        out = torch.empty(rows, M, dtype=torch.bfloat16, device=DEVICE)

        def product(out=out, rows=rows):
            for chunk in bf16.split(rows):
                torch.mm(chunk, columns, out=out[: len(chunk)])

        def chosen(out=out, rows=rows):
            for chunk in bf16.split(rows):
                tk.topk(torch.mm(chunk, columns, out=out[: len(chunk)]), K)

        part(f"scores bf16, {rows} rows at a time", product, table, tera)
        part(f"scores bf16 and selection, {rows} rows at a time", chosen, table, tera)
    rows = min(N, 4096)
    scores = torch.mm(bf16[:rows], columns)
    times, share = N / rows, rows / N
    note("torch.topk, ms a micro-batch", times * milliseconds(lambda: scores.topk(K), 1, 3))
    note("group_topk", times * milliseconds(lambda: kernels.group_topk(scores, K), 1, 3))
    part("selection, of 4096 rows", lambda: tk.topk(scores, K), share * table)
    dead = torch.randn(N, DEAD, device=DEVICE, dtype=torch.bfloat16)
    part("the largest dead scores, in place", lambda: tk.keep_largest(dead, AUX), N * DEAD * 4e-9)
    values, indices = torch.rand(N, K, device=DEVICE), torch.randint(M, (N, K), device=DEVICE)
    half, bias = decoder.bfloat16(), torch.zeros(D, device=DEVICE)
    pairs = N * K
    moved = pairs * D * 2e-9
    part("decode", lambda: tk.decode(values, indices, half, bias), moved)
    part("decode from float32", lambda: tk.decode(values, indices, decoder, bias), 2 * moved)
    part("sort by latent", lambda: indices.view(-1).short().sort(stable=True), pairs * 40e-9)
    part(
        "backward, sort included",
        lambda: tk._backward(values, indices, None, bf16, bf16, decoder),
        2 * moved,
    )
    skewed = indices.clone()
    skewed[:, :4] = torch.arange(4, device=DEVICE)  # latents that are active everywhere
    part(
        "backward, 4 latents active everywhere",
        lambda: tk._backward(values, skewed, None, bf16, bf16, decoder),
        2 * moved,
    )


def make_step(kernel: str, precision: torch.dtype | None, n_dead: int) -> Callable:
    sae = MLSAE(D, M, K, AUX, kernel=kernel, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    x = torch.randn(6, N // 6, D, device=DEVICE)
    dead = torch.arange(n_dead, device=DEVICE)

    def step():
        with torch.autocast(DEVICE, precision or torch.bfloat16, enabled=precision is not None):
            loss = objective.loss(sae, x, dead=dead)
        loss.total.backward()
        return sae.fired(loss.topk)

    step.sae = sae
    return step


def step():
    cases = [
        ("sparse", None),
        ("sparse", torch.bfloat16),
        ("triton", None),
        ("triton", torch.bfloat16),
    ]
    for kernel, precision in cases:
        for n_dead in (0, DEAD):
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            one = make_step(kernel, precision, n_dead)
            took = milliseconds(one, 2, 5)
            peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0
            note(
                f"micro-batch, {kernel} {precision or 'fp32'}, {n_dead} dead",
                f"{took:.2f} ms, {N / took * 1e3:,.0f} vectors/s, peak {peak:.1f} GB",
            )
    optimizer = one.sae.make_optimizer()
    part("optimiser", optimizer.step, 2 * M * D * 4e-9 * 7)
    if CUDA:
        profile(one)


def profile(one: Callable):
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        one()
        sync()
    table = seen.key_averages().table(
        sort_by="cuda_time_total", row_limit=45, max_name_column_width=70
    )
    (OUT / "profile.txt").write_text(table)


def loop():
    """Tokens a second of whole training runs on random text, and what the host waits for."""
    steps = 16 if CUDA else 3
    cases = (
        [("sparse", False), ("triton", False), ("triton", True)] if CUDA else [("sparse", False)]
    )
    for n_dead in (0, DEAD):
        for kernel, compile in cases[1:] if n_dead else cases:
            with host_waits() as waits:
                log = train_random(steps, n_dead, kernel, compile)
            name = f"{kernel}{', compiled model' if compile else ''}, {n_dead} dead"
            note_rate(f"loop, {name}", log)
            note(f"  host waits a step and log row, {name}", sum(waits.values()) / steps)
            for place, count in waits.most_common(4):
                note(f"    {place}, {name}", count)


def paper():
    """The paper's default on random text, for a minute."""
    log = train_random(240 if CUDA else 3, 0, "triton" if CUDA else "sparse", CUDA)
    rate = note_rate("the paper's default", log)
    note("  1 B tokens at that rate, minutes", f"{1e9 / rate / 60:.1f}")
    if CUDA:
        note("  peak memory", f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


def train_random(steps: int, n_dead: int, kernel: str, compile: bool):
    """Train on random text; that many latents start dead, and hardly listen at first."""
    shape = bench_gpu.SHAPES["Pythia-70m" if CUDA else "tiny"]
    run = bench_gpu.run_spec(shape, steps, 16 if CUDA else 2)
    lm, blocks = bench_gpu.inputs(shape, run)
    build = train_module.build_sae

    def planted(*args):
        sae = build(*args)
        with torch.no_grad():
            sae.encoder[:n_dead] /= 100
        sae.tokens_since_active[:n_dead] = sae.dead_tokens
        return sae

    train_module.build_sae = planted
    try:
        model = lm.compiled() if compile else lm
        log = train_module.train(run, model, blocks, Lens.identity(), kernel=kernel).log
    finally:
        train_module.build_sae = build
    return log


def note_rate(name: str, log) -> float:
    """Tokens a second of the second half of a run."""
    seconds, half = log.tokens / log.tokens_per_second, len(log) // 2
    rate = (log.tokens.iloc[-1] - log.tokens.iloc[half]) / (seconds.iloc[-1] - seconds.iloc[half])
    note(
        name,
        f"{rate:,.0f} tokens/s, {log.dead_fraction.iloc[half]:.1%} to "
        f"{log.dead_fraction.iloc[-1]:.1%} dead, loss {log.loss.iloc[-1]:.4f}, AuxK "
        f"{log.auxk.iloc[-1]:.3f}",
    )
    return rate


def peer():
    """A whole step, optimiser included, beside sparsify's, both under bf16 autocast."""
    layers = 6
    shape = bench_train.Shape(layers, N // layers, D, M, K)
    for n_dead in (0, DEAD):
        work = bench_train.Work(shape, n_dead, torch.randn(layers, N // layers, D, device=DEVICE))
        makers = {"ours": lambda work: bench_train.ours(work, "triton" if CUDA else "sparse")}
        for name, make in (makers | {"sparsify": bench_train.sparsify}).items():
            if CUDA:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            one = make(work)

            def step(one=one):
                with torch.autocast(DEVICE, torch.bfloat16):
                    one()

            took = milliseconds(step, 2, 5)
            peak = torch.cuda.max_memory_allocated() / 1e9 if CUDA else 0
            note(
                f"step, {name}, {n_dead} dead",
                f"{took:.2f} ms, {N / took * 1e3:,.0f} vectors/s, peak {peak:.1f} GB",
            )


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
            last = frames[-1] if frames else None
            place = f"{Path(last.filename).name}:{last.lineno}" if last else f"{filename}:{line}"
            waits[place] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        before, warnings.showwarning = warnings.showwarning, show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = before


def real():
    """The book's default run, on the text that was tokenised before: the CPU ends at FVU 0.127."""
    from safetensors.numpy import load_file

    if CUDA:
        [tokens] = store.DATA.glob("store/tokens/*/tokens.safetensors")
        blocks = TokenBlocks(load_file(tokens)["train"])
    for precision, dtype in (("bf16", "bfloat16"), ("tf32", "float32"), ("fp32", "float32")):
        if not CUDA:
            continue
        fields = {"expansion_factor": 16, "k": 16, "tokens": 4_000_000, "precision": precision}
        run = run_from_dict({"model": {"path": "neox-6l-128d", "dtype": dtype}, **fields})
        lm = LanguageModel.load(run.model, DEVICE)
        began = time.perf_counter()
        log = train_module.train(run, lm, blocks, kernel="triton").log
        took = time.perf_counter() - began
        log.to_csv(OUT / f"log-{precision}.csv", index=False)
        mean = log.tail(20).fvu.mean()
        note(
            f"default run, {precision}",
            f"FVU {log.fvu.iloc[-1]:.6f}, mean of 20 rows {mean:.6f}, {took:.1f} s in all",
        )


_PHASES = (env, right, parts, step, loop, real, peer, paper)
PHASES = {phase.__name__: phase for phase in _PHASES}
OUT = Path(".")


def main():
    global OUT
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("phases", nargs="*", metavar="PHASE", help=", ".join(PHASES))
    parser.add_argument("--out", type=Path, default=Path("."))
    options = parser.parse_args()
    OUT = options.out
    for name in options.phases or PHASES:
        began = time.perf_counter()
        try:
            PHASES[name]()
        except Exception:
            traceback.print_exc(limit=6)
        print(f"--- {name}: {time.perf_counter() - began:.0f} s", flush=True)
        (OUT / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
