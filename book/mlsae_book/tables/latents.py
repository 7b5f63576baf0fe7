"""Latents by their directions: the tokens and the other latents that they resemble."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_core.activations import ActivationSource, one_pass
from mlsae_core.metrics import LayerDistribution, mmcs
from mlsae_core.resume import Pass
from mlsae_core.sae import MLSAE

#: Activity flags held at a time, over layers, tokens and latents or pairs.
FLAGS_AT_ONCE = 2**25


@torch.no_grad()
def duplicates(
    source: ActivationSource,
    sae: MLSAE,
    size: int = 8,
    *,
    null_draws: int = 8,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    """Whether the most similar latent takes over where a latent stops: duplicates or drift.

    Were a feature that turns from layer to layer split into latents, one for each stretch of
    layers, then a latent's most similar other latent would live at a neighbouring layer, and at
    tokens where the one is active at a layer, the other would be active at the next or the one
    before. The null is the same with partners dealt anew among the latents, which keeps how often
    each partner is active, and where (a latent meets itself in one of n_latents deals).

    Args:
        size: sequences that are read at a time.
        null_draws: how many times partners are dealt anew.
        checkpoint: file to continue from if it exists, and to write every minute.

    Returns:
        One row per latent that is active in this text: ``partner``, the latent with the largest
        cosine similarity of decoder rows, ``cosine``; ``mean_layer`` E[L | j], ``peak_layer`` and
        ``peak`` (largest P(ℓ | j), and where), and the same of the partner (``partner_…``, nan if
        it is never active); layers count from 0 within the site. Fractions of the (token, layer)
        pairs at which the latent is active: ``next`` (the partner is active at the next layer),
        ``previous``, ``same`` (at this one), ``self_next`` (the latent itself is active at the
        next); each over the pairs that have such a layer. ``null_next``, ``null_previous``,
        ``null_same``: means over the draws. ``active``: pairs at all layers; ``tokens`` read.

    Raises:
        SpecError: a stacked site.
        ValueError: an empty source.
    """
    source.site.refuse_stacked("the layers of a latent")
    n, latents = len(source.site.indices(source.n_layers)), sae.n_latents
    device = source.device
    similar = mmcs(sae.decoder)
    partners = [similar.indices]
    generator = torch.Generator().manual_seed(0)
    for _ in range(null_draws):
        dealt = torch.randperm(latents, generator=generator).to(device)
        partners.append(similar.indices[dealt])
    found = LayerDistribution(n, latents, device=device)
    # of each draw: pairs at which the partner is active at the next, the previous, the same layer
    both = torch.zeros(1 + null_draws, 3, latents, dtype=torch.int64, device=device)
    own = torch.zeros(latents, dtype=torch.int64, device=device)
    done = Pass(checkpoint, size, device, found=found, both=both, own=own)
    batches = source.batches(size, None, done.first)
    for batch in one_pass(batches, source, size, "duplicates", progress, done):
        values, indices = sae.encode(batch.source)
        found.update(indices, values)
        step = max(1, FLAGS_AT_ONCE // (n * latents))
        for v, i in zip(values.split(step, 1), indices.split(step, 1), strict=True):
            flags = torch.zeros(*v.shape[:2], latents, dtype=torch.bool, device=v.device)
            flags.scatter_(-1, i, v > 0)
            own += _active_too(i[:-1], v[:-1], flags[1:], None)
            for row, partner in zip(both, partners, strict=True):
                row[0] += _active_too(i[:-1], v[:-1], flags[1:], partner)
                row[1] += _active_too(i[1:], v[1:], flags[:-1], partner)
                row[2] += _active_too(i, v, flags, partner)
    return _pair_table(found.compute(), similar, both.cpu(), own.cpu())


def _active_too(indices: Tensor, values: Tensor, flags: Tensor, partner: Tensor | None) -> Tensor:
    """(latent,): vectors at which a latent is active and its partner, or itself, in `flags`."""
    other = indices if partner is None else partner[indices]
    hit = flags.gather(-1, other) & (values > 0)
    return torch.bincount(indices[hit], minlength=flags.shape[-1])


def _pair_table(result, similar, both: Tensor, own: Tensor) -> pd.DataFrame:
    counts = result.counts.double().cpu()
    bases = torch.stack([counts[:-1].sum(0), counts[1:].sum(0), counts.sum(0)])
    shares = both / bases
    peak, where = result.probs.cpu().max(0)
    layers = {"mean_layer": result.mean_layer.cpu(), "peak_layer": where.double(), "peak": peak}
    live = result.live.cpu()
    for name, column in layers.items():
        layers[name] = column.masked_fill(~live, torch.nan)
    partner = similar.indices.cpu()
    columns = {"partner": partner, "cosine": similar[2].cpu(), **layers}
    columns |= {f"partner_{name}": column[partner] for name, column in layers.items()}
    names = ("next", "previous", "same")
    columns |= {name: shares[0, row] for row, name in enumerate(names)}
    columns["self_next"] = own / bases[0]
    nulls = shares[1:].mean(0)
    columns |= {f"null_{name}": nulls[row] for row, name in enumerate(names)}
    table = pd.DataFrame({name: column.numpy() for name, column in columns.items()})
    table.insert(0, "latent", np.arange(len(table)))
    table["active"], table["tokens"] = counts.sum(0).long().numpy(), result.tokens
    return table[live.numpy()].astype({"peak_layer": int}).reset_index(drop=True)


# --- finished tables for charts ---------------------------------------------------------------


def sharpest(arrays: dict[str, Tensor], layer: int, least: int = 1000) -> int:
    """The latent with the largest P(layer | latent), among those active at so many tokens."""
    probs = arrays["probs"][layer].nan_to_num()
    common = arrays["active_tokens"] >= least
    return int(probs.where(common, probs - 1).argmax())


def most_alike(pairs: pd.DataFrame, most: int = 10, decimals: int = 3) -> pd.DataFrame:
    """The rows of `duplicates` with the largest cosine similarities, rounded as they are shown.

    Rows whose similarity is equal as shown, such as two latents each nearest to the other, stand
    in the order of their latents.
    """
    return pairs.round(decimals).sort_values(["cosine", "latent"], ascending=[False, True])[:most]


def drift_summary(table: pd.DataFrame, cosines: Sequence[float] = (0.0, 0.3, 0.5, 0.7)):
    """Who the most similar latent is, for latents concentrated at one layer (`peak` ≥ 1/2).

    Args:
        table: of `duplicates`.
        cosines: lower ends of the classes of cosine similarity; the last one has no upper end.

    Returns:
        One row per class: ``cosine`` (its name), ``latents``; the fractions of them whose partner
        peaks at the ``same_layer``, at a ``neighbouring`` layer or ``further`` away, and of the
        first two what is expected of partners dealt anew within the class (``null_…``); the means
        of ``next``, ``previous``, ``same`` and of their nulls.
    """
    sharp = table[(table.peak >= 0.5) & table.partner_peak.notna()]
    ends = [*cosines[1:], np.inf]
    rows = []
    for low, high in zip(cosines, ends, strict=True):
        part = sharp[(sharp.cosine >= low) & (sharp.cosine < high)]
        distance = (part.peak_layer - part.partner_peak_layer).abs()
        name = f"{low:g} to {high:g}" if np.isfinite(high) else f"{low:g} and more"
        row = {"cosine": name, "latents": len(part)}
        row |= {"same_layer": (distance == 0).mean(), "neighbouring": (distance == 1).mean()}
        row["further"] = (distance > 1).mean()
        # dealt anew, any of these partners could be with any of these latents
        dealt = np.subtract.outer(part.peak_layer.to_numpy(), part.partner_peak_layer.to_numpy())
        for name, wanted in (("null_same_layer", 0), ("null_neighbouring", 1)):
            row[name] = (abs(dealt) == wanted).mean() if len(part) else np.nan
        names = [f"{kind}{name}" for name in ("next", "previous", "same") for kind in ("", "null_")]
        rows.append(row | part[names].mean().to_dict())
    return pd.DataFrame(rows)


def handover_table(summary: pd.DataFrame) -> pd.DataFrame:
    """`drift_summary` as a chart wants it: one row per (cosine, where, pair) with ``fraction``."""
    rows = []
    for kind in ("next", "previous", "same"):
        for column, pair in ((kind, "most similar latent"), (f"null_{kind}", "latent at random")):
            part = pd.DataFrame({"cosine": summary["cosine"], "fraction": summary[column]})
            rows.append(part.assign(where=f"{kind} layer", pair=pair))
    return pd.concat(rows, ignore_index=True).dropna()
