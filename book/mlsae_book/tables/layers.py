"""Distributions of latents over layers: tables of one run, of many runs, and of single prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_book import as_released
from mlsae_book.tables import prompt_ids
from mlsae_book.tables.order import ascending, evenly
from mlsae_book.tables.sweeps import stack
from mlsae_core.activations import ActivationSource, TextSource, needs_model, one_pass
from mlsae_core.lm import LanguageModel
from mlsae_core.metrics import LayerDistribution, layer_moments, permute_layers
from mlsae_core.sae import MLSAE
from mlsae_core.store import Artefact
from mlsae_core.text import TokenBlocks

#: What can be drawn as P(layer | latent) of one run: column and how a reader is told of it.
SOURCES = {
    "probs": "mean over active tokens",
    "probs_by_total": "activation totals",
    "probs_permuted": "null model: layers permuted",
    "probs_gaussian": "null model: Gaussian input",
}
#: Figure 3 of the paper leaves out latents whose activations are all smaller.
LEAST_ACTIVATION = 1e-3
#: A latent is of one layer when that layer has nearly all of its probability.
ONE_LAYER = 0.99


def derived(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `analysis.distributions` stored, and what follows from it, in float64.

    Four digits of it are then the same on every processor: sums differ only in the last of 16.

    Returns:
        ``probs``, ``probs_permuted``, ``probs_gaussian``: P(L = ℓ | j), (layer, latent), the mean
        over a latent's active tokens, nan for one never active; its null models alike.
        ``totals``, ``counts``: Σ_t h and tokens where it is active, (layer, latent).
        ``active_tokens``: tokens where it is active at some layer, (latent,).
        ``probs_by_total``: `totals` normalised over layers (MLSAE paper, Appendix C.1).
        ``mean_layer``: E[L | j], (latent,); ``entropy``: of P(L | j) over ln n_layers, (latent,),
        in [0, 1] (Appendix C.4).
    """
    arrays = {k: v.double() if v.is_floating_point() else v.long() for k, v in arrays.items()}
    probs = [name for name in arrays if name.startswith("probs")]
    # three digits were stored: normalise again what they have rounded
    arrays |= {name: arrays[name] / arrays[name].sum(0) for name in probs}
    p = arrays["probs"]
    layer = torch.arange(len(p), dtype=p.dtype)
    return arrays | {
        "probs_by_total": arrays["totals"] / arrays["totals"].sum(0),
        "mean_layer": layer @ p,
        "entropy": torch.special.entr(p).sum(0) / (math.log(len(p)) or 1),
    }


# --- aggregates -----------------------------------------------------------------------------------


def aggregate_table(arrays: dict[str, Tensor], most: int = 400) -> pd.DataFrame:
    """P(layer | latent) over all tokens, of the run and its null models (Fig. 2).

    Each of `SOURCES` has its own latents: those it finds active, sorted by its own mean layer and,
    where there are more than `most`, every n-th in that order, so that the picture keeps its shape.

    Args:
        arrays: what `derived` returns.

    Returns:
        One row per (order, layer): ``order``, ``layer``, and for each source its probability and,
        as ``latent_<source>``, the latent; nan where a source has fewer latents.
    """
    n_layers = len(arrays["probs"])
    columns: dict = {}
    for source in SOURCES:
        probs = arrays[source]
        order = _by_mean_layer(probs, most)
        padded = torch.full((n_layers, most), torch.nan, dtype=probs.dtype)
        padded[:, : len(order)] = probs[:, order]
        columns[source] = padded.T.flatten().numpy()
        names = np.full(most, np.nan)
        names[: len(order)] = order.numpy()
        columns[f"latent_{source}"] = names.repeat(n_layers)
    place = {"order": np.arange(most).repeat(n_layers), "layer": np.tile(range(n_layers), most)}
    table = pd.DataFrame(place | columns)
    return table[table[list(SOURCES)].notna().any(axis=1)].reset_index(drop=True)


def guess_table(panels: dict[str, Tensor], most: int = 200) -> pd.DataFrame:
    """P(layer | latent) of several dictionaries, beneath each other.

    Of each, the latents that are active, by their own mean layer, at most `most` evenly spaced.

    Args:
        panels: name → probabilities (layer, latent) as `derived` returns them.

    Returns:
        One row per (panel, layer, order): ``panel``, ``layer``, ``order``, ``probability``.
    """
    parts = []
    for panel, probs in panels.items():
        chosen = probs[:, _by_mean_layer(probs, most)]
        layer, order = torch.meshgrid(*map(torch.arange, chosen.shape), indexing="ij")
        columns = {"layer": layer, "order": order, "probability": chosen}
        flat = {name: values.flatten().numpy() for name, values in columns.items()}
        parts.append(pd.DataFrame({"panel": panel} | flat))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def passage(lm: LanguageModel, sae: MLSAE, prompt: str) -> pd.DataFrame:
    """The latents of the last token of a prompt, layer by layer, of a dictionary of all layers.

    Returns:
        One row per (latent, layer), of the latents that are active at some: ``latent``, ``layer``,
        ``activation`` (0 where it is not), ``order`` (0, 1, … by the mean layer of the activation).
    """
    ids = prompt_ids(lm, prompt)
    stream = lm.capture(torch.tensor([ids]), range(lm.n_layers))["residual"][:, 0, -1]
    values, indices = sae.encode(stream.float())
    codes = values.new_zeros(lm.n_layers, sae.n_latents).scatter_(1, indices, values).double().cpu()
    active = codes.any(0).nonzero()[:, 0]
    codes = codes[:, active]
    mean = torch.arange(lm.n_layers, dtype=codes.dtype) @ codes / codes.sum(0)
    order = ascending(mean)
    layer, place = torch.meshgrid(*map(torch.arange, codes.shape), indexing="ij")
    columns = {"latent": active[order].expand_as(layer), "layer": layer, "order": place}
    columns |= {"activation": codes[:, order]}
    return pd.DataFrame({name: values.flatten().numpy() for name, values in columns.items()})


def totals_table(arrays: dict[str, Tensor], most: int = 400) -> pd.DataFrame:
    """Activation totals, not normalised (Fig. 25), of the latents that `aggregate_table` has.

    Returns:
        One row per (latent, layer): ``latent``, ``layer``, ``order``, ``total`` (Σ h over tokens)
        and ``share`` (of the largest total, 0 to 1).
    """
    order = _by_mean_layer(arrays["probs"], most)
    totals = arrays["totals"][:, order]
    n_layers, n = totals.shape
    return pd.DataFrame(
        {
            "latent": order.repeat(n_layers).numpy(),
            "layer": torch.arange(n_layers).repeat_interleave(n).numpy(),
            "order": torch.arange(n).repeat(n_layers).numpy(),
            "total": totals.flatten().numpy(),
            "share": (totals / totals.max()).flatten().numpy(),
        }
    )


def _by_mean_layer(probs: Tensor, most: int) -> Tensor:
    """Latents that are active, by E[L | j] upwards; at most `most`, evenly spaced in that order."""
    live = probs.isfinite().all(0).nonzero()[:, 0]
    mean = torch.arange(len(probs), dtype=probs.dtype) @ probs[:, live]
    return live[ascending(mean)][evenly(len(live), most)]


def spread_table(arrays: dict[str, Tensor]) -> pd.DataFrame:
    """How concentrated latents are, in one row per source: the run and its null models.

    Returns:
        ``of``, ``latents`` (active ones), ``dead`` (the others), ``one_layer`` (fraction with more
        than `ONE_LAYER` of their probability at one layer), ``largest`` (mean over latents of the
        largest probability), ``entropy`` (mean, over ln n_layers).
    """
    return pd.DataFrame(
        [{"of": label, **_spread(arrays[source])} for source, label in SOURCES.items()]
    )


def _spread(probs: Tensor) -> dict:
    n_latents = probs.shape[1]
    probs = probs[:, probs.isfinite().all(0)].double()
    largest = probs.amax(0)
    entropy = torch.special.entr(probs).sum(0) / (math.log(len(probs)) or 1)
    return {
        "latents": probs.shape[1],
        "dead": n_latents - probs.shape[1],
        "one_layer": float((largest > ONE_LAYER).double().mean()),
        "largest": float(largest.mean()),
        "entropy": float(entropy.mean()),
    }


# --- single prompts -------------------------------------------------------------------------------


@torch.no_grad()
def prompt_distributions(
    source: TextSource,
    sae: MLSAE,
    prompts: Sequence[str],
    least: float = LEAST_ACTIVATION,
) -> pd.DataFrame:
    """Activations of every latent over the layers, for each prompt alone (Fig. 3 and 26).

    Latents with no activation above `least` are left out, the rest sorted by E[L | j], in which
    every token where the latent is active counts the same. Special tokens are left out.

    Args:
        source: its model reads the prompts, not its text.

    Returns:
        One row per (prompt, latent, layer) at which it is active: ``prompt``, ``latent``,
        ``layer``, ``order``, ``tokens`` (at which it is active at some layer), ``activation``
        (Σ h over the prompt's tokens), ``probs`` and ``probs_by_total`` (P(layer | latent), see
        `SOURCES`) and ``share`` (of the prompt's largest total).

    Raises:
        SpecError: a prompt that is empty or longer than the model's context, or a stacked site.
    """
    frames = [_prompt_table(*_prompt(source, sae, p)[:2], p, least) for p in prompts]
    return pd.concat(frames, ignore_index=True)


def name_prompts(table: pd.DataFrame, prompts: Sequence[str]) -> pd.DataFrame:
    """Some prompts of `prompts.csv` of several runs, each run's told apart by its name.

    Args:
        table: as `experiments.tables` gives it, the runs' names in its first column.

    Returns:
        Those rows, with ``prompt`` as "name: prompt".
    """
    table = table[table["prompt"].isin(prompts)]
    return table.assign(prompt=table.iloc[:, 0].astype(str) + ": " + table["prompt"])


def sample_prompt(table: pd.DataFrame, prompt: str, most: int = 100) -> pd.DataFrame:
    """One prompt of `prompts.csv` of many runs, as `spread.sampled` has many tokens.

    Args:
        table: as `sweeps.across` stacks it. most: latents of a run, evenly spaced by mean layer.

    Returns:
        One row per run, latent and layer at which it is active: ``sweep``, ``run``, ``position``,
        ``latent``, ``layer``, ``probability``, ``order``.
    """
    names, parts = ["sweep", "run", "position"], []
    for _, run in table[table["prompt"] == prompt].groupby(names, sort=False):
        latents = run["order"].max() + 1
        kept = evenly(latents, most).numpy()
        run = run[run["order"].isin(kept)]
        parts.append(run.assign(order=np.searchsorted(kept, run["order"])))
    found = pd.concat(parts, ignore_index=True).rename(columns={"probs": "probability"})
    return found[[*names, "latent", "layer", "probability", "order"]]


def _prompt(source, sae, prompt: str):
    """Distributions of one prompt, its largest activation per latent, and its codes."""
    needs_model(source)
    source.site.refuse_stacked("distributions over layers")
    blocks = TokenBlocks(np.array([prompt_ids(source.lm, prompt)]))
    [batch] = replace(source, blocks=blocks).batches(1)
    values, indices = sae.encode(batch.source)
    found = LayerDistribution(len(batch.source), sae.n_latents, device=source.device)
    found.update(indices, values)
    largest = values.new_zeros(sae.n_latents)
    largest.scatter_reduce_(0, indices.flatten(), values.flatten(), "amax")
    return found.compute(), largest.cpu(), (indices, values)


def _prompt_table(found, largest: Tensor, prompt: str, least: float) -> pd.DataFrame:
    kept = (largest > least).nonzero()[:, 0]
    latents = kept[ascending(found.mean_layer.cpu()[kept])]
    totals = found.totals.cpu()[:, latents]
    layer, order = totals.nonzero(as_tuple=True)
    return pd.DataFrame(
        {
            "prompt": prompt,
            "latent": latents[order].numpy(),
            "layer": layer.numpy(),
            "order": order.numpy(),
            "tokens": found.active_tokens.cpu()[latents[order]].numpy(),
            "activation": totals[layer, order].numpy(),
            "probs": found.probs.cpu()[:, latents][layer, order].numpy(),
            "probs_by_total": found.probs_by_total.cpu()[:, latents][layer, order].numpy(),
            "share": (totals / found.totals.max().cpu())[layer, order].numpy(),
        }
    )


@torch.no_grad()
def prompt_spread(
    source: TextSource,
    sae: MLSAE,
    prompts: Sequence[str],
    draws: int = 20,
) -> pd.DataFrame:
    """`spread_table` of single prompts, and of the null model with layers permuted at each token.

    A prompt has few tokens, so most of its latents are active at one or two, and could not be
    spread over many layers if they would: the null model, the mean of `draws`, shows how far.

    Returns:
        Two rows per prompt: ``prompt``, ``of`` (``prompt`` or ``layers permuted``), and the columns
        of `spread_table` but ``dead``.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    for prompt in prompts:
        found, _, codes = _prompt(source, sae, prompt)
        rows.append({"prompt": prompt, "of": "prompt", **_spread(found.probs)})
        nulls = []
        for _ in range(draws):
            null = LayerDistribution(*found.probs.shape, device=source.device)
            null.update(*permute_layers(*codes, generator))
            nulls.append(_spread(null.compute().probs))
        mean = pd.DataFrame(nulls).mean().to_dict()
        rows.append({"prompt": prompt, "of": "layers permuted", **mean})
    return pd.DataFrame(rows).drop(columns="dead").astype({"latents": int})


# --- variance ratios ------------------------------------------------------------------------------

RATIOS = {"ratio_latent": "Eq. 11", "ratio_token": "Eq. 12"}


def variance_sweep(made: Sequence[tuple[dict, Artefact]]) -> pd.DataFrame:
    """The variance ratios of many runs (Fig. 5 and 27): `results.artefacts["distributions"]`.

    Returns:
        One row per run and ratio: the labels, ``ratio`` (``Eq. 11``: E[Var(L | J)] / Var(L);
        ``Eq. 12``: E[Var(L | J, T)] / E[Var(L | J)]), ``value``, ``low`` and ``high`` (95 %,
        bootstrap over sequences), ``permuted`` and ``gaussian`` (null models), ``live`` (fraction
        of the latents).
    """
    rows = []
    for labels, artefact in made:
        numbers = json.loads(artefact.file("variances.json").read_text())
        live = numbers["live"] / numbers["latents"]
        rows += [
            {**labels, "ratio": label, **numbers[name], "live": live}
            for name, label in RATIOS.items()
        ]
    return pd.DataFrame(rows)


def weighted_ratio(read: Iterable[tuple[dict, dict[str, Tensor], dict]]) -> pd.DataFrame:
    """Eq. 11 under two P(J): uniform over the live latents, and proportional to active tokens.

    It takes no more than P(L | j) and the number of tokens, so what was stored is enough. Where
    latents count by their tokens, those with few hardly matter, and so does the bias of few.

    Args:
        read: what `experiments.read_distributions` returns for several runs, after their labels.

    Returns:
        Two rows per run: the labels, ``weighting`` (``latents``, ``tokens``) and ``value``.
    """
    rows = []
    for labels, arrays, _ in read:
        live = arrays["active_tokens"] > 0
        mean, variance = layer_moments(arrays["probs"][:, live].T)
        for weighting in ("latents", "tokens"):
            n = arrays["active_tokens"][live].double()
            chance = n if weighting == "tokens" else torch.ones_like(n)
            chance = chance / chance.sum()
            within, centre = chance @ variance, chance @ mean
            between = chance @ (mean - centre).square()
            row = {"weighting": weighting, "value": float(within / (within + between))}
            rows.append(labels | row)
    return pd.DataFrame(rows)


def variance_parts(made: Sequence[tuple[dict, Artefact]]) -> pd.DataFrame:
    """The law of total variance, Eq. 14 and 15, as three parts of Var(L) for each of many runs.

    Returns:
        One row per run and part: the labels, ``part``, ``variance`` (squared layers), ``share`` (of
        Var(L); the three sum to 1) and ``place`` (0, 1, 2, from the bottom of a stack).
    """
    rows = []
    for labels, artefact in made:
        numbers = json.loads(artefact.file("variances.json").read_text())
        total, latent, token = (
            numbers[name]["value"] for name in ("var_l", "exp_var_l_given_j", "exp_var_l_given_jt")
        )
        parts = {
            "within one token of a latent": token,
            "between the tokens of a latent": latent - token,
            "between latents": total - latent,
        }
        for place, (part, variance) in enumerate(parts.items()):
            share = variance / total
            row = {"part": part, "variance": variance, "share": share, "place": place}
            rows.append(labels | row)
    return pd.DataFrame(rows)


def variance_sweeps(
    made: dict[str, Sequence[tuple[dict, Artefact]]],
    table: Callable[[Sequence[tuple[dict, Artefact]]], pd.DataFrame] = variance_sweep,
) -> pd.DataFrame:
    """`variance_sweep`, or another table, of several sweeps: see `sweeps.stack`.

    Args:
        made: name of the sweep → the `distributions` results of its runs, labels of one field each.
    """
    return stack({name: table(runs) for name, runs in made.items()})


@torch.no_grad()
def ratio_definitions(
    source: ActivationSource,
    sae: MLSAE,
    size: int = 8,
    batch_tokens: int = 512,
) -> pd.DataFrame:
    """Eq. 11 and Eq. 12 as defined, and as the code released with the paper computes them.

    Args:
        size: sequences that are read at a time.
        batch_tokens: tokens in what `released.ratios` takes for a batch, on whose size it depends;
            their dense codes are held at once.

    Returns:
        Two rows, ``definition`` (``ours``, ``released``): ``Eq. 11``, ``Eq. 12``, ``tokens``.
    """
    n, theirs = len(source.site.indices(source.n_layers)), []
    found = LayerDistribution(n, sae.n_latents, device=source.device)
    for batch in one_pass(source.batches(size), source, size, "ratios", progress=False):
        values, indices = sae.encode(batch.source)
        found.update(indices, values)
        for h, j in zip(values.split(batch_tokens, 1), indices.split(batch_tokens, 1), strict=True):
            codes = h.new_zeros(*h.shape[:2], sae.n_latents).scatter_(2, j, h)
            theirs.append(as_released.ratios([codes]))
    ours = found.compute()
    pairs = {
        "ours": (ours.ratio_latent, ours.ratio_token),
        "released": torch.tensor(theirs).mean(0).tolist(),
    }
    rows = [
        {"definition": name, **dict(zip(RATIOS.values(), pair, strict=True)), "tokens": ours.tokens}
        for name, pair in pairs.items()
    ]
    return pd.DataFrame(rows)
