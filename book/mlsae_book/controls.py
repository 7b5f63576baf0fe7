"""Whether surrogates tell worlds apart in which it is known what a dictionary's ratios are due to.

`surrogates` trains dictionaries on a Gaussian with the moments of the activations, and on these
without the layers' means, and concludes from what Eq. 11 and 12 become. Here the activations are
made: with second moments that suffice, that do not, and in between; and with offsets and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch

from mlsae_book import planted, surrogates
from mlsae_book.surrogates import Changed
from mlsae_book.tables import between, carried
from mlsae_core import store, train
from mlsae_core.activations import ActivationSource

#: Of what the worlds are made: small, so that their ten dictionaries take half a minute of a core.
WORLD = planted.PlantedSpec(
    n_features=64, d_model=24, n_layers=4, active=8.0, k=4, training_tokens=100_000, tokens=16_384
)
#: Worlds of one mean and covariance over all layers: name → the share of it that is Gaussian.
WORLDS = {"features": 0.0, "features and a Gaussian": 0.5, "a Gaussian": 1.0}
#: Worlds whose layers have one mean, and one of their own each.
APART = {"no offsets": 0.0, "offsets": 0.5}
#: What a dictionary is trained on, and measured on.
OWN, SURROGATE, CENTRED = "the world", "its Gaussian", surrogates.CENTRED


def blend(world: planted.World, share: float) -> Changed:
    """A world a share of whose covariance comes from a Gaussian, its joint moments as they were.

    share: 0 leaves the world as it is; at 1 nothing of its features is left.
    """
    mean, covariance = surrogates.joint_moments(world)
    noise = surrogates.gaussian(torch.zeros_like(mean), covariance, world.n_layers)
    centre = mean.float().view(world.n_layers, 1, -1)

    def change(x, generator):
        return centre + (1 - share) ** 0.5 * (x - centre) + share**0.5 * noise(x, generator)

    return Changed(world, change, f"{share} Gaussian")


def redrawn(own: Changed) -> Changed:
    """A Gaussian with the moments of a world's vectors, whose own draws it does not share."""
    return surrogates.sampled(own, own, draw=own.draw + 1)


def displaced(world: planted.World, length: float) -> Changed:
    """A world whose layers have no mean but a random one of this length, where 1 is that of the
    layer's typical vector."""
    generator = torch.Generator().manual_seed(world.spec.seed)
    own = torch.randn(world.n_layers, world.d_model, generator=generator)
    own = torch.nn.functional.normalize(own - own.mean(1, keepdim=True), dim=1)
    lengths = surrogates.joint_moments(world)[1].diagonal().view(world.n_layers, -1).sum(1).sqrt()
    by = length * lengths.float()[:, None] * own - world.scale[:, None] * world.offset.float()
    return Changed(world, lambda x, _: x + by[:, None], f"offsets of {length}")


def answered(spec: planted.PlantedSpec, source: ActivationSource) -> pd.DataFrame:
    """`surrogates.measured` of the dictionary that is trained on a source."""
    trained = train.train(spec.run, source, description=source.name)
    return surrogates.measured(source, trained.sae.eval(), progress=False)


def controls(spec: planted.PlantedSpec) -> dict[str, pd.DataFrame]:
    """What the surrogates say of worlds that are made of a planted one.

    Returns:
        ``moments``: one row per ``world`` (`WORLDS`), ``vectors`` (`OWN`, or `SURROGATE`: of the
        moments of that world's vectors, drawn anew) and ``measure`` with its ``value``.
        ``offsets``: the same of `APART`, each with and without its layers' means.
    """
    world = planted.World(spec)
    moments, offsets = [], []
    for name, share in WORLDS.items():
        own = blend(world, share)
        for vectors, source in ((OWN, own), (SURROGATE, redrawn(own))):
            moments.append(answered(spec, source).assign(world=name, vectors=vectors))
    for name, length in APART.items():
        own = displaced(world, length)
        for vectors, source in ((OWN, own), (CENTRED, surrogates.centred(own, own))):
            offsets.append(answered(spec, source).assign(world=name, vectors=vectors))
    columns = ["world", "vectors", "measure", "value"]
    tables = {"moments": moments, "offsets": offsets}
    return {name: pd.concat(parts)[columns] for name, parts in tables.items()}


planted.MEASURED["controls"] = controls
store.STAGES["controls"] = 1


def seeds(
    spec: planted.PlantedSpec,
    values: Sequence[int],
    mode: Literal["cached", "read-only"] = "cached",
) -> dict[str, pd.DataFrame]:
    """`controls` of worlds that differ in their seed, the first column; and ``provenance``."""
    return planted.worlds(spec, "seed", values, mode, "controls")


# --- finished tables for the chapter --------------------------------------------------------------

DIFFERENCE = "difference"
#: The measures that are shown.
SHOWN = (
    "Eq. 11, latents", "Eq. 12, latents", "Eq. 11, tokens", "Eq. 12, tokens",
    "single", "survival", "survival, shuffled", "fvu",
)  # fmt: skip


def compared(table: pd.DataFrame) -> pd.DataFrame:
    """A table of `seeds` over its seeds: means, with 95 % intervals of trainings (Student's t).

    Returns:
        One row per ``world``, ``measure`` and ``vectors``, with ``value``, ``low`` and ``high``;
        last the `DIFFERENCE` that the other vectors make, taken seed by seed.
    """
    rows = []
    for (world, measure), part in table.groupby(["world", "measure"], sort=False):
        wide = part.pivot_table("value", "seed", "vectors", sort=False)
        wide[DIFFERENCE] = wide.iloc[:, 1] - wide.iloc[:, 0]
        for vectors in wide:
            row = {"world": world, "measure": measure, "vectors": vectors}
            rows.append(row | carried.over_trainings(wide[vectors].tolist()))
    return pd.DataFrame(rows)


def differences(table: pd.DataFrame) -> pd.DataFrame:
    """Of `compared`, the rows of `DIFFERENCE` and of `SHOWN`."""
    return table[(table.vectors == DIFFERENCE) & table.measure.isin(SHOWN)]


def in_numbers(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """`compared` as text: one row per ``world`` and ``vectors``, one column for each of `SHOWN`: the
    mean, and of the difference the ends of its interval."""
    shown = [
        between(row.value, row.low, row.high, digits)
        if row.vectors == DIFFERENCE
        else f"{row.value:.{digits}f}"
        for row in table.itertuples()
    ]
    wide = table.assign(text=shown).pivot_table(
        "text", ["world", "vectors"], "measure", aggfunc="first", sort=False
    )
    return wide[list(SHOWN)].rename_axis(columns=None)
