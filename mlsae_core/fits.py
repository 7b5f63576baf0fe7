"""Whether a run, its model, its lens, its dictionary and this machine fit each other.

What can be refused is refused here, in one line, before weights or text are read.
"""

from __future__ import annotations

import itertools
import sys
from typing import TYPE_CHECKING, NamedTuple

from mlsae_core import models, store
from mlsae_core.architecture import memory_of, model_config, reading
from mlsae_core.spec import GivenSpec, RunSpec, SpecError, SubjectSpec

if TYPE_CHECKING:
    from mlsae_core.activations import Batch
    from mlsae_core.lens import Lens
    from mlsae_core.lm import LanguageModel
    from mlsae_core.sae import MLSAE
    from mlsae_core.singles import SingleLayers

LARGEST_FVU = 0.7
"""Of a dictionary in its place: published ones have 0.05 to 0.5."""


# Vectors in float32 that are held for each layer and token of a batch: in training as measured on a
# GPU (benchmarks/gpu.json); an evaluation replaces each layer by three, and of each a block makes
# about 16.
_TRAINING_VECTORS, EVALUATION_VECTORS = 14, 3 * 16


def check(run: SubjectSpec):
    """Refuse what does not fit the model's configuration; neither weights nor text are read."""
    config = model_config(run.model)
    run.site.indices(config.num_hidden_layers)
    limit, context = getattr(config, "max_position_embeddings", None), run.data.context_length
    if limit is not None and context > limit:
        raise SpecError(
            f"data.context_length: expected at most the {limit} positions of {run.model.path}, "
            f"got {context}"
        )
    if isinstance(run, RunSpec):
        _check_memory(run, run.n_latents(config.num_hidden_layers, config.hidden_size))


def _check_memory(run: RunSpec, n_latents: int):
    """Refuse a dictionary that cannot be trained in this machine's memory."""
    from mlsae_core import train

    needed = 4 * _dictionary(run, n_latents)
    memory = memory_of(train.process_state().device)
    if needed > memory:
        raise SpecError(
            f"expansion_factor: expected a dictionary that can be trained in {memory / 1e9:.0f} GB "
            f"of memory, got {n_latents} latents, which need {needed / 1e9:.0f} GB"
        )


def _dictionary(run: RunSpec, n_latents: int) -> int:
    """Bytes of the two matrices, in float32. The gradient takes as many, Adam's moments twice."""
    return 2 * 4 * n_latents * n_latents // run.sae.expansion_factor


class Memory(NamedTuple):
    """Bytes that a stage takes of one device, by estimate.

    model: the language model's weights. dictionary: the autoencoder's. training: its gradient and
    Adam's moments. batch: the activations of a batch, and what is made of them.
    """

    model: int
    dictionary: int
    training: int
    batch: int


def memory(run: SubjectSpec, training: bool, batch_tokens: int) -> Memory:
    """What training takes, or an analysis of the dictionary, in each process."""
    config = model_config(run.model)
    width, depth = config.hidden_size, config.num_hidden_layers
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * width
    number = 4 if run.model.dtype == "float32" else 2
    if isinstance(run, RunSpec):
        dictionary = _dictionary(run, run.n_latents(depth, width))
    else:
        given = run.dictionary.path, run.dictionary.revision, run.dictionary.folders
        files = itertools.chain(*store.dictionary_files(*given).values())
        dictionary = sum(file.stat().st_size for file in files)
    layers = len(run.site.indices(depth))
    batch = _TRAINING_VECTORS * layers * width * batch_tokens
    return Memory(
        model=number * (12 * depth * width**2 + embeddings),
        dictionary=dictionary,
        training=3 * dictionary if training else 0,
        batch=4 * (batch if training else _evaluated(config, batch_tokens)),
    )


def _evaluated(config, batch_tokens: int) -> int:
    """Numbers that an evaluation holds: its growing batch, the stream at all layers, and logits.

    Of SmolLM2-135M, 2,048 tokens: 2.56 GB with the weights, where 2.6 were measured on a CPU.
    """
    from mlsae_core import analysis, train

    stream = config.hidden_size * batch_tokens
    of_all = EVALUATION_VECTORS * config.num_hidden_layers * stream
    each = 3 * stream  # of one layer, which a batch has at least
    most = analysis.VECTORS_AT_ONCE.get(train.process_state().device.type, of_all)
    growing = min(of_all, EVALUATION_VECTORS // 3 * max(most, each))
    return growing + config.num_hidden_layers * stream + 2 * config.vocab_size * batch_tokens


def check_width(sae: MLSAE | SingleLayers, run: GivenSpec):
    """Refuse a dictionary of vectors of another width than those it is to read."""
    config = model_config(run.model)
    layers = run.site.indices(config.num_hidden_layers) if run.site.stacked else [0]
    width = len(layers) * config.hidden_size
    if sae.n_inputs != width:
        raise SpecError(
            f"dictionary.path: expected a dictionary of vectors of width {width}, as "
            f"{run.model.path} has them{' stacked' if run.site.stacked else ''}, got {sae.n_inputs}"
        )


def check_recipe(sae: MLSAE | SingleLayers, run: GivenSpec, layers: list[int], batch: Batch):
    """Warn of a given dictionary that reconstructs a layer as none would in its own place.

    What a batch shows: an FVU above `LARGEST_FVU`, or so few or so many active latents as other
    norms of the vectors, another bias or another layer lead to.
    """
    import torch

    from mlsae_core import metrics

    with torch.no_grad():
        same = batch.target is batch.source
        recon, (values, _) = sae(batch.source) if same else sae(batch.source, batch.target)
    fvu, l0 = metrics.fvu(batch.target, recon), (values > 0).sum(-1).double().mean(-1)
    most = max(sae.n_inputs / 4, sae.k)
    odd = [
        f"layer {'s ' + str(layers) if run.site.stacked else layer} (FVU {f:.2f}, L0 {n:.0f})"
        for layer, f, n in zip(layers, fvu.tolist(), l0.tolist(), strict=False)
        if not (f <= LARGEST_FVU and 1 <= n <= most)
    ]
    if odd:
        print(
            f"warning: {run.dictionary.path} hardly fits {', '.join(odd[:4])}"
            f"{', …' if len(odd) > 4 else ''}: expected an FVU up to {LARGEST_FVU} and an L0 of 1 "
            f"to {most:.0f}; look at how it normalises vectors, at the hook point, at its biases "
            "and at which layer it is of",
            file=sys.stderr,
        )


def load_lens(run: SubjectSpec, lm: LanguageModel) -> Lens:
    """The lens of a run; one that was made for another model is refused, as far as it says so."""
    from mlsae_core.lens import Lens

    with reading(f"basis: {run.site.basis} could not be loaded"):
        lens = Lens.load(run.site, lm.device)
    if lens.is_identity:
        return lens
    expected = (lm.n_layers, lm.d_model, lm.d_model)
    if lens.weight.shape != expected:
        raise SpecError(
            f"basis: expected a tuned lens of {lm.n_layers} layers and {lm.d_model} dimensions for "
            f"{lm.name}, got weights of shape {tuple(lens.weight.shape)}"
        )
    if lens.model not in ("", models.key(run.model.path, run.model.revision)):
        raise SpecError(
            f"basis: expected a tuned lens of {run.model.path}, got {run.site.basis}, which was "
            f"trained on another model, {lens.model_name} of content {lens.model}"
        )
    return lens
