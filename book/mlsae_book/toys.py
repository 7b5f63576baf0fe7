"""Toy residual streams whose blocks do a known thing: positive controls of what is carried.

Features are axes of the stream, so the dictionary that is right is the identity. Half of the axes
hold features, and the other half a copy of what they were at the first layer, from which a block
can compute them again. Every block moves every feature a little, whatever the token; beyond that it
does what its kind says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables import carried
from mlsae_core.activations import Batch
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec

#: What blocks do to features: nothing (``carried``); replace them by what their copies say
#: (``recomputed``); add to what is there (``amplified``); take half of it away from those that are
#: active (``erased``); or hand these over to other features (``rewritten``).
Kind = Literal["carried", "recomputed", "amplified", "erased", "rewritten"]
KINDS: tuple[Kind, ...] = get_args(Kind)

FEATURES, LAYERS, ACTIVE, CONTEXT = 64, 6, 8, 32
MOVED = 0.3  # reach of what a block adds to a feature whatever the token, of a feature's 1
GROWTH = 1.3  # of what is amplified


class Toy:
    """A toy stream: an `activations.ActivationSource`, whose blocks can be run again."""

    def __init__(self, kind: Kind, n_sequences: int = 256, seed: int = 0):
        self.kind, self.seed, self.n_sequences = kind, seed, n_sequences
        self.site, self.n_layers, self.d_model = SiteSpec(), LAYERS, 2 * FEATURES
        self.device, self.key = torch.device("cpu"), f"toy-{kind}-{seed}"

    @property
    def dictionary(self) -> MLSAE:
        """Each feature's own axis as its latent; the copies are no latents."""
        sae = MLSAE(2 * FEATURES, FEATURES, ACTIVE, standardize=False)
        for rows in (sae.encoder, sae.decoder):
            rows.data = torch.eye(FEATURES, 2 * FEATURES)
        return sae

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Batch]:
        """See `activations.ActivationSource`; there is one pass, in order."""
        for first in range(start * size, self.n_sequences, size * every):
            numbers = torch.arange(first, min(first + size, self.n_sequences))
            text = numbers[:, None] * CONTEXT + torch.arange(CONTEXT)
            x, moved = self._drawn(numbers)
            stream = torch.stack([x, *self._run(moved, 0, x)])
            places = torch.ones_like(text, dtype=torch.bool).nonzero(as_tuple=True)
            yield Batch(stream, stream, text, *places)

    def samples(self, size: int) -> Iterator[carried.Sample]:
        """Every token of every sequence, `size` of these at a time, for `tables.carried.effects`"""
        for numbers in torch.arange(self.n_sequences).split(size):
            x, moved = self._drawn(numbers)

            def after(layer: int, rows: Tensor, moved: Tensor = moved) -> Tensor:
                return torch.stack(self._run(moved, layer, rows))

            stream = torch.stack([x, *self._run(moved, 0, x)])
            yield carried.Sample(stream, numbers.repeat_interleave(CONTEXT), after)

    def _drawn(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The first layer, (token, d_model), and what blocks add, (block, token, feature)."""
        drawn = []
        for number in numbers.tolist():
            state = np.random.SeedSequence([self.seed, number]).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(state))
            drawn.append(torch.rand(LAYERS, CONTEXT, FEATURES, generator=generator))
        opening, moved = torch.cat(drawn, 1).split([1, LAYERS - 1])
        return torch.cat([opening[0]] * 2, -1), 2 * MOVED * (moved - 0.5)

    def _run(self, moved: Tensor, layer: int, x: Tensor) -> list[Tensor]:
        """What the blocks after a layer make of its vectors (…, token, d_model)."""
        found = [x]
        for by in moved[layer:]:
            features, copies = found[-1].split(FEATURES, -1)
            found.append(torch.cat([_changed(self.kind, features, copies) + by, copies], -1))
        return found[1:]


def _changed(kind: Kind, features: Tensor, copies: Tensor) -> Tensor:
    active = torch.zeros_like(features).scatter_(-1, features.topk(ACTIVE).indices, 1.0)
    match kind:
        case "recomputed":
            return copies
        case "amplified":
            return GROWTH * features
        case "erased":
            return features - 0.5 * active * features
        case "rewritten":
            return features - active * features + (active * features).roll(1, -1)
        case _:
            return features


def measured(kind: Kind, n_sequences: int = 64, replicates: int = 200) -> dict[str, pd.DataFrame]:
    """What `tables.carried` finds of a toy: the tables of `persistence`, and ``effects``."""
    toy = Toy(kind, n_sequences)
    sae, size = toy.dictionary, 16
    tables = carried.persistence(toy, sae, size, replicates=replicates, progress=False)
    mean = carried.mean_layers(toy, sae, size, progress=False)
    effects = carried.effects(toy.samples(size), sae, mean, replicates=replicates)
    return tables | {"effects": effects}


def signatures(n_sequences: int = 32) -> pd.DataFrame:
    """What each kind of block leaves behind, means over layers; one row per ``blocks``.

    Returns:
        ``survival`` of a block, its ``excess`` over another token's update, ``total`` and
        ``direct`` drop of a latent that is still active one block after it was taken out, and the
        share of pairs at ``one layer``, and that ``with hysteresis``.
    """
    rows = []
    for kind in KINDS:
        found = measured(kind, n_sequences, 2)  # no interval is shown
        survived, taken = found["survival"], found["effects"]
        survived = survived[(survived.of == next(iter(carried.UPDATES))) & (survived.gap == 1)]
        taken = taken[(taken.taken == carried.TAKEN[0]) & (taken.after == carried.AFTER[0])]
        taken = taken[(taken.layer == -1) & (taken.home == "all") & (taken.gap == 1)].iloc[0]
        single = found["pairs"].set_index("of").single
        row = {"blocks": kind, "survival": (survived.rate + survived.excess).mean()}
        row |= {"excess": survived.excess.mean(), "total": taken.total, "direct": taken.direct}
        row |= {"one layer": single[carried.MEASURED]}
        rows.append(row | {"with hysteresis": single[carried.MARGINS[-1]]})
    return pd.DataFrame(rows)
