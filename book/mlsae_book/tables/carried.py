"""What it means that a latent is active at several layers: survival, margins and ablations.

`persistence` asks at how many layers a latent is active at one token and how many latents survive a
block, beside null models that keep what a residual stream is, a sum; and what of it is left when
TopK's margin is taken away. `effects` takes a latent out and asks what becomes of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from statistics import fmean, stdev
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor

from mlsae_book.tables import between, interventions
from mlsae_core.activations import ActivationSource, TextSource, one_pass
from mlsae_core.metrics import (
    Effects,
    LayerDistribution,
    Persistence,
    Survival,
    basic_interval,
    drifted,
    gaussian_like,
    hysteresis,
    layers_of_pairs,
    of_batch,
    permute_tokens,
    random_updates,
    shuffled_updates,
)
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SpecError

BLOCKS = 64  # of sequences, to resample
WIDE = 4  # times k: how far the largest latents beyond the selected ones are looked at
MEASURED = "measured"
#: Null models that know of no residual stream.
APART = ("another token at each layer", "Gaussian vectors")
#: Null models of a block: name → what takes the place of later layers, given the stream.
UPDATES = {"another token's updates": shuffled_updates, "random directions": random_updates}
#: What is done to the selection, with the dictionary fixed; k is the dictionary's own.
MARGINS = (
    "k / 4", "k / 2", "k", "2 k", "4 k", "one threshold for all layers", "on at k, off at 4 k",
)  # fmt: skip
RATIOS = {"ratio_latent": "Eq. 11", "ratio_token": "Eq. 12"}


# --- survival and margins -------------------------------------------------------------------------


@torch.no_grad()
def persistence(
    source: ActivationSource,
    sae: MLSAE,
    size: int = 8,
    *,
    replicates: int = 1000,
    progress: bool = True,
) -> dict[str, pd.DataFrame]:
    """At how many layers latents are active at one token, and how many survive a block.

    Null models: ``another token at each layer`` and ``Gaussian vectors`` (`metrics.permute_tokens`,
    `metrics.gaussian_like`), which know of no residual stream; and streams that start at the first
    layer and take updates of `UPDATES` in the place of their own. All in one pass.

    Args:
        size: sequences that are read at a time, among whose tokens updates are shuffled.
        replicates: bootstrap replicates over blocks of sequences, for 95 % intervals.

    Returns:
        ``layers``: one row per (``of``, ``layers``): the ``share`` of the pairs (token, latent)
        active at exactly so many layers, ``low``, ``high``; of the measured codes, null models and
        `MARGINS`. ``pairs``: one row per ``of``: ``l0``, ``single`` (share at one layer), ``mean``
        (layers), each with ends of its interval, and ``contiguous``. ``survival``: one row per
        (``gap`` of `gaps`, ``layer``, ``of``): ``rate`` P(active at layer + gap | active at
        layer), ``excess`` (what the measured one is above it), with ends. ``latents``: of each
        block, the share of latents (active at 100 tokens or more) that survive more and less often
        than with another token's updates, beyond two standard errors, and quantiles of the
        difference. ``ranks``: of pairs active at one layer and of the others, the share by rank
        there, and by best rank at a neighbouring layer (beyond the last: 4 k + 1). ``ratios``:
        Eq. 11 and 12 under both P(J), with and without the bias of few tokens, of the measured
        codes and null models.

    Raises:
        SpecError: a stacked site, or an activation other than TopK, which has no k to change.
    """
    check(source, sae)
    n, k, device = len(source.site.indices(source.n_layers)), sae.k, source.device
    shape = n, sae.n_latents, BLOCKS, device
    nulls = (*APART, *UPDATES)
    pairs = {of: Persistence(*shape) for of in (MEASURED, *nulls, *MARGINS)}
    spread = {of: LayerDistribution(*shape) for of in (MEASURED, *nulls)}
    survival = {
        (gap, of): Survival(n - gap, *shape[1:]) for gap in gaps(n) for of in (MEASURED, *UPDATES)
    }
    active = dict.fromkeys(pairs, 0)
    ranks = torch.zeros(2, 2, WIDE * k + 1, dtype=torch.float64)
    tokens, first = 0, 0
    generator = torch.Generator().manual_seed(0)
    for batch in one_pass(source.batches(size), source, size, "persistence", progress):
        x, sequence = batch.source, batch.sequence + first
        tokens, first = tokens + x.shape[1], first + len(batch.text)
        wide = largest(sae, x, WIDE * k)
        own = tuple(part[..., :k] for part in wide)
        codes = {MEASURED: own, APART[0]: permute_tokens(*own, generator)}
        codes[APART[1]] = coded(sae, gaussian_like(x, generator))
        for of, update in UPDATES.items():
            null = drifted(x, partial(update, generator=generator))
            codes[of] = coded(sae, null)
        for of, found in codes.items():
            spread[of].update(*found, sequence)
        codes |= selected(*wide, k)
        for of, (indices, values) in codes.items():
            pairs[of].update(indices, values, sequence)
            active[of] += int((values > 0).sum())
        for (gap, of), total in survival.items():
            before, after = (tuple(part[rows] for part in own) for rows in _rows(gap))
            if of != MEASURED:
                after = coded(sae, UPDATES[of](x, generator, gap))
            total.update(before, after, sequence)
        ranks += _ranks(*wide, k)
    return {
        "layers": _layers(pairs, replicates),
        "pairs": _pairs(pairs, replicates, {of: a / (tokens * n) for of, a in active.items()}),
        "survival": _survival(survival, replicates),
        "latents": _by_latent(survival, n),
        "ranks": _rank_table(ranks),
        "ratios": _ratios(spread, replicates),
    }


def check(source: ActivationSource, sae: MLSAE):
    """Refuse what has no layers or no k to change.

    Raises:
        SpecError: a stacked site, or an activation other than TopK.
    """
    source.site.refuse_stacked("distributions over layers")
    if sae.activation.name != "topk" or WIDE * sae.k > sae.n_latents:
        raise SpecError(
            f"sae.activation: expected topk with at least {WIDE} · k latents, got "
            f"{sae.activation.name} with k = {sae.k} of {sae.n_latents} latents"
        )


def gaps(n_layers: int) -> list[int]:
    """Over how many blocks survival is followed: up to 5, and from there on twice as many each."""
    return [gap for gap in (1, 2, 3, 4, 5, 10, 20, 40, 80) if gap < n_layers]


def _rows(gap: int) -> tuple[slice, slice]:
    return slice(None, -gap), slice(gap, None)


def coded(sae: MLSAE, x: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values of the active latents, each (…, k)."""
    values, indices = sae.encode(x)
    return indices, values


def largest(sae: MLSAE, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Indices and values of the k largest latents, the largest first."""
    wide = copy.copy(sae)  # of the same parameters
    wide.k = k
    values, indices = wide.encode(x)
    values, order = values.sort(dim=-1, descending=True, stable=True)
    return indices.gather(-1, order), values


def selected(indices: Tensor, values: Tensor, k: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The codes that each of `MARGINS` makes of the 4 k largest latents."""
    sizes = max(k // 4, 1), max(k // 2, 1), k, 2 * k, 4 * k
    found = {
        name: (indices[..., :s], values[..., :s]) for name, s in zip(MARGINS, sizes, strict=False)
    }
    found[MARGINS[5]] = of_batch(indices, values, k)
    found[MARGINS[6]] = hysteresis(indices, values, k, len(indices))
    return found


def _ranks(indices: Tensor, values: Tensor, k: int) -> Tensor:
    """Pairs active at one layer, and at several: by rank where they are active, and by their best
    rank at a neighbouring layer; (2, 2, 4 k + 1), rank 1 first."""
    held, place = layers_of_pairs(indices, values > 0)
    beyond = indices.shape[2]
    rank = torch.full(held.shape, beyond, device=held.device)
    layer = torch.arange(len(indices), device=indices.device)[:, None, None].expand_as(indices)
    number = torch.arange(beyond, device=indices.device).expand_as(indices)
    there = place >= 0
    rank[place[there], layer[there]] = number[there]
    on = rank < k
    several = (on.sum(1) > 1).long()
    padded = torch.nn.functional.pad(rank, (1, 1), value=beyond)
    neighbour = torch.minimum(padded[:, :-2], padded[:, 2:])
    counts = torch.zeros(2, 2, beyond + 1, dtype=torch.float64)
    for row, found in enumerate((rank, neighbour)):
        cell = several[:, None] * (beyond + 1) + found
        total = torch.bincount(cell[on], minlength=2 * (beyond + 1)).cpu()
        counts[:, row] = total.view(2, -1)
    return counts


# --- tables ---------------------------------------------------------------------------------------


def interval(value: Tensor | float, replicates: Tensor, name: str = "") -> dict:
    """A number and the ends of its 95 % interval, as columns ``value`` or ``name``, …"""
    ends = basic_interval(float(value), replicates.cpu())
    return {name or "value": float(value)} | dict(zip(ends_of(name), ends, strict=True))


def ends_of(name: str) -> tuple[str, str]:
    return (f"{name}_low", f"{name}_high") if name else ("low", "high")


#: 97.5 % quantiles of Student's t by degrees of freedom.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}


def over_trainings(values: Sequence[float], name: str = "") -> dict:
    """The mean of trainings that differ in their seed, and the ends of its 95 % interval (Student's
    t), as columns as of `interval`.

    Raises:
        SpecError: other than 2 to 5 trainings.
    """
    n = len(values)
    if n - 1 not in STUDENT:
        raise SpecError(f"seed: expected 2 to {len(STUDENT) + 1} trainings, got {n}")
    mean, by = fmean(values), STUDENT[n - 1] * stdev(values) / n**0.5
    return {name or "value": mean} | dict(zip(ends_of(name), (mean - by, mean + by), strict=True))


def same_draws() -> torch.Generator:
    """The same replicates for whatever is compared."""
    return torch.Generator().manual_seed(1)


def _layers(pairs: dict[str, Persistence], replicates: int) -> pd.DataFrame:
    rows = []
    for of, total in pairs.items():
        shares, drawn = total.compute().layers, total.bootstrap(replicates, same_draws())[0]
        for i, share in enumerate(shares):
            low, high = basic_interval(share.item(), drawn[:, i])
            rows.append(
                {"of": of, "layers": i + 1, "share": share.item(), "low": low, "high": high}
            )
    return pd.DataFrame(rows)


def _pairs(pairs: dict[str, Persistence], replicates: int, l0: dict[str, float]) -> pd.DataFrame:
    rows = []
    for of, total in pairs.items():
        found, (layers, mean, _) = total.compute(), total.bootstrap(replicates, same_draws())
        row = {"of": of, "pairs": found.pairs, "l0": l0[of]}
        row |= interval(found.layers[0], layers[:, 0], "single")
        row |= interval(found.mean_layers, mean, "mean")
        rows.append(row | {"contiguous": found.contiguous})
    return pd.DataFrame(rows)


def _survival(survival: dict[tuple[int, str], Survival], replicates: int) -> pd.DataFrame:
    rows = []
    for (gap, of), total in survival.items():
        measured = survival[gap, MEASURED]
        drawn, ours = (s.bootstrap(replicates, same_draws()) for s in (total, measured))
        excess, excesses = measured.compute().rate - total.compute().rate, ours - drawn
        for layer, rate in enumerate(total.compute().rate):
            low, high = basic_interval(rate.item(), drawn[:, layer].cpu())
            row = {"gap": gap, "layer": layer, "of": of, "rate": rate.item()}
            row |= {"low": low, "high": high}
            rows.append(row | interval(excess[layer], excesses[:, layer], "excess"))
    return pd.DataFrame(rows)


def _by_latent(survival: dict[tuple[int, str], Survival], n: int, least: int = 100) -> pd.DataFrame:
    rows = []
    for of in UPDATES:
        measured, null = (survival[1, name].compute() for name in (MEASURED, of))
        for layer in range(n - 1):
            often = measured.active[layer] >= least
            rates = [r.rate_by_latent[layer, often] for r in (measured, null)]
            tokens, difference = measured.active[layer, often], rates[0] - rates[1]
            error = (sum(r * (1 - r) for r in rates) / tokens).sqrt()
            row = {"layer": layer, "of": of, "latents": int(often.sum())}
            if len(difference):
                row |= {"more": float((difference > 2 * error).double().mean())}
                row |= {"less": float((difference < -2 * error).double().mean())}
                for q in (5, 25, 50, 75, 95):
                    row[f"q{q:02}"] = float(difference.quantile(q / 100))
            rows.append(row)
    return pd.DataFrame(rows)


def _rank_table(ranks: Tensor) -> pd.DataFrame:
    rows = []
    for of, both in zip(("one layer", "several layers"), ranks, strict=True):
        for where, counts in zip(("there", "neighbour"), both, strict=True):
            shares = (counts / counts.sum()).tolist()
            rows += [(of, where, rank, share) for rank, share in enumerate(shares, 1)]
    return pd.DataFrame(rows, columns=["of", "where", "rank", "share"])


def _ratios(spread: dict[str, LayerDistribution], replicates: int) -> pd.DataFrame:
    rows = []
    for of, total in spread.items():
        for weighting in ("latents", "tokens"):
            for corrected in (False, True):
                found = total.variances(weighting, corrected)
                drawn = total.bootstrap(replicates, same_draws(), weighting, corrected)
                for name, ratio in RATIOS.items():
                    row = {"of": of, "ratio": ratio, "weighting": weighting, "corrected": corrected}
                    rows.append(row | interval(getattr(found, name), getattr(drawn, name)))
    return pd.DataFrame(rows)


# --- carried, recomputed or amplified -------------------------------------------------------------


class Sample(NamedTuple):
    """Vectors of one token each over the layers, and what becomes of them when one is changed."""

    x: Tensor
    """(layer, sample, d_model), every layer of the model."""
    sequence: Tensor
    """(sample,), the sequence that each is from."""
    after: Callable[[int, Tensor], Tensor]
    """(layer, changed vectors (choice, sample, d_model) there) → the stream at the same tokens at
    all later layers, (later layer, choice, sample, d_model)."""


#: What is taken out: the latent itself, or as much of something else.
TAKEN = ("the latent", "another active latent", "a random direction")
#: Where a latent is at home, E[L | j], as seen from the layer at which it is taken out.
HOMES = ("earlier", "here", "later")
AFTER = ("active there", "not active there")


@torch.no_grad()
def effects(
    samples: Iterable[Sample],
    sae: MLSAE,
    mean_layer: Tensor,
    *,
    replicates: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """What becomes of a latent at later layers when it is taken out: see `metrics.Effects`.

    At each layer but the last and each sample, one of the active latents is drawn and taken out of
    the vector, x − h σ w; as a null model, as long a piece of another active latent's row or of a
    random direction. Its activation a is read at later layers before TopK.

    Args:
        mean_layer: E[L | j] of each latent, (latent,), nan for latents that are never active.

    Returns:
        One row per ``taken`` (see `TAKEN`), ``after`` (whether the latent is among the k there,
        nothing being taken out), ``home`` (``all`` or one of `HOMES`), ``layer`` (−1: all) and
        ``gap``: ``samples``, ``activation`` (mean a), ``total`` (ρ), ``direct`` (δ) and ``blocks``
        (ρ − δ), each with the ends of its 95 % interval over sequences. Groups of fewer than 100
        samples are left out.
    """
    generator, found, n = torch.Generator().manual_seed(seed), None, 0
    for sample in samples:
        n = len(sample.x)
        shape = n, n, len(TAKEN), len(AFTER), len(HOMES)  # layer, gap, …
        numbers = torch.arange(torch.Size(shape).numel()).view(shape)
        found = Effects(numbers.numel(), BLOCKS) if found is None else found
        values, indices = sae.encode(sample.x)
        for layer in range(n - 1):
            x = sample.x[layer]
            drawn = _two_active(values[layer], generator)
            latent, other = indices[layer].gather(1, drawn).unbind(1)
            height = values[layer].gather(1, drawn)
            home = ((mean_layer[latent] - layer).clamp(-1, 1).round() + 1).nan_to_num(1).long()
            std = sae.standardise(x)[1].std
            taken = height[:, :1] * (1 if std is None else std) * sae.decoder[latent]
            size = torch.linalg.vector_norm(taken, dim=-1, keepdim=True)
            noise = torch.randn(x.shape, generator=generator).to(x)
            noise *= size / torch.linalg.vector_norm(noise, dim=-1, keepdim=True)
            less = torch.stack([taken, size * sae.decoder[other], noise])
            later = sample.after(layer, x - less)
            for gap, run in enumerate(later, 1):
                there = sample.x[layer + gap]
                a = score(sae, there, latent)
                now = (indices[layer + gap] == latent[:, None]) & (values[layer + gap] > 0)
                after = (~now.any(1)).long()
                kept = score(sae, there - less, latent)
                for choice, (with_model, without) in enumerate(
                    zip(score(sae, run, latent), kept, strict=True)
                ):
                    group = numbers[layer, gap, choice][after.cpu(), home.cpu()]
                    group = torch.where((height > 0).all(1).cpu(), group, -1)
                    found.update(
                        a.cpu(), with_model.cpu(), without.cpu(), group, sample.sequence.cpu()
                    )
    return _effects_table(found, n, replicates)


def _two_active(values: Tensor, generator: torch.Generator) -> Tensor:
    """Places of two different latents of each vector (sample, k), active ones if there are two."""
    chance = torch.rand(values.shape, generator=generator).to(values.device)
    return (chance + (values > 0)).topk(2).indices


def score(sae: MLSAE, x: Tensor, latent: Tensor) -> Tensor:
    """The activation of one latent for each vector before ReLU and TopK.

    Args:
        x: (…, sample, d_model). latent: (sample,).

    Returns:
        (…, sample).
    """
    scaled = sae.standardise(x)[0] - sae.pre_bias
    bias = 0 if sae.encoder_bias is None else sae.encoder_bias[latent]
    return (scaled * sae.encoder[latent]).sum(-1) + bias


def _effects_table(found: Effects, n: int, replicates: int, least: int = 100) -> pd.DataFrame:
    shape = n, n, len(TAKEN), len(AFTER), len(HOMES)
    numbers = torch.arange(found.shape[0]).view(shape)
    rows = []
    for layers in (None, *range(n - 1)):
        for homes in (None, *range(len(HOMES))):
            part = torch.full(shape, -1)
            chosen = (
                slice(None) if layers is None else slice(layers, layers + 1),
                slice(None), slice(None), slice(None),
                slice(None) if homes is None else slice(homes, homes + 1),
            )  # fmt: skip
            part[chosen] = numbers[0, :, :, :, :1].expand_as(part[chosen])
            pooled = found.pooled(part.flatten())
            result, drawn = pooled.compute(), pooled.bootstrap(replicates, same_draws())
            for gap in range(1, n):
                for choice, after in torch.cartesian_prod(*map(torch.arange, shape[2:4])).tolist():
                    group = int(numbers[0, gap, choice, after, 0])
                    samples = int(pooled.samples[group])
                    if samples < least:
                        continue
                    row = {
                        "taken": TAKEN[choice],
                        "after": AFTER[after],
                        "home": "all" if homes is None else HOMES[homes],
                        "layer": -1 if layers is None else layers,
                        "gap": gap,
                        "samples": samples,
                        "activation": float(result.activation[group]),
                    }
                    for name in ("total", "direct"):
                        value, draws = getattr(result, name)[group], getattr(drawn, name)[:, group]
                        row |= interval(value, draws, name)
                    blocks = [r.total[..., group] - r.direct[..., group] for r in (result, drawn)]
                    rows.append(row | interval(*blocks, "blocks"))
    return pd.DataFrame(rows)


def text_samples(
    source: TextSource, size: int = 8, each: int | None = None, seed: int = 0, progress: bool = True
) -> Iterator[Sample]:
    """Tokens of a language model's text, drawn at random from those of each sequence.

    Each is changed in a copy of its sequence, so that no change meets another. Vectors are in the
    model's own basis.

    Args:
        size: sequences that are read at a time. each: tokens of a sequence, four of a model of six
            layers and fewer of a deeper one, since each costs a pass for every layer.
    """
    interventions.check(source.site)
    if not source.lens.is_identity:
        raise SpecError(f"basis: expected the identity, got {source.site.basis}")
    each = each or max(1, 24 // source.n_layers)
    lm, generator, first = source.lm, torch.Generator().manual_seed(seed), 0
    own = one_pass(source.blocks.batches(size), source, size, "effects", progress)
    for tokens in own:
        tokens = tokens.to(lm.device).repeat(each, 1)
        chance = torch.rand(tokens.shape, generator=generator).to(lm.device)
        position = (chance * lm.keep_mask(tokens)).argmax(1)
        row = torch.arange(len(tokens), device=lm.device)
        original = lm.original(tokens)

        def after(layer, changed, original=original, row=row, position=position):
            rows = original.residual[layer].repeat(len(changed), 1, 1, 1)
            rows[:, row, position] = changed.to(rows.dtype)
            later = interventions.resume(lm, original, layer, rows)[1:]
            return torch.stack([x.view(rows.shape)[:, row, position].float() for x in later])

        sequence = first + row % (len(tokens) // each)
        first += len(tokens) // each
        yield Sample(original.residual[:, row, position].float(), sequence, after)


def mean_layers(
    source: ActivationSource, sae: MLSAE, size: int = 8, *, progress: bool = True
) -> Tensor:
    """E[L | j] of each latent, (latent,); nan for one that is never active."""
    found = LayerDistribution(source.n_layers, sae.n_latents, device=source.device)
    for batch in one_pass(source.batches(size), source, size, "mean layers", progress):
        found.update(*coded(sae, batch.source))
    return found.compute().mean_layer


# --- finished tables for the chapter --------------------------------------------------------------

RANKS = {"1 to 4": 4, "5 to 8": 8, "9 to 16": 16, "17 to 32": 32, "33 to 64": 64, "beyond": 65}


def rank_classes(ranks: pd.DataFrame) -> pd.DataFrame:
    """``ranks`` of `persistence` of one run by class of rank: a row per (``of``, ``where``)."""
    ends = list(RANKS.values())
    classes = pd.cut(ranks["rank"], [0, *ends], labels=list(RANKS))
    table = ranks.assign(ranks=classes)
    return table.pivot_table(
        index=["of", "where"], columns="ranks", values="share", aggfunc="sum", observed=True
    )


def drops(table: pd.DataFrame) -> pd.DataFrame:
    """Of `effects` of several runs, ρ and δ of latents that are active at the later layer too, over
    all layers and homes: one row per run, ``gap`` and ``kind``, with ``value``, ``low``, ``high``.
    """
    kept = table[(table.after == AFTER[0]) & (table.home == "all") & (table.layer == -1)]
    parts = []
    for name, label in (("total", "ρ"), ("direct", "δ")):
        ends = {"value": kept[name], "low": kept[f"{name}_low"], "high": kept[f"{name}_high"]}
        parts.append(kept[["case", "gap"]].assign(kind=f"{label}: " + kept.taken, **ends))
    return pd.concat(parts, ignore_index=True)


def trainings(table: pd.DataFrame, value: str, keys: Sequence[str], digits: int = 3):
    """One number of several trainings side by side, and what they say together.

    Args:
        table: rows with the columns ``keys``, ``seed`` and ``value``.

    Returns:
        One row per ``keys``, in their order: a column per seed, and ``mean``, text: with the ends
        of its interval over trainings.
    """
    wide = table.pivot_table(value, list(keys), "seed")
    means = [between(*over_trainings(row).values(), digits) for row in wide.to_numpy().tolist()]
    return wide.round(digits).add_prefix("seed ").assign(mean=means).rename_axis(columns=None)


def over_seeds(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """What `surrogates.measured` gives of several conditions and seeds, to be read side by side.

    Args:
        table: its rows, with the columns ``condition`` and ``seed``.

    Returns:
        Text: one row per condition and one column per measure, each in the order of the table: the
        mean over seeds, and in brackets the smallest and the largest.
    """
    keys = ["condition", "measure"]
    found = table.groupby(keys, sort=False).value.agg(["mean", "min", "max"])
    shown = [between(*row, digits) for row in found.itertuples(index=False)]
    wide = found.assign(text=shown).pivot_table("text", *keys, aggfunc="first", sort=False)
    return wide.rename_axis(columns=None)
