"""How fast is a training step? One command, every implementation side by side.

    python benchmarks/bench_train.py --shape mini pythia --dead 0 0.25 --json train.json

A step is forward, backward, optimiser and dead-latent bookkeeping of one batch of random
activations; the language model is not part of it. Implementations take turns, round by round, so
that what else the machine does meets all of them alike, and medians are compared. In the same
rounds one product of all vectors with the encoder is timed, without selection, decoder, gradients
or optimiser: the limit that no exact method is faster than. Peak memory is that of a process that
runs a single implementation. Other packages take part where they are installed.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from mlsae_core import kernels, objective
from mlsae_core.sae import MLSAE


class Shape(NamedTuple):
    """Layers and tokens of a batch, dimension, latents, and latents kept for each vector."""

    layers: int
    tokens: int
    d_model: int
    n_latents: int
    k: int


SHAPES = {
    "tiny": Shape(2, 64, 32, 256, 4),  # for a look at the output
    "mini": Shape(6, 2048, 128, 4096, 16),
    "pythia": Shape(6, 512, 512, 32768, 32),
}

Step = Callable[[], None]


def ours(kernel: kernels.Kernel):
    def make(shape: Shape, dead: float, x: torch.Tensor) -> Step:
        generator = torch.Generator().manual_seed(0)
        sizes = shape.d_model, shape.n_latents, shape.k
        sae = MLSAE(*sizes, kernel=kernel, generator=generator)
        optimiser = sae.make_optimizer()

        def step():
            sae.tokens_since_active[: int(dead * shape.n_latents)] = sae.dead_tokens
            loss = objective.loss(sae, x)
            loss.total.backward()
            optimiser.step()
            optimiser.zero_grad()
            sae.count_tokens(sae.fired(loss.topk), shape.tokens)

        return step

    return make


def limit(shape: Shape, dead: float, x: torch.Tensor) -> Step:
    weights, vectors = torch.randn(shape.n_latents, shape.d_model), x.flatten(0, 1)
    rows = kernels.chunk_rows(shape.n_latents, "cpu")
    out = torch.empty(min(rows, len(vectors)), shape.n_latents)

    def step():
        for chunk in vectors.split(rows):
            kernels._matmul(chunk, weights.T, out[: len(chunk)])

    return step


def sparsify(shape: Shape, dead: float, x: torch.Tensor) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=shape.n_latents, k=shape.k)
    coder = SparseCoder(shape.d_model, config)
    optimiser = torch.optim.Adam(coder.parameters(), lr=1e-4)
    mask = torch.arange(shape.n_latents) < dead * shape.n_latents
    vectors = x.flatten(0, 1)

    def step():
        out = coder(vectors, dead_mask=mask)
        (out.fvu + out.auxk_loss / 32).backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
        mask.index_fill_(0, out.latent_indices.flatten(), False)
        mask[: int(dead * shape.n_latents)] = True

    return step


def dictionary_learning(shape: Shape, dead: float, x: torch.Tensor) -> Step:
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(10**6, shape.d_model, shape.n_latents, shape.k, 0, "", device="cpu")
    vectors = x.flatten(0, 1)

    def step():
        trainer.num_tokens_since_fired[: int(dead * shape.n_latents)] = 10**8
        trainer.update(1, vectors)

    return step


def saelens(sparse: bool):
    """Its TopK step without counting what fired, which is in its favour."""

    def make(shape: Shape, dead: float, x: torch.Tensor) -> Step:
        from sae_lens.saes.sae import TrainStepInput
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        options = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": False}
        config = TopKTrainingSAEConfig(
            k=shape.k, d_in=shape.d_model, d_sae=shape.n_latents, device="cpu", **options
        )
        sae = TopKTrainingSAE(config)
        optimiser = torch.optim.Adam(sae.parameters(), lr=1e-4)
        mask = torch.arange(shape.n_latents) < dead * shape.n_latents
        given = TrainStepInput(x.flatten(0, 1), {}, mask, 0, False)

        def step():
            sae.training_forward_pass(given).loss.backward()
            optimiser.step()
            optimiser.zero_grad()

        return step

    return make


def as_described(shape: Shape, dead: float, x: torch.Tensor) -> Step:
    """The paper's method as its text describes it: dense, every quantity computed for itself.

    Our own writing, not the released code: top-k of stored scores, scatter, dense decoder, one
    more dense decoder for AuxK, autograd, projection, Adam and rescaling over whole matrices.
    """
    n, d, k, aux_k = shape.n_latents, shape.d_model, shape.k, shape.d_model // 2
    encoder = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(n, d), dim=1))
    decoder = torch.nn.Parameter(encoder.detach().T.clone())  # (d, n)
    bias = torch.nn.Parameter(torch.zeros(d))
    optimiser = torch.optim.Adam([encoder, decoder, bias], lr=1e-4, eps=6.25e-10)
    since, limit = torch.zeros(n, dtype=torch.int64), 10**7

    def decode(values, indices):
        latents = torch.zeros(*values.shape[:-1], n).scatter(-1, indices, values.relu())
        return latents @ decoder.T, latents

    def step():
        since[: int(dead * n)] = limit
        mask = since >= limit
        mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
        scaled = (x - mean) / (std + 1e-5)
        scores = (scaled - bias) @ encoder.T
        y, latents = decode(*scores.topk(k, dim=-1))
        error = x - ((y + bias) * std + mean)
        loss = (error.square().mean((1, 2)) / x.var((1, 2))).mean()
        if mask.any():
            among_dead = scores.masked_fill(~mask, -torch.inf)
            again, _ = decode(*among_dead.topk(min(aux_k, int(mask.sum())), dim=-1))
            left = (scaled - y - bias).detach()
            loss = loss + ((left - again).square().mean((1, 2)) / left.var((1, 2))).mean() / 32
        loss.backward()
        with torch.no_grad():
            decoder.grad -= (decoder.grad * decoder).sum(0) * decoder
            optimiser.step()
            optimiser.zero_grad()
            decoder.div_(decoder.norm(dim=0))
            fired = (latents > 1e-3).flatten(0, 1).any(0)
            since.add_(shape.tokens).masked_fill_(fired, 0)

    return step


IMPLEMENTATIONS = {
    "sparse": ours("sparse"),
    "dense": ours("dense"),
    "dense as in the paper's description": as_described,
    "sparsify": sparsify,
    "saelens sparse": saelens(sparse=True),
    "saelens dense": saelens(sparse=False),
    "dictionary_learning": dictionary_learning,
    "limit": limit,
}


def make(name: str, shape: str, dead: float) -> Step | None:
    """The step of an implementation, or None where its package is not installed."""
    sizes = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sizes.layers, sizes.tokens, sizes.d_model, generator=generator)
    try:
        return IMPLEMENTATIONS[name](sizes, dead, x)
    except ImportError:
        return None


def measure(names: list[str], shape: str, dead: float, rounds: int) -> dict[str, float]:
    """Median seconds of a step for each implementation that is installed."""
    steps = {name: step for name in names if (step := make(name, shape, dead))}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if turn > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_memory(name: str, shape: str, dead: float) -> float:
    """Peak memory in MB (10⁶ bytes) of a process that takes three steps."""
    command = [sys.executable, __file__, "--memory-of", name, "--shape", shape]
    output = subprocess.run([*command, "--dead", str(dead)], check=True, stdout=subprocess.PIPE)
    return float(output.stdout.split()[-1])


def own_peak() -> float:
    """Peak memory of this process in MB; Linux's `getrusage` would include its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts bytes


def machine(threads: int) -> dict[str, str | int]:
    names = [
        line.split(":", 1)[1].strip()
        for path in [Path("/proc/cpuinfo")]
        if path.exists()
        for line in path.read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["mini"])
    parser.add_argument("--dead", nargs="+", type=float, default=[0.0, 0.25], metavar="SHARE")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=[*IMPLEMENTATIONS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    parser.add_argument("--memory-of", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.memory_of:
        step = make(options.memory_of, options.shape[0], options.dead[0])
        for _ in range(3):
            step()
        print(own_peak())
        return
    names = [*dict.fromkeys([*options.only, "limit"])]
    rows = []
    print(json.dumps(machine(options.threads)))
    header = f"{'shape':8}{'dead':>6}  {'implementation':36}{'vectors/s':>10}{'of limit':>10}"
    print(f"{header}{'peak MB':>9}")
    for shape in options.shape:
        vectors = SHAPES[shape].layers * SHAPES[shape].tokens
        for dead in options.dead:
            seconds = measure(names, shape, dead, options.rounds)
            for name, median in seconds.items():
                share, peak = seconds["limit"] / median, peak_memory(name, shape, dead)
                row = {"shape": shape, "dead": dead, "implementation": name}
                row |= {"vectors_per_second": vectors / median, "share_of_limit": share}
                rows.append(row | {"seconds": median, "peak_megabytes": peak})
                line = f"{shape:8}{dead:>6.0%}  {name:36}{vectors / median:>10.0f}{share:>10.2f}"
                print(f"{line}{peak:>9.0f}", flush=True)
    if options.json:
        content = {"machine": machine(options.threads), "results": rows}
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
