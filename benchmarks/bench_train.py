"""How fast is a training step, beside the dense oracle, the paper's description and other packages?

A step is forward, backward, optimiser and dead-latent bookkeeping of one batch of random
activations; the language model is no part of it. Every implementation has the same vectors,
latents, k, Adam, and, where latents are dead, AuxK with half of d_model of them. In the same rounds
one product of all vectors with the encoder is timed, in float32 and without selection, decoder,
gradients or optimiser: the limit of methods that score in float32 alone.

Of larger shapes the peak memory alone is measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from benchmarks import reference
from benchmarks.common import LIMIT, OURS, Case, Implementation, Step
from mlsae_core import kernels, objective
from mlsae_core.sae import MLSAE

LEARNING_RATE = 1e-4
TOLERANCE = 1e-4  # relative, of the losses of the first two steps


class Shape(NamedTuple):
    """Layers and tokens of a batch, dimension, latents, and latents kept for each vector."""

    layers: int
    tokens: int
    d_model: int
    n_latents: int
    k: int

    @property
    def vectors(self) -> int:
        return self.layers * self.tokens


SHAPES = {
    "tiny": Shape(2, 64, 32, 256, 4),
    "mini": Shape(6, 2048, 128, 4096, 16),
    "pythia": Shape(6, 512, 512, 32768, 32),
    "Pythia-1b": Shape(16, 64, 2048, 131072, 32),
    "Gemma 2 2B": Shape(26, 40, 2304, 147456, 32),
}


class Work(NamedTuple):
    """The shape, how many latents are kept dead, activations (layer, token, d_model)."""

    shape: Shape
    n_dead: int
    x: torch.Tensor

    def sae(self, kernel: kernels.Kernel = "sparse") -> MLSAE:
        generator = torch.Generator().manual_seed(0)
        sizes = self.shape.d_model, self.shape.n_latents, self.shape.k
        return MLSAE(*sizes, kernel=kernel, generator=generator)

    def dead_mask(self) -> torch.Tensor:
        return torch.arange(self.shape.n_latents) < self.n_dead


def cases(quick: bool) -> list[Case]:
    shapes = ["tiny"] if quick else ["mini", "pythia"]
    large = ["tiny"] if quick else ["Pythia-1b", "Gemma 2 2B"]
    steps = [case(name, share) for name in shapes for share in (0.0, 0.25)]
    return steps + [memory_case(name) for name in large]


def case(name: str, dead: float) -> Case:
    shape = SHAPES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.layers, shape.tokens, shape.d_model, generator=generator)
    work = Work(shape, int(dead * shape.n_latents), x)
    aux_k = 2 ** round(math.log2(shape.d_model / 2))  # that of `MLSAE`
    return Case(
        "training step",
        f"{name}, {dead:.0%} dead" if dead else f"{name}, no dead",
        shape.vectors,
        "activation vectors",
        {name: _implementation(make, work) for name, make in MAKERS.items()},
        check=_check,
        agreement=f"losses of the first two steps, where the loss is the paper's: {TOLERANCE:g}",
        settings={
            "vectors": shape.vectors,
            "d": shape.d_model,
            "latents": shape.n_latents,
            "k": shape.k,
            "AuxK": f"{aux_k} of {work.n_dead} dead" if work.n_dead else "off",
        },
        per_token=shape.layers,
    )


def memory_case(name: str) -> Case:
    """Two steps at a larger shape, of few vectors, with AuxK on."""
    timed = case(name, 0.25)
    ours_alone = {OURS: timed.implementations[OURS]}
    changes = {"implementations": ours_alone, "rounds": 0, "check": None, "agreement": ""}
    return replace(timed, suite="memory", name=name, **changes)


def _implementation(make: Callable[[Work], Step], work: Work) -> Implementation:
    return Implementation(partial(make, work), PACKAGE_OF.get(make))


def _check(results: dict[str, list[float]]) -> None:
    expected = results["dense oracle"]
    for name in (OURS, "mlsae_core, bf16 candidates", "as described"):
        torch.testing.assert_close(results[name], expected, rtol=TOLERANCE, atol=0)


# --- ours, and what it is compared with -----------------------------------------------------------


def ours(work: Work, kernel: kernels.Kernel = "sparse") -> Step:
    sae = work.sae(kernel).to(work.x.device)
    optimiser = sae.make_optimizer(LEARNING_RATE)

    def step():
        sae.tokens_since_active[: work.n_dead] = sae.dead_tokens
        loss = objective.loss(sae, work.x)
        loss.total.backward()
        optimiser.step()
        optimiser.zero_grad()
        sae.count_tokens(sae.fired(loss.topk), work.shape.tokens)
        return loss.total.item()

    return step


def candidates(work: Work) -> Step:
    return ours(work, "candidates")


def dense(work: Work) -> Step:
    return ours(work, "dense")


def as_described(work: Work) -> Step:
    training = reference.Training(work.sae(), LEARNING_RATE)

    def step():
        training.since[: work.n_dead] = training.dead_tokens
        return training.step(work.x)

    return step


def limit(work: Work) -> Step:
    weights, vectors = work.sae().encoder.detach(), work.x.flatten(0, 1)
    rows = kernels.chunk_rows(len(weights), "cpu")
    out = torch.empty(min(rows, len(vectors)), len(weights))

    def step():
        for chunk in vectors.split(rows):
            kernels._matmul(chunk, weights.T, out[: len(chunk)])

    return step


# --- other packages -------------------------------------------------------------------------------


def sparsify(work: Work) -> Step:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=work.shape.n_latents, k=work.shape.k)
    coder = SparseCoder(work.shape.d_model, config, device=work.x.device)
    optimiser = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
    vectors = work.x.flatten(0, 1)
    since = torch.zeros(work.shape.n_latents, dtype=torch.int64, device=vectors.device)

    def step():
        since[: work.n_dead] = 10**7
        out = coder(vectors, dead_mask=since >= 10**7)
        loss = out.fvu + out.auxk_loss / 32
        loss.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()
        coder.set_decoder_norm_to_unit_norm()
        since.add_(work.shape.tokens).index_fill_(0, out.latent_indices.flatten(), 0)
        return loss.item()

    return step


def dictionary_learning(work: Work) -> Step:
    from dictionary_learning.trainers.top_k import TopKTrainer

    sizes = work.shape.d_model, work.shape.n_latents, work.shape.k
    trainer = TopKTrainer(10**6, *sizes, 0, "", lr=LEARNING_RATE, device="cpu")
    vectors = work.x.flatten(0, 1)

    def step():  # what fires in this batch it takes for living at once; the rest stays dead
        trainer.num_tokens_since_fired[: work.n_dead] = trainer.dead_feature_threshold
        return trainer.update(1, vectors)

    return step


def saelens(work: Work, sparse: bool) -> Step:
    """Without counting what fired, projection and rescaling, all of which is in its favour."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    # With sparse activations the rescaling by decoder norms makes its backward pass fail.
    options = {"use_sparse_activations": sparse, "rescale_acts_by_decoder_norm": False}
    sizes = {"k": work.shape.k, "d_in": work.shape.d_model, "d_sae": work.shape.n_latents}
    sae = TopKTrainingSAE(TopKTrainingSAEConfig(**sizes, device="cpu", **options))
    optimiser = torch.optim.Adam(sae.parameters(), lr=LEARNING_RATE)
    given = TrainStepInput(work.x.flatten(0, 1), {}, work.dead_mask(), 0, False)

    def step():
        loss = sae.training_forward_pass(given).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        return loss.item()

    return step


def saelens_sparse(work: Work) -> Step:
    return saelens(work, sparse=True)


def saelens_dense(work: Work) -> Step:
    return saelens(work, sparse=False)


MAKERS = {
    OURS: ours,
    "mlsae_core, bf16 candidates": candidates,
    "dense oracle": dense,
    "as described": as_described,
    "sparsify": sparsify,
    "SAELens, sparse": saelens_sparse,
    "SAELens, dense": saelens_dense,
    "dictionary_learning": dictionary_learning,
    LIMIT: limit,
}
PACKAGE_OF = {
    sparsify: "sparsify",
    saelens_sparse: "sae_lens",
    saelens_dense: "sae_lens",
    dictionary_learning: "dictionary_learning",
}
