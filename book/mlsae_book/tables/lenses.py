"""Tuned lenses: how well they read each layer, how safely they are inverted, and what they change.

Layers are blocks, so layer l is the residual stream after block l.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import pandas as pd
from torch import Tensor

from mlsae_book.tables import layers
from mlsae_book.tune import layer_divergences
from mlsae_core import store
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel

ALIGNMENTS = ("aligned", "as-released")


def shipped() -> list[str]:
    """Names of the language models with a lens under ``data/lenses``."""
    return sorted(path.parent.name for path in (store.DATA / "lenses").glob("*/training.json"))


def conditions(models: Sequence[str] | None = None) -> pd.DataFrame:
    """How much inverting each layer's translator may amplify an error, for every shipped lens.

    Returns:
        One row per model, alignment and layer: ``model``, ``alignment``, ``layer``, ``condition``
        (ratio of the extreme singular values of I + W, Eq. 9; 1 for the identity).
    """
    return pd.DataFrame(
        {"model": model, "alignment": alignment, "layer": layer, "condition": float(condition)}
        for model in (shipped() if models is None else models)
        for alignment in ALIGNMENTS
        for layer, condition in enumerate(
            Lens.read(store.lens_folder(model), alignment).condition_numbers
        )
    )


def divergences(lm: LanguageModel, name: str, batches: Iterable[Tensor]) -> pd.DataFrame:
    """KL from the model's prediction to what is read at each layer, through each kind of lens.

    Args:
        name: the lens under ``data/lenses``.
        batches: (batch, position) int64 tokens, read three times.

    Returns:
        One row per lens and layer: ``lens`` (``logit lens``, ``aligned``, ``as-released``),
        ``layer``, ``kl`` (nats per token).
    """
    batches = list(batches)
    lenses = {"logit lens": Lens.identity()}
    lenses |= {a: Lens.read(store.lens_folder(name), a).to(lm.device) for a in ALIGNMENTS}
    return pd.DataFrame(
        {"lens": label, "layer": layer, "kl": float(kl)}
        for label, lens in lenses.items()
        for layer, kl in enumerate(layer_divergences(lm, lens, batches))
    )


def training(models: Sequence[str] | None = None) -> pd.DataFrame:
    """What training changed, as stored beside each shipped lens.

    Returns:
        One row per model and translator: ``model``, ``translator`` (i acts on the input of block
        i), ``logit_lens`` and ``tuned_lens`` (KL on validation text, nats per token), ``tokens``
        (of training), ``commit``.
    """
    rows = []
    for model in shipped() if models is None else models:
        facts = json.loads((store.lens_folder(model) / "training.json").read_text())
        about = {"tokens": facts["spec"]["tokens"], "commit": facts["commit"]}
        pairs = zip(facts["kl_before"], facts["kl_after"], strict=True)
        rows += [
            {"model": model, "translator": i, "logit_lens": before, "tuned_lens": after, **about}
            for i, (before, after) in enumerate(pairs)
        ]
    return pd.DataFrame(rows)


def in_prompts(table: pd.DataFrame, prompts: Sequence[str]) -> pd.DataFrame:
    """Some prompts of `prompts.csv` of several cases, for `charts.sweeps.gallery`.

    Args:
        table: as `experiments.tables` gives it, the cases in its first column.

    Returns:
        One row per case, prompt, latent and layer at which it is active: ``run``, ``of`` (the
        prompt), ``latent``, ``layer``, ``order``, ``probability`` and ``note``, which share of the
        latents is active at one layer only.
    """
    names = {table.columns[0]: "run", "prompt": "of", "probs": "probability"}
    table = table[table["prompt"].isin(prompts)].rename(columns=names)
    alone = table.groupby(["run", "of", "latent"]).layer.size().eq(1)
    share = alone.groupby(["run", "of"]).mean().map("{:.0%} at one layer only".format)
    table = table.join(share.rename("note"), on=["run", "of"])
    return table[["run", "of", "latent", "layer", "order", "probability", "note"]]


def spread(read: Sequence[tuple[dict, dict, dict]]) -> pd.DataFrame:
    """`layers.spread_table` of the trained dictionaries alone, one row per case."""
    tables = [layers.spread_table(arrays).iloc[:1].assign(**labels) for labels, arrays, _ in read]
    table = pd.concat(tables, ignore_index=True).drop(columns="of")
    return table[["case", *table.columns.drop("case")]]
