"""Dictionaries trained on something else in the place of a language model's activations.

What is found of the real ones too says nothing of language: a Gaussian with their joint mean and
covariance over all layers has their drift and every other second moment; a model with random
weights, its updates scaled until layers turn as much as the trained model's, has its architecture.
Others keep the model and change what a dictionary sees of a layer's offset and norm.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables import carried
from mlsae_core import metrics, train
from mlsae_core.activations import (
    ActivationSource,
    Batch,
    First,
    TextSource,
    one_pass,
)
from mlsae_core.lm import LanguageModel
from mlsae_core.sae import MLSAE, STD_EPS
from mlsae_core.spec import RunSpec, SpecError

MOMENT_SEQUENCES = 256  # of the training text, from which means and covariances are taken
SIZE = 8  # sequences read at a time

#: What a dictionary is trained on.
REAL = "activations"
GAUSSIAN = "Gaussian, same moments"
RANDOM = "random weights"
MATCHED = "random weights, same drift"
CENTRED = "each layer's mean taken off"
BIASES = "a bias for each layer"
RAW = "not standardised"
CONDITIONS = (REAL, GAUSSIAN, RANDOM, MATCHED, CENTRED, BIASES, RAW)

Change = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(eq=False)
class Changed:
    """A source whose vectors are changed: an `activations.ActivationSource`.

    Args:
        change: of (layer, token, d_model) vectors and a generator, whose seed is the batch's: no
            other batch has it, nor that batch in a pass with another seed or without one.
        name: of the change, for the key.
        draw: another number gives other generators.
    """

    source: ActivationSource
    change: Change
    name: str
    draw: int = 0

    def __getattr__(self, name: str) -> Any:
        if name not in ("site", "n_layers", "d_model", "device", "n_sequences"):
            raise AttributeError(name)  # nothing else is the same
        return getattr(self.source, name)

    @property
    def key(self) -> str:
        """See `ActivationSource`."""
        return f"{self.source.key}: {self.name}, {self.draw}"

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """See `ActivationSource.batches`."""
        own = self.source.batches(size, seed, start, every)
        for number, batch in zip(itertools.count(start, every), own, strict=False):
            of_pass = 0 if seed is None else 1 + seed
            one = np.random.SeedSequence(of_pass, spawn_key=(self.draw, number))
            state = int(one.generate_state(1)[0])  # a generator reads 32 bits, and no more
            x = self.change(batch.source, torch.Generator().manual_seed(state))
            yield replace(batch, source=x, target=x)


@torch.no_grad()
def joint_moments(source: ActivationSource) -> tuple[Tensor, Tensor]:
    """Mean and covariance of all layers' vectors together, (layer · d_model,) and its square."""
    count, total, squares = 0, 0.0, 0.0
    for batch in one_pass(source.batches(SIZE), source, SIZE, "moments", progress=False):
        x = batch.source.transpose(0, 1).flatten(1).double()
        count, total, squares = count + len(x), total + x.sum(0), squares + x.T @ x
    mean = total / count
    return mean, squares / count - mean[:, None] * mean


def gaussian(mean: Tensor, covariance: Tensor, n_layers: int) -> Change:
    """Vectors of a Gaussian over all layers at once, independent between tokens."""
    values, vectors = torch.linalg.eigh(covariance)
    root = (vectors * values.clamp(min=0).sqrt()).T.float()
    mean = mean.float()

    def change(x: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(x.shape[1], len(mean), generator=generator)  # the CPU's on any device
        drawn = (mean + noise.to(x.device) @ root).unflatten(1, (n_layers, -1))
        return drawn.transpose(0, 1).contiguous().to(x)

    return change


def sampled(source: ActivationSource, first: ActivationSource, draw: int = 0) -> Changed:
    """A Gaussian in the place of a source, with the joint moments of `first`."""
    change = gaussian(*joint_moments(first), source.n_layers)
    return Changed(source, change, GAUSSIAN, draw)


def centred(source: ActivationSource, first: ActivationSource) -> Changed:
    """A source from each of whose layers the mean that it has in `first` is taken off."""
    mean = joint_moments(first)[0].float().view(source.n_layers, 1, -1)
    return Changed(source, lambda x, _: x - mean, CENTRED)


@torch.no_grad()
def standardised(x: Tensor) -> Tensor:
    """Vectors (…, d_model) as the autoencoder standardises them."""
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + STD_EPS)


@torch.no_grad()
def match_drift(lm: LanguageModel, tokens: Tensor, cosines: Tensor):
    """Scale what each block of a GPT-NeoX adds until adjacent layers turn as they should.

    Args:
        lm: its weights are changed in place.
        tokens: (batch, position), on which the drift is measured.
        cosines: (layer − 1,) mean cosines of the centred vectors of adjacent layers.

    Raises:
        SpecError: another architecture.
    """
    for layer, wanted in enumerate(cosines.tolist(), 1):
        block = lm.blocks[layer]
        if not hasattr(block, "mlp") or not hasattr(block.mlp, "dense_4h_to_h"):
            raise SpecError(f"model: expected a GPT-NeoX, got blocks {type(block).__name__}")
        captured = lm.capture(tokens.to(lm.device), [layer - 1, layer])["residual"]
        before, after = captured[:, lm.keep_mask(tokens)]
        update, low, high = after - before, 0.0, 1e3

        def cosine(by: float, before=before, update=update) -> float:
            vectors = (x - x.mean(0) for x in (before, before + by * update))
            return float(torch.cosine_similarity(*vectors, dim=-1).mean())

        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if cosine(middle) > wanted else (low, middle)
        for writes in (block.attention.dense, block.mlp.dense_4h_to_h):
            for parameter in writes.parameters():
                parameter.mul_(low)


def adjacent_cosines(x: Tensor) -> Tensor:
    """Mean cosine of the centred vectors of adjacent layers, (layer − 1,), of (layer, token, d)."""
    centred = x - x.mean(1, keepdim=True)
    return torch.cosine_similarity(centred[:-1], centred[1:], dim=-1).mean(1)


def prepared(condition: str, run: RunSpec, source: TextSource, opening: Tensor) -> tuple:
    """The run and the source (without its text's end) of a condition.

    Args:
        source: the activations of `run`, its blocks those of training.
        opening: (batch, position) tokens on which moments and drift are measured.
    """
    first = replace(source, blocks=First(source.blocks, MOMENT_SEQUENCES))
    if condition == REAL:
        return run, source
    if condition in (RANDOM, MATCHED):
        spec = replace(run.model, random_weights=run.train.seed)
        lm = LanguageModel.load(spec, source.device)
        if condition == MATCHED:
            keep = source.lm.keep_mask(opening)
            tokens = opening.to(source.device)
            trained = source.lm.capture(tokens, source.layers)["residual"][:, keep]
            match_drift(lm, opening, adjacent_cosines(trained))
        return run, replace(source, lm=lm)
    if condition == GAUSSIAN:
        return run, sampled(source, first)
    if condition == RAW:
        return replace(run, sae=replace(run.sae, standardize=False)), source
    if condition == CENTRED:
        return run, centred(source, first)
    if condition == BIASES:
        scaled = Changed(first, lambda x, _: standardised(x), "standardised")
        mean = joint_moments(scaled)[0].float().view(source.n_layers, 1, -1)
        run = replace(run, sae=replace(run.sae, standardize=False))
        return run, Changed(source, lambda x, _: standardised(x) - mean, condition)
    raise SpecError(f"condition: expected one of {', '.join(CONDITIONS)}, got {condition}")


@torch.no_grad()
def measured(
    source: ActivationSource, sae: MLSAE, replicates: int = 1000, progress: bool = True
) -> pd.DataFrame:
    """What is found of a dictionary on one pass.

    Returns:
        One row per ``measure``: ``value``, and for the first four of them the ends ``low``,
        ``high`` of a 95 % interval over sequences. Eq. 11 and 12 without the bias of few tokens,
        under both P(J); ``single`` (share of pairs (token, latent) at one layer), ``mean layers``,
        ``survival`` (mean over blocks) and ``survival, shuffled`` (with another token's updates);
        ``fvu`` (per dimension, mean over layers; of the vectors as the condition has them),
        ``mmcs``, ``adjacent cosine``, ``live``.
    """
    n, device = source.n_layers, source.device
    shape = n, sae.n_latents, carried.BLOCKS
    spread = metrics.LayerDistribution(*shape, device=device)
    pairs = metrics.Persistence(*shape, device=device)
    steps = [metrics.Survival(n - 1, sae.n_latents, device=device) for _ in range(2)]
    errors = metrics.Reconstruction(n, source.d_model, device)
    generator, first, cosines = torch.Generator().manual_seed(0), 0, []
    for batch in one_pass(source.batches(SIZE), source, SIZE, "surrogate", progress):
        x, sequence = batch.source, batch.sequence + first
        first += len(batch.text)
        output = sae(x)
        values, indices = output.topk
        spread.update(indices, values, sequence)
        pairs.update(indices, values, sequence)
        errors.update(x, output.recon, values)
        cosines.append(adjacent_cosines(x))
        null = sae.encode(metrics.shuffled_updates(x, generator))
        for step, after in zip(steps, ((indices[1:], values[1:]), null[::-1]), strict=True):
            step.update((indices[:-1], values[:-1]), tuple(after))
    rows = {}
    for weighting in ("latents", "tokens"):
        found = spread.variances(weighting, True)
        drawn = spread.bootstrap(replicates, carried.same_draws(), weighting, True)
        for name, ratio in carried.RATIOS.items():
            row = carried.interval(getattr(found, name), getattr(drawn, name))
            rows[f"{ratio}, {weighting}"] = row
    layers, mean, _ = pairs.bootstrap(replicates, carried.same_draws())
    found = pairs.compute()
    rows["single"] = carried.interval(found.layers[0], layers[:, 0])
    rows["mean layers"] = carried.interval(found.mean_layers, mean)
    live = spread.compute().live
    plain = {
        "survival": steps[0].compute().rate.mean(),
        "survival, shuffled": steps[1].compute().rate.mean(),
        "fvu": errors.compute().fvu_per_dimension.mean(),
        "mmcs": metrics.mmcs(sae.decoder[live]).mean,
        "adjacent cosine": torch.stack(cosines).mean(),
        "live": live.double().mean(),
    }
    rows |= {name: {"value": float(value)} for name, value in plain.items()}
    return pd.DataFrame([{"measure": name, **row} for name, row in rows.items()])


def surrogate(
    condition: str, run: RunSpec, source: TextSource, blocks, test, progress: bool = True
) -> pd.DataFrame:
    """Train on a condition and measure: see `measured`.

    Args:
        source: the activations of `run`. blocks, test: the text of training, and of measuring.
    """
    source = replace(source, blocks=blocks)
    opening = next(iter(blocks.batches(2 * SIZE)))
    run, own = prepared(condition, run, source, opening)
    trained = train.train(run, own, description=condition)
    read = own.source if isinstance(own, Changed) else own
    read = replace(read, blocks=test)
    read = replace(own, source=read) if isinstance(own, Changed) else read
    return measured(read, trained.sae.eval(), progress=progress)
