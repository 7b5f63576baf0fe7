"""How evenly the active latents of a vector matter to the next prediction."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables.interventions import check, resume
from mlsae_core.activations import First, TextSource, needs_model, one_pass
from mlsae_core.metrics import centred_logit, latent_importance, uniformity
from mlsae_core.resume import Pass
from mlsae_core.sae import MLSAE


def importance(
    source: TextSource,
    sae: MLSAE,
    size: int = 8,
    *,
    sequences: int = 512,
    positions: int = 4,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    """Uniformity of active latent importance, r_L0, at every layer (Gemma Scope, Eq. 12–14).

    The loss of a vector is the mean-centred logit of the correct next token *at its own position*,
    so of each sequence a few positions are drawn and each has its own backward pass. The gradient
    is taken at the model's vector, not at its reconstruction.

    Args:
        size: sequences that are read at a time, on which what is drawn depends.
        sequences: how many to read at most.
        positions: drawn per sequence, without replacement, among the non-special tokens that
            another token follows.
        checkpoint: file to continue from if it exists, and to write every minute.

    Returns:
        One row per layer: ``r_l0``, the mean over sequences of their mean, ``low`` and ``high``,
        its 95 % interval over sequences (1.96 standard errors); ``r_activation``, the same measure
        of the activations alone, without the gradient; ``l0``, active latents per vector;
        ``vectors``, ``sequences``.

    Raises:
        SpecError: a site other than the residual stream.
        ValueError: an empty source.
    """
    needs_model(source)
    check(source.site)
    source = replace(source, blocks=First(source.blocks, sequences))
    generator = torch.Generator().manual_seed(0)
    found: list[Tensor] = []
    done = Pass(checkpoint, size, source.device, found=found, generator=generator)
    batches = source.blocks.batches(size, None, done.first)
    for tokens in one_pass(batches, source, size, "importance", progress, done):
        found.append(_batch(source, sae, tokens, positions, generator))
    numbers = torch.cat(found, 2).double()  # (measure, layer, sequence, position)
    vectors = int((~numbers[2, 0].isnan()).sum())
    by_sequence = numbers.nanmean(-1)
    by_sequence = by_sequence[:, :, ~by_sequence[2, 0].isnan()]
    n = by_sequence.shape[-1]
    means, error = by_sequence.nanmean(-1), by_sequence[0].std(-1) / n**0.5
    columns = {
        "r_l0": means[0],
        "low": means[0] - 1.96 * error,
        "high": means[0] + 1.96 * error,
        "r_activation": means[1],
        "l0": means[2],
    }
    table = {name: column.cpu().numpy() for name, column in columns.items()}
    return pd.DataFrame({"layer": source.layers, **table, "vectors": vectors, "sequences": n})


def _batch(source, sae, tokens, positions, generator) -> Tensor:
    """(measure, layer, sequence, position): r_L0, that of the activations, L0; nan where none."""
    lm, lens, layers = source.lm, source.lens, source.layers
    tokens = tokens.to(lm.device)
    original = lm.original(tokens)
    allowed = lm.keep_mask(tokens)[:, :-1].cpu()
    chance = torch.rand(allowed.shape, generator=generator).masked_fill(~allowed, -1)
    chosen = chance.argsort(descending=True, stable=True)[:, :positions]
    exists, chosen = allowed.gather(1, chosen).to(lm.device), chosen.to(lm.device)
    sequence = torch.arange(len(tokens), device=lm.device)
    with torch.enable_grad():
        first = original.residual[0].detach().clone().requires_grad_()
        streams = resume(lm, original, 0, first)
        at_chosen = streams[-1][sequence[:, None], chosen]
        loss = centred_logit(lm.logits(at_chosen), tokens[sequence[:, None], chosen + 1])
        read = [streams[layer] for layer in layers]
        numbers = []
        for draw in range(chosen.shape[1]):
            gradients = torch.autograd.grad(loss[:, draw].sum(), read, retain_graph=True)
            here = sequence, chosen[:, draw]
            x = torch.stack([stream[here].detach() for stream in read]).to(sae.decoder)
            slope = torch.stack([gradient[here] for gradient in gradients]).to(sae.decoder)
            numbers.append(_measures(sae, lens, layers, x, slope))
    return torch.stack(numbers, -1).masked_fill(~exists, torch.nan)


def _measures(sae, lens, layers, x: Tensor, slope: Tensor) -> Tensor:
    """(measure, layer, vector) of vectors and the gradients there, both (layer, vector, d)."""
    z = lens.apply(x, layers).detach().requires_grad_()
    (slope,) = torch.autograd.grad(lens.invert(z, layers), z, slope)  # into the lens space
    with torch.no_grad():
        values, indices = sae.encode(z)
        y = latent_importance(indices, values, slope, sae.decoder)
        return torch.stack([uniformity(y), uniformity(values), (values > 0).sum(-1).to(values)])
