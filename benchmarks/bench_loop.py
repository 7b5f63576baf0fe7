"""How fast is what surrounds the training step: language model, evaluation, distributions?

Each is compared with `benchmarks.reference`, which does the same plainly, and both must give the
same numbers. Text and weights are random except in the training loop, which runs on the shipped
model and packs its text as it goes.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.common import OURS, Case, Implementation, Step
from mlsae_core import analysis, text
from mlsae_core.activations import Batch, TextSource
from mlsae_core.lm import LanguageModel
from mlsae_core.metrics import LayerDistribution
from mlsae_core.sae import MLSAE
from mlsae_core.spec import DataSpec, ModelSpec, RunSpec, SaeSpec, SiteSpec, TrainSpec

PLAIN = "as described"
SITE = SiteSpec()


class Shape(NamedTuple):
    """A GPT-NeoX model, a dictionary on it, and sequences and positions of a batch."""

    n_layers: int
    d_model: int
    n_heads: int
    vocabulary: int
    n_latents: int
    k: int
    sequences: int
    positions: int

    @property
    def tokens(self) -> int:
        return self.sequences * self.positions

    def settings(self) -> dict:
        names = {"layers": self.n_layers, "d": self.d_model, "latents": self.n_latents, "k": self.k}
        return {"tokens": self.tokens, "vocabulary": self.vocabulary, **names}


SHAPES = {
    "tiny": Shape(2, 32, 2, 97, 256, 4, 2, 16),
    "mini": Shape(6, 128, 4, 4096, 4096, 16, 8, 256),
    "pythia": Shape(6, 512, 8, 50304, 32768, 32, 1, 512),
    "smollm2": Shape(30, 576, 9, 49152, 4608, 32, 2, 256),
}
DEFAULT_MODEL = "neox-6l-128d"
MANY_LAYERS = "evaluation, 30 layers"


def cases(quick: bool) -> list[Case]:
    shapes = ["tiny"] if quick else ["mini", "pythia"]
    tokens = (2_000, 4_000) if quick else (100_000, 1_000_000, 2_000_000)
    found = [_loop_case(steps=2 if quick else 32)]
    for name in shapes:
        found += [_evaluation_case(name), _distributions_case(name)]
    # Where replacing layers costs most: many of them, and a large vocabulary.
    found.append(_evaluation_case("tiny" if quick else "smollm2", MANY_LAYERS))
    return [*found, *map(_memory_case, tokens)]


def _sae(shape: Shape, kernel: str = "sparse") -> MLSAE:
    generator = torch.Generator().manual_seed(0)
    sizes = shape.d_model, shape.n_latents, shape.k
    return MLSAE(*sizes, kernel=kernel, generator=generator).requires_grad_(False)


# --- the training loop ----------------------------------------------------------------------------


def _loop_case(steps: int) -> Case:
    seconds: dict[str, float] = {}
    run = RunSpec(
        ModelSpec(DEFAULT_MODEL),
        DataSpec(),
        SiteSpec(),
        SaeSpec(expansion_factor=16, k=16),
        TrainSpec(tokens=steps * 2048, learning_rate=1e-3),
    )
    return Case(
        "training loop",
        DEFAULT_MODEL,
        run.train.tokens,
        "tokens",
        {
            OURS: Implementation(partial(_our_loop, run, seconds)),
            PLAIN: Implementation(partial(_plain_loop, run)),
        },
        steps=1,
        check=_check_losses,
        agreement="loss of every step: 1e-3",
        rounds=3,
        shares=lambda: {part: spent / sum(seconds.values()) for part, spent in seconds.items()},
        settings={"steps": steps, "tokens a step": 2048, "R": 16, "k": 16, "AuxK": "on"},
    )


class _PackedAnew:
    """Sequences packed from text as they are asked for."""

    def __init__(self, run: RunSpec, tokenizer):
        self.context, self.tokenizer = run.data.context_length, tokenizer
        self.documents = list(itertools.islice(text.documents(run.data), 6000))

    def batches(self, size: int, seed: int, start: int = 0, every: int = 1) -> Iterator[Tensor]:
        """As `mlsae_core.text.TokenBlocks` has it, in the order of the documents."""
        sequences = self._sequences()
        while True:
            yield torch.stack([next(sequences) for _ in range(size)])

    def _sequences(self) -> Iterator[Tensor]:
        documents = itertools.cycle(self.documents)
        while True:  # few documents at a time, so that hardly more is packed than is used
            some = itertools.islice(documents, 16)
            for piece in text.pack(some, self.tokenizer, self.context):
                yield from torch.as_tensor(piece).long()


def _our_loop(run: RunSpec, seconds: dict[str, float]) -> Step:
    lm = LanguageModel.load(run.model)
    return timed_loop(run, lm, _PackedAnew(run, lm.tokenizer), seconds)


def timed_loop(
    run: RunSpec,
    lm: LanguageModel,
    blocks,
    seconds: dict[str, float],
    wait: Callable[[], None] = lambda: None,
    kernel: str = "sparse",
) -> Step:
    """Train and give the losses; the seconds of each part are left in `seconds`.

    wait: for a device, before the clock is read; without it, a part's work ends in a later one.
    """
    from mlsae_core.train import train

    def timed(part: str, function: Callable) -> Callable:
        def call(*args):
            wait()
            began = time.perf_counter()
            try:
                return function(*args)
            finally:
                wait()
                seconds[part] = seconds.get(part, 0) + time.perf_counter() - began

        return call

    class Timed:
        def batches(self, *args) -> Iterator[Tensor]:
            draw = timed("packing", partial(next, blocks.batches(*args)))
            while True:
                yield draw()

    lm = copy.copy(lm)
    lm.capture = timed("language model", lm.capture)

    def step():
        seconds.clear()
        began = time.perf_counter()
        log = train(run, TextSource(lm, Timed(), SITE), kernel=kernel).log
        seconds["autoencoder"] = time.perf_counter() - began - sum(seconds.values())
        return torch.tensor(log.loss.to_numpy())

    return step


def _plain_loop(run: RunSpec) -> Step:
    from mlsae_core.metrics import geometric_median
    from mlsae_core.train import build_sae

    lm = LanguageModel.load(run.model)
    blocks = _PackedAnew(run, lm.tokenizer)
    sequences = run.train.micro_batch_tokens // run.data.context_length

    @torch.no_grad()
    def activations_of(tokens: Tensor) -> Tensor:
        return reference.capture(lm, tokens)[0][:, lm.keep_mask(tokens)]

    def step():
        sae, training, losses = build_sae(run, lm), None, []
        batches = blocks.batches(sequences, run.train.seed)
        for tokens in itertools.islice(batches, run.train.tokens // run.train.batch_tokens):
            x = activations_of(tokens)
            if training is None:
                scaled = sae.standardise(x)[0].flatten(0, 1)
                sae.pre_bias.data.copy_(geometric_median(scaled))
                training = reference.Training(sae, run.train.learning_rate)
            losses.append(training.step(x))
        return torch.tensor(losses, dtype=torch.float64)

    return step


# --- evaluation -----------------------------------------------------------------------------------


def random_lm(
    shape: Shape, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """A model of random weights; token 0 ends sequences."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d_model,
        intermediate_size=4 * shape.d_model,
        num_hidden_layers=shape.n_layers,
        num_attention_heads=shape.n_heads,
        max_position_embeddings=shape.positions,
        initializer_range=0.1,  # large enough that a replaced layer changes the predictions
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GPTNeoXForCausalLM(config)
    ids = SimpleNamespace(bos_token_id=0, eos_token_id=0, pad_token_id=None)
    return LanguageModel(network.to(device, dtype), ids, "random")


def _tokens(shape: Shape) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(shape.vocabulary, (shape.sequences, shape.positions), generator=generator)


def _against_plain(suite: str, name: str, ours, plain, check, agreement: str, **settings) -> Case:
    """One pass of both implementations over the tokens of a shape."""
    shape = SHAPES[name]
    makers = {OURS: ours, PLAIN: plain}
    return Case(
        suite,
        name,
        shape.tokens,
        "tokens",
        {label: Implementation(partial(make, shape)) for label, make in makers.items()},
        steps=1,
        check=check,
        agreement=agreement,
        rounds=3,
        settings=shape.settings() | settings,
    )


def _evaluation_case(name: str, suite: str = "evaluation") -> Case:
    return _against_plain(
        suite,
        name,
        _our_evaluation,
        _plain_evaluation,
        _check_evaluation,
        "MSE of every layer: 1e-3 of the largest; delta CE and KL: of the largest KL",
        **{"FVU, delta CE, KL at": "every layer"},
    )


def _our_evaluation(shape: Shape) -> Step:
    sae, blocks = _sae(shape), text.TokenBlocks(_tokens(shape).numpy())
    source = TextSource(random_lm(shape), blocks, SITE)

    def step():
        options = {"ablations": False, "progress": False}
        table = analysis.evaluate(source, sae, shape.sequences, **options)
        return torch.tensor(table[["mse", "delta_ce", "kl"]].to_numpy().T)

    return step


def _plain_evaluation(shape: Shape) -> Step:
    lm, sae, batches = random_lm(shape), _sae(shape, "dense"), [_tokens(shape)]

    def step():
        return torch.stack(list(reference.evaluate(lm, sae, batches).values()))

    return step


# --- distributions over layers --------------------------------------------------------------------


def _activations(shape: Shape) -> Tensor:
    """(layer, token, d_model): layers share a part, so that latents are active at several."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randn(shape.n_layers + 1, shape.tokens, shape.d_model, generator=generator)
    return drawn[:-1] + drawn[-1]


def _distributions_case(name: str) -> Case:
    return _against_plain(
        "distributions",
        name,
        _our_distributions,
        _plain_distributions,
        _check_distributions,
        "Eq. 11 and Eq. 12: 1e-3; P(layer | latent): 1e-3 for all but 1 in 1000",
        **{"from": "activations"},
    )


def _our_distributions(shape: Shape) -> Step:
    sae, x = _sae(shape), _activations(shape)

    def step():
        found = LayerDistribution(shape.n_layers, shape.n_latents)
        topk = sae.encode(x)
        found.update(topk.indices, topk.values)
        result = found.compute()
        return _numbers(result.ratio_latent, result.ratio_token, result.probs)

    return step


def _plain_distributions(shape: Shape) -> Step:
    sae, x = _sae(shape, "dense"), _activations(shape)

    def step():
        found = reference.Distributions(shape.n_layers, shape.n_latents)
        topk = sae.encode(x)
        found.update(topk.indices, topk.values)
        result = found.compute()
        return _numbers(result["ratio_latent"], result["ratio_token"], result["probs"])

    return step


def _numbers(ratio_latent, ratio_token, probs: Tensor) -> Tensor:
    ratios = torch.tensor([ratio_latent, ratio_token], dtype=torch.float64)
    return torch.cat([ratios, probs.nan_to_num(0).flatten()])


def _memory_case(tokens: int) -> Case:
    """The whole analysis with its null models, on activations that are drawn batch by batch."""
    shape = SHAPES["tiny"] if tokens < 10_000 else SHAPES["mini"]._replace(n_latents=2048)

    def step():
        class Drawn:
            site, n_layers, device = SITE, shape.n_layers, torch.device("cpu")
            n_sequences = tokens // shape.positions

            def batches(self, size):
                drawn = _activations(shape).unflatten(1, (size, shape.positions))
                text = torch.zeros(size, shape.positions, dtype=torch.int64)
                places = torch.ones_like(text, dtype=torch.bool).nonzero(as_tuple=True)
                for number in range(tokens // shape.tokens):
                    x = drawn.roll(number, 1).flatten(1, 2)
                    yield Batch(x, x, text, *places)

        analysis.distributions(Drawn(), _sae(shape), shape.sequences, progress=False)

    return Case(
        "memory of distributions",
        f"{tokens / 1e6:g} M tokens",
        tokens,
        "tokens",
        {OURS: Implementation(lambda: step)},
        steps=1,
        rounds=0,
        settings={**shape.settings(), "null models": 2, "activations": "drawn"},
    )


# Rounding may decide a tie otherwise: then one vector has another latent, and what depends on that
# one vector alone differs. Means over all vectors hardly do.
TOLERANCE = 1e-3


def _first_results(results: dict[str, list[Tensor]]) -> tuple[Tensor, Tensor]:
    ours, plain = results[OURS][0], results[PLAIN][0]
    assert ours.shape == plain.shape, (ours.shape, plain.shape)
    return ours, plain


def _check_error(error: Tensor) -> None:
    largest = error.max()
    assert largest <= TOLERANCE, f"expected agreement to {TOLERANCE:g}, got {largest:.2g}"


def _check_losses(results: dict[str, list[Tensor]]) -> None:
    ours, plain = _first_results(results)
    _check_error((ours / plain - 1).abs())


def _check_evaluation(results: dict[str, list[Tensor]]) -> None:
    ours, plain = _first_results(results)
    mse, _, kl = plain.amax(1)  # delta CE is a mean of losses and gains that may cancel
    _check_error((ours - plain).abs() / torch.stack([mse, kl, kl])[:, None])


def _check_distributions(results: dict[str, list[Tensor]]) -> None:
    ours, plain = _first_results(results)
    error = (ours - plain).abs()
    _check_error(error[:2] / plain[:2])
    _check_error((error[2:] > TOLERANCE).double().mean())
