"""Two questions that `tables.carried.persistence` leaves open, beside null models that are sums.

How far does a share at one layer fall without the margin of TopK where blocks know nothing of the
token? And which latents survive a block more or less often than they would by chance, if the tokens
of a sequence are no independent ones?
"""

from __future__ import annotations

from functools import partial

import pandas as pd
import torch

from mlsae_book.tables import carried
from mlsae_core.activations import ActivationSource, one_pass
from mlsae_core.metrics import Excess, Persistence, drifted
from mlsae_core.sae import MLSAE

LEAST_TOKENS, LEAST_SEQUENCES = 100, 16  # at which a latent is active, to be counted
#: One null model beside another draw of it: what chance alone gives.
CHANCE = "another token's updates, twice"


@torch.no_grad()
def margins(
    source: ActivationSource,
    sae: MLSAE,
    size: int = 8,
    *,
    replicates: int = 1000,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """The selections of `carried.MARGINS` in the stream and in sums, and latents that blocks treat.

    Args:
        size, replicates: as of `carried.persistence`.

    Returns:
        ``selections``: one row per ``of`` (measured, or a stream that takes updates of
        `carried.UPDATES` from the first layer on) and ``selection``: ``pairs``, ``single`` (share
        active at one layer) and ``mean`` (layers), each with the ends of its interval. ``treated``:
        one row per ``of`` (a null model, or `CHANCE`) and ``layer``: the ``latents`` that are
        active at `LEAST_TOKENS` tokens in `LEAST_SEQUENCES` sequences or more, and the share of
        them that survive the next block ``more`` and ``less`` often than in the null model, beyond
        two standard errors over sequences.

    Raises:
        SpecError: see `carried.check`.
    """
    carried.check(source, sae)
    n, device = len(source.site.indices(source.n_layers)), source.device
    streams = (carried.MEASURED, *carried.UPDATES)
    pairs = {
        (of, selection): Persistence(n, sae.n_latents, carried.BLOCKS, device)
        for of in streams
        for selection in carried.MARGINS
    }
    treated = {of: Excess(n - 1, sae.n_latents, device) for of in (*carried.UPDATES, CHANCE)}
    generator, first = torch.Generator().manual_seed(0), 0
    for batch in one_pass(source.batches(size), source, size, "margins", progress):
        x, sequence = batch.source, batch.sequence + first
        first += len(batch.text)
        codes = {}
        for of in streams:
            update = carried.UPDATES.get(of)
            stream = drifted(x, partial(update, generator=generator)) if update else x
            codes[of] = wide = carried.largest(sae, stream, carried.WIDE * sae.k)
            for selection, found in carried.selected(*wide, sae.k).items():
                pairs[of, selection].update(*found, sequence)
        before, after = (
            tuple(part[rows, :, : sae.k] for part in codes[carried.MEASURED])
            for rows in (slice(None, -1), slice(1, None))
        )
        null = {of: carried.coded(sae, up(x, generator)) for of, up in carried.UPDATES.items()}
        shuffled = next(iter(carried.UPDATES))
        again = carried.coded(sae, carried.UPDATES[shuffled](x, generator))
        for of, found in null.items():
            treated[of].update(before, after, found, sequence)
        treated[CHANCE].update(before, again, null[shuffled], sequence)
    return {
        "selections": _selections(pairs, replicates),
        "treated": pd.DataFrame(
            [row for of, excess in treated.items() for row in _treated(of, excess)]
        ),
    }


def _selections(pairs: dict[tuple[str, str], Persistence], replicates: int) -> pd.DataFrame:
    rows = []
    for (of, selection), total in pairs.items():
        found = total.compute()
        layers, mean, _ = total.bootstrap(replicates, carried.same_draws())
        row = {"of": of, "selection": selection, "pairs": found.pairs}
        row |= carried.interval(found.layers[0], layers[:, 0], "single")
        rows.append(row | carried.interval(found.mean_layers, mean, "mean"))
    return pd.DataFrame(rows)


def _treated(of: str, excess: Excess) -> list[dict]:
    found, rows = excess.compute(), []
    for layer, (active, sequences) in enumerate(zip(found.active, found.sequences, strict=True)):
        often = (active >= LEAST_TOKENS) & (sequences >= LEAST_SEQUENCES)
        difference, error = found.difference[layer, often], found.error[layer, often]
        row = {"of": of, "layer": layer, "latents": int(often.sum())}
        row |= {"more": float((difference > 2 * error).double().mean())}
        rows.append(row | {"less": float((difference < -2 * error).double().mean())})
    return rows
