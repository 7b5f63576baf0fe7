"""Several layers reconstructed at once: what a dictionary for all layers should be good for.

Replacing one layer asks whether its reconstruction serves the model. Where several stand in, each
is made of what the ones before have let through, so that errors pass from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables.carried import BLOCKS, interval, same_draws
from mlsae_core.activations import TextSource, one_pass
from mlsae_core.lm import LanguageModel
from mlsae_core.metrics import Downstream
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SpecError

#: Of a layer's vectors (token, d_model), what stands in their place.
StandIn = Callable[[Tensor], Tensor]


def contiguous(n_layers: int) -> list[range]:
    """Every run of layers, the shorter first."""
    sizes = range(1, n_layers + 1)
    return [range(i, i + size) for size in sizes for i in range(n_layers - size + 1)]


@torch.no_grad()
def replaced(
    lm: LanguageModel, tokens: Tensor, keep: Tensor, stand_ins: dict[int, StandIn]
) -> Tensor:
    """The last residual stream when some layers are replaced by what is made of what reaches them.

    Args:
        tokens: (batch, position). keep: (batch, position) bool, where vectors are replaced.
        stand_ins: by layer.

    Returns:
        (batch, position, d_model), for `LanguageModel.logits`.
    """

    def put(stand_in: StandIn):
        def hook(_, __, output):
            x = (output[0] if isinstance(output, tuple) else output).clone()
            x[keep] = stand_in(x[keep].float()).to(x.dtype)
            return (x, *output[1:]) if isinstance(output, tuple) else x

        return hook

    with ExitStack() as hooks:
        for layer, stand_in in stand_ins.items():
            handle = lm.blocks[layer].register_forward_hook(put(stand_in))
            hooks.callback(handle.remove)
        return lm.capture(tokens, [lm.n_layers - 1])["residual"][0]


@torch.no_grad()
def together(
    source: TextSource,
    dictionaries: Sequence[MLSAE],
    size: int = 8,
    *,
    mean_tokens: int | None = 8192,
    replicates: int = 1000,
    progress: bool = True,
) -> pd.DataFrame:
    """Loss and KL where the reconstructions of one, two, … all layers stand in at once.

    Args:
        dictionaries: of each layer of the model; for an MLSAE the same one.
        mean_tokens: of which the mean of a layer is taken; none: no means stand in.

    Returns:
        One row per ``of`` (``reconstruction`` or ``mean``, the layers' means standing in),
        ``first`` and ``last`` layer replaced: ``layers`` (how many), ``delta_ce`` and ``kl``
        (nats per predicted token), ``single`` (the sum of the delta CE of its layers alone) and
        ``excess`` (delta_ce − single), each with the ends of a 95 % interval over sequences.

    Raises:
        SpecError: another number of dictionaries than layers, or a basis other than the identity.
    """
    n, lm = source.n_layers, source.lm
    if len(dictionaries) != n or not source.lens.is_identity:
        raise SpecError(
            f"dictionaries: expected {n} of the residual stream itself, got {len(dictionaries)}, "
            f"basis {source.site.basis}"
        )
    sets = contiguous(n)
    ways = {"reconstruction": [lambda x, sae=sae: sae(x).recon for sae in dictionaries]}
    if mean_tokens:
        means = _means(source, mean_tokens)
        ways["mean"] = [lambda x, mean=mean: mean.expand_as(x) for mean in means]
    found = {of: Downstream(len(sets) * BLOCKS, source.device) for of in ways}
    first = 0
    for tokens in one_pass(source.blocks.batches(size), source, size, "together", progress):
        tokens = tokens.to(source.device)
        keep, targets = lm.keep_mask(tokens), tokens[:, 1:]
        original = lm.logits(lm.capture(tokens, [n - 1])["residual"][0][:, :-1])
        for of, stand_ins in ways.items():
            for number, layers in enumerate(sets):
                chosen = {layer: stand_ins[layer] for layer in layers}
                logits = lm.logits(replaced(lm, tokens, keep, chosen)[:, :-1])
                for row, (before, after) in enumerate(zip(original, logits, strict=True)):
                    cell = number * BLOCKS + (first + row) % BLOCKS
                    found[of].update(before, after[None], targets[row], [cell])
        first += len(tokens)
    parts = [_table(of, sets, *_sums(total), replicates) for of, total in found.items()]
    return pd.concat(parts, ignore_index=True)


def _means(source: TextSource, tokens: int) -> Tensor:
    """(layer, d_model)."""
    total, count = 0.0, 0
    for batch in source.batches(8):
        total, count = total + batch.source.double().sum(1), count + batch.source.shape[1]
        if count >= tokens:
            break
    return (total / count).float()


def _sums(total: Downstream) -> tuple[Tensor, Tensor, Tensor]:
    """Delta CE and KL summed over positions, and these, (set, block)."""
    parts = total.sums[1], total.sums[2], total.tokens.double()
    return tuple(part.view(-1, BLOCKS).cpu() for part in parts)


def _table(of, sets, ce: Tensor, kl: Tensor, tokens: Tensor, replicates: int) -> pd.DataFrame:
    chosen = torch.randint(BLOCKS, (replicates, BLOCKS), generator=same_draws())
    weights = torch.nn.functional.one_hot(chosen, BLOCKS).sum(1).double()
    weights = torch.cat([torch.ones(1, BLOCKS, dtype=torch.float64), weights])  # as measured first
    ce, kl = (weights @ part.T / (weights @ tokens.T) for part in (ce, kl))
    rows = []
    for number, layers in enumerate(sets):
        single = ce[:, list(layers)].sum(1)  # the sets of one layer are the first
        row = {"of": of, "first": layers[0], "last": layers[-1], "layers": len(layers)}
        columns = {"delta_ce": ce[:, number], "kl": kl[:, number], "single": single}
        columns["excess"] = ce[:, number] - single
        for name, values in columns.items():
            row |= interval(values[0], values[1:], name)
        rows.append(row)
    return pd.DataFrame(rows)


#: What is shown of several layers at once: column → how a reader is told of it.
SHOWN = {"excess": "difference", "delta_ce": "together", "single": "sum of each alone"}


def from_the_first(table: pd.DataFrame) -> pd.DataFrame:
    """Of `together` of several ``dictionary``, the sets that begin with the first layer: one row
    per set and ``what`` (`SHOWN`), with ``value``, ``low`` and ``high``. Means of layers stand as a
    dictionary of their own."""
    table = table[table["first"] == table["first"].min()]
    mean = table.of == "mean"
    table = table.assign(dictionary=table.dictionary.mask(mean, "means of the layers"))
    parts = []
    for name, what in SHOWN.items():
        ends = {"value": table[name], "low": table[f"{name}_low"], "high": table[f"{name}_high"]}
        parts.append(table[["dictionary", "layers"]].assign(what=what, **ends))
    return pd.concat(parts, ignore_index=True)
