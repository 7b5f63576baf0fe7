"""How evenly the active latents of a vector matter to the next prediction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Literal, get_args

import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables import between
from mlsae_book.tables.interventions import check, resume
from mlsae_core.activations import First, TextSource, needs_model, one_pass
from mlsae_core.metrics import centred_logit, latent_importance, uniformity
from mlsae_core.resume import Pass
from mlsae_core.sae import MLSAE

#: The vector's own gradient; null models: that of a vector of the next sequence of its batch at the
#: same layer, and a direction drawn at random.
Gradient = Literal["own", "another", "random"]
GRADIENTS: tuple[Gradient, ...] = get_args(Gradient)


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
    """Uniformity of active latent importance, r_L0, at every layer (Gemma Scope, Eq. 12–14), and
    what it is with gradients that know nothing of the vector's prediction.

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
        One row per layer and `Gradient`: ``layer``, ``gradient``; ``r_l0``, the mean over sequences
        of their mean, ``low`` and ``high``, its 95 % interval over sequences (1.96 standard
        errors); ``difference``, by which the own gradient's is larger on the same vectors, with
        ``difference_low`` and ``difference_high``; ``r_activation``, the same measure of the
        activations alone, without a gradient; ``l0``, active latents per vector; ``vectors``,
        ``sequences``. Another gradient's are nan where every batch is of one sequence.

    Raises:
        SpecError: a site other than the residual stream.
        ValueError: an empty source.
    """
    needs_model(source)
    check(source.site)
    source = replace(source, blocks=First(source.blocks, sequences))
    drawn = {"generator": torch.Generator().manual_seed(0)}
    drawn["directions"] = torch.Generator().manual_seed(1)
    found: list[Tensor] = []
    done = Pass(checkpoint, size, source.device, found=found, **drawn)
    batches = source.blocks.batches(size, None, done.first)
    for tokens in one_pass(batches, source, size, "importance", progress, done):
        found.append(_batch(source, sae, tokens, positions, **drawn))
    numbers = torch.cat(found, 2).double()  # (measure, layer, sequence, position)
    vectors = int((~numbers[-1, 0].isnan()).sum())
    by_sequence = numbers.nanmean(-1)
    by_sequence = by_sequence[:, :, ~by_sequence[-1, 0].isnan()].cpu()
    *uniform, activation, l0 = by_sequence
    alone = {"r_activation": activation.nanmean(-1).numpy(), "l0": l0.nanmean(-1).numpy()}
    counted = {"vectors": vectors, "sequences": by_sequence.shape[-1]}
    tables = []
    for gradient, of_one in zip(GRADIENTS, uniform, strict=True):
        columns = _interval(of_one, "r_l0", "low", "high")
        differences = "difference", "difference_low", "difference_high"
        columns |= _interval(uniform[0] - of_one, *differences)
        kind = {"layer": source.layers, "gradient": gradient}
        tables.append(pd.DataFrame(kind | columns | alone | counted))
    return pd.concat(tables, ignore_index=True)


def _interval(by_sequence: Tensor, value: str, low: str, high: str) -> dict:
    """Mean over sequences, (layer, sequence), and the ends of its 95 % interval, by those names."""
    count, mean = by_sequence.isnan().logical_not().sum(-1), by_sequence.nanmean(-1)
    error = ((by_sequence - mean[:, None]).square().nansum(-1) / (count - 1) / count).sqrt()
    ends = {value: mean, low: mean - 1.96 * error, high: mean + 1.96 * error}
    return {name: end.numpy() for name, end in ends.items()}


def beside_activations(table: pd.DataFrame) -> pd.DataFrame:
    """For charts: the activations alone as a further row of each layer, without an interval.

    Args:
        table: of :func:`importance`, of one run or of several.

    Returns:
        The table with ``of`` (a `Gradient`, or ``alone``) in the place of ``gradient``, and how
        many latents would share the effect equally, r_L0 · L0 where L0 is the same for all vectors:
        ``latents``, ``latents_low``, ``latents_high``.
    """
    alone = table[table.gradient == GRADIENTS[0]].assign(gradient="alone", low=nan, high=nan)
    alone = alone.assign(r_l0=alone.r_activation)
    long = pd.concat([table, alone], ignore_index=True).rename(columns={"gradient": "of"})
    names = {"latents": "r_l0", "latents_low": "low", "latents_high": "high"}
    return long.assign(**{name: long[share] * long.l0 for name, share in names.items()})


def by_gradient(table: pd.DataFrame, by: str = "layer") -> pd.DataFrame:
    """r_L0 with each `Gradient`, a column each, indexed by `by`: means over what else varies.

    Args:
        table: of :func:`importance`, of one run or of several with a column `by`.

    Returns:
        Columns `GRADIENTS`, and ``alone``, of the activations.
    """
    means = table.pivot_table("r_l0", by, "gradient")[list(GRADIENTS)].rename_axis(columns=None)
    return means.assign(alone=table.groupby(by).r_activation.mean())


def beside_null_models(table: pd.DataFrame, by: list[str], digits: int = 3) -> pd.DataFrame:
    """By how much the own gradient's r_L0 is larger than each null model's, with 95 % intervals over
    sequences, as text: a column for each null model, indexed by `by`.

    Args:
        table: of :func:`importance`. by: columns that tell its rows of one gradient apart.
    """
    ends = table[["difference", "difference_low", "difference_high"]].itertuples(index=False)
    shown = table.assign(shown=[between(*row, digits) for row in ends])
    shown = shown.pivot_table("shown", by, "gradient", aggfunc="first")
    return shown[list(GRADIENTS[1:])].rename_axis(columns=None)


def _batch(source, sae, tokens, positions, generator, directions) -> Tensor:
    """(measure, layer, sequence, position), nan where none: r_L0 with each of `GRADIENTS`, that of
    the activations, L0."""
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
            slope = torch.stack([of_layer[here] for of_layer in gradients]).to(sae.decoder)
            another = slope.roll(1, 1) if len(tokens) > 1 else torch.full_like(slope, torch.nan)
            chance = torch.randn(slope.shape, generator=directions).to(slope)
            numbers.append(_measures(sae, lens, layers, x, (slope, another, chance)))
    return torch.stack(numbers, -1).masked_fill(~exists, torch.nan)


def _measures(sae, lens, layers, x: Tensor, slopes: Sequence[Tensor]) -> Tensor:
    """(measure, layer, vector) of vectors and gradients there, each (layer, vector, d)."""
    z = lens.apply(x, layers).detach().requires_grad_()
    back = lens.invert(z, layers)
    into = [torch.autograd.grad(back, z, slope, retain_graph=True)[0] for slope in slopes]
    with torch.no_grad():
        values, indices = sae.encode(z)
        measured = [
            uniformity(latent_importance(indices, values, slope, sae.decoder)) for slope in into
        ]
        return torch.stack([*measured, uniformity(values), (values > 0).sum(-1).to(values)])
