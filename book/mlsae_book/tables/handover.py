"""Whether features that turn from layer to layer are seen to be handed on, where that is known."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pandas as pd
import torch

from mlsae_book import planted
from mlsae_book.tables import latents
from mlsae_core import metrics, store
from mlsae_core.sae import MLSAE


def handover(world: planted.World, sae: MLSAE) -> pd.DataFrame:
    """Whether `latents.duplicates` sees that features which turn are handed on, as is known here.

    Returns:
        `latents.drift_summary` of all latents concentrated at one layer (``pair``: all), and of
        those that with their most similar latent are of one feature (both have a cosine similarity
        of `planted.RECOVERED` or more with one of its directions), or of no one.
    """
    found = latents.duplicates(world, sae, planted.EVALUATION_SEQUENCES, progress=False)
    rows, features = sae.decoder.detach(), world.directions.transpose(0, 1)
    similar = torch.stack([metrics.mmcs_between(rows, of)[2] for of in features], 1)
    similarity, nearest = similar.max(1)
    of_none = torch.arange(-len(rows), 0)  # a number of its own for each latent
    feature = nearest.where(similarity >= planted.RECOVERED, of_none).numpy()
    alike = feature[found.latent] == feature[found.partner]
    parts = {"all": found, "one feature": found[alike], "not of one feature": found[~alike]}
    return pd.concat(
        [
            latents.drift_summary(part, (-1.0,)).drop(columns="cosine").assign(pair=pair)
            for pair, part in parts.items()
        ],
        ignore_index=True,
    )


def _handed_on(spec: planted.PlantedSpec) -> dict[str, pd.DataFrame]:
    return {"handover": handover(*planted.learn(spec))}


planted.MEASURED["handover"] = _handed_on
store.STAGES["handover"] = 1


def turned(
    spec: planted.PlantedSpec,
    angles: Sequence[float],
    mode: Literal["cached", "read-only"] = "cached",
) -> pd.DataFrame:
    """`handover` of worlds that differ in their drift, the first column."""
    return planted.worlds(spec, "drift", angles, mode, "handover")["handover"]
