"""Whether a run, its model, its lens, its dictionary and this machine fit each other.

What can be refused is refused here, in one line, before weights or text are read.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from mlsae_core import models
from mlsae_core.spec import GivenSpec, ModelSpec, RunSpec, SpecError, SubjectSpec

if TYPE_CHECKING:
    import torch

    from mlsae_core.activations import Batch
    from mlsae_core.lens import Lens
    from mlsae_core.lm import LanguageModel
    from mlsae_core.sae import MLSAE
    from mlsae_core.singles import SingleLayers

LARGEST_FVU = 0.7
"""Of a dictionary in its place: published ones have 0.05 to 0.5."""


def model_config(model: ModelSpec):
    """The configuration of a language model: its dimensions, without its weights."""
    from transformers import AutoConfig

    folder = models.folder(model.path)
    known = ", ".join(models.known())
    with reading(
        f"model.path: expected a shipped name ({known}), a Hugging Face folder or a hub id, got "
        f"{model.path}, whose config.json cannot be read"
    ):
        found = AutoConfig.from_pretrained(
            folder or model.path,
            revision=None if folder else model.revision,
            trust_remote_code=False,
        ).get_text_config()
        if min(found.num_hidden_layers, found.hidden_size, found.vocab_size) < 1:
            raise ValueError("a dimension is 0")
    return found


@contextlib.contextmanager
def reading(failure: str):
    """Errors of other libraries, of many kinds and lengths, become one line."""
    try:
        yield
    except SpecError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise SpecError(f"{failure}: {reason}") from error


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

    # Two matrices; of each the weights, the gradient and Adam's two moments, in float32.
    needed = 2 * 4 * 4 * n_latents * n_latents // run.sae.expansion_factor
    memory = memory_of(train.process_state().device)
    if needed > memory:
        raise SpecError(
            f"expansion_factor: expected a dictionary that can be trained in {memory / 1e9:.0f} GB "
            f"of memory, got {n_latents} latents, which need {needed / 1e9:.0f} GB"
        )


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


def memory_of(device: torch.device) -> int:
    """Bytes of memory of a device, or of this machine."""
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def load_lens(run: SubjectSpec, lm: LanguageModel) -> Lens:
    from mlsae_core.lens import Lens

    with reading(f"basis: {run.site.basis} could not be loaded"):
        lens = Lens.load(run.site, lm.device)
    expected = (lm.n_layers, lm.d_model, lm.d_model)
    if not lens.is_identity and lens.weight.shape != expected:
        raise SpecError(
            f"basis: expected a tuned lens of {lm.n_layers} layers and {lm.d_model} dimensions for "
            f"{lm.name}, got weights of shape {tuple(lens.weight.shape)}"
        )
    return lens
