"""Where in a sequence vectors stand, and which of them are massive: what it does to metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd
import torch

from mlsae_core.activations import TextSource, one_pass
from mlsae_core.metrics import Groups
from mlsae_core.sae import MLSAE
from mlsae_core.store import Artefact


def by_position(
    source: TextSource, sae: MLSAE, size: int = 8, *, progress: bool = True
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Metrics by position in the sequence, with and without the tokens of massive activations.

    Positions are pooled by powers of two: 0, 1, 2 to 3, 4 to 7 and so on. A token has a massive
    activation if `activations.massive` finds one at any layer, and is then left out at every layer.

    Args:
        source: not stacked; all tokens are read, whatever its site excludes.
        size: sequences that are read at a time.

    Returns:
        Groups: one row per layer and group, with ``first`` and ``last`` (positions, both
        included), ``massive`` (``kept``: all tokens, ``excluded``: without those), ``tokens`` and
        the numbers of `metrics.GroupsResult`. ``share`` and ``fvu`` are each about the mean of the
        tokens that are kept there. All positions together are a group of their own.
        Massive: one row per layer, with ``vectors`` that are massive, of ``tokens``; ``at_first``,
        how many of them stand at position 0; ``sequences`` that have one, of ``of`` all; the mean
        ``norm`` of these vectors, and ``norm_of_others``.

    Raises:
        SpecError: a stacked site.
    """
    source.site.refuse_stacked("metrics by position")
    source = replace(source, site=replace(source.site, massive="kept"))
    layers = source.site.indices(source.n_layers)
    ends, found, rows = None, None, []
    passes = one_pass(source.marked(size), source, size, "positions", progress)
    for batch, massive in passes:
        if found is None:
            ends = bins(batch.text.shape[1])
            found = Groups(2 * len(ends), len(layers), source.d_model, sae.n_latents, source.device)
        starts = torch.tensor([first for first, _ in ends], device=source.device)
        group = torch.bucketize(batch.position, starts, right=True) - 1
        recon, (values, indices) = sae(batch.source)
        group = group + len(ends) * massive.any(0)
        found.update(batch.source, recon, indices, values, group)
        norms = torch.linalg.vector_norm(batch.source, dim=-1)
        rows.append(_massive(norms, massive, batch))
    groups = []
    plain, sinks = range(len(ends)), range(len(ends), 2 * len(ends))
    for name, members in (
        ("kept", [*zip(plain, sinks, strict=True)]),
        ("excluded", [(group,) for group in plain]),
    ):
        by_group, together = found.pooled(members), found.pooled([sum(members, ())])
        for part, places in ((by_group, ends), (together, [(0, ends[-1][1])])):
            result = part.compute()
            for number, (first, last) in enumerate(places):
                columns = {
                    key: value[number].tolist() if value.ndim == 2 else int(value[number])
                    for key, value in result._asdict().items()
                }
                place = {"layer": layers, "first": first, "last": last, "massive": name}
                groups.append(pd.DataFrame(place | columns))
    sums = torch.stack(rows).sum(0)
    vectors, at_first, sequences, norm, others, count = sums.unbind()
    massive = pd.DataFrame(
        {
            "layer": layers,
            "vectors": vectors.long().tolist(),
            "tokens": (vectors + count).long().tolist(),
            "at_first": at_first.long().tolist(),
            "sequences": sequences.long().tolist(),
            "of": source.n_sequences,
            "norm": (norm / vectors).tolist(),
            "norm_of_others": (others / count).tolist(),
        }
    )
    return pd.concat(groups, ignore_index=True), massive


def bins(context: int) -> list[tuple[int, int]]:
    """First and last positions of the groups of a sequence: 0, 1, 2 to 3, 4 to 7, and so on."""
    starts = [0, *(2**power for power in range(math.ceil(math.log2(max(context, 1)))))]
    return [(a, b - 1) for a, b in zip(starts, [*starts[1:], context], strict=True)]


def _massive(norms: torch.Tensor, massive: torch.Tensor, batch) -> torch.Tensor:
    """Sums over a batch of what the second table of `by_position` is made of, (6, layer)."""
    first = massive & (batch.position == 0)
    seen = massive.new_zeros(len(massive), len(batch.text), dtype=torch.long)
    seen.index_add_(1, batch.sequence, massive.long())
    parts = (massive, first, seen > 0, norms * massive, norms * ~massive, ~massive)
    return torch.stack([part.double().sum(1) for part in parts])


def both_ways(
    excluded: pd.DataFrame, kept: pd.DataFrame, layers: Sequence[int], metrics: Sequence[str]
) -> pd.DataFrame:
    """Tables of one row per layer, without massive activations and with them, beside each other.

    Returns:
        One row per metric that both have: ``metric``, and ``excluded`` and ``kept`` as the mean
        over layers and at each of `layers`, named ``mean, excluded`` and so on.
    """
    rows = []
    for name in (metric for metric in metrics if metric in excluded and metric in kept):
        row: dict = {"metric": name}
        for way, table in (("excluded", excluded), ("kept", kept)):
            by_layer = table.set_index("layer")[name]
            row[f"mean, {way}"] = by_layer.mean()
            row |= {f"layer {layer}, {way}": by_layer[layer] for layer in layers}
        order = [f"{place}, {way}" for place in _places(layers) for way in ("excluded", "kept")]
        rows.append({"metric": name} | {column: row[column] for column in order})
    return pd.DataFrame(rows)


def _places(layers: Sequence[int]) -> list[str]:
    return ["mean", *(f"layer {layer}" for layer in layers)]


def drift_both_ways(excluded: Artefact, kept: Artefact, layers: Sequence[int]) -> pd.DataFrame:
    """`both_ways` of two results of the stage ``drift``: norms, and similarities to the next layer.

    Returns:
        The rows ``norm``, and ``centred`` and ``raw``, the cosine similarity of a layer and the
        next one.
    """
    parts = []
    for file, names in (("layers.csv", ["norm"]), ("pairs.csv", ["centred", "raw"])):
        pair = [pd.read_csv(made.file(file)) for made in (excluded, kept)]
        if "other" in pair[0]:
            pair = [table[table.other == table.layer + 1] for table in pair]
        parts.append(both_ways(*pair, layers, names))
    return pd.concat(parts, ignore_index=True)
