"""Dictionaries measured where they were not trained: at other layers, and in other models."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from torch import Tensor, nn

from mlsae_book.tables import spread
from mlsae_book.tables.spread import Read
from mlsae_core import analysis
from mlsae_core.activations import First, TextSource, needs_model, one_pass
from mlsae_core.keys import later
from mlsae_core.lm import LanguageModel
from mlsae_core.metrics import LayerMoments
from mlsae_core.sae import MLSAE, Output, TopK
from mlsae_core.singles import SingleLayers
from mlsae_core.spec import DataSpec, ModelSpec, Spec, SpecError, SubjectSpec, added


@dataclass(frozen=True)
class Target(Spec):
    """Another model to measure a dictionary in, or another text, or other tokens of it.

    Args:
        model, data: in the place of the run's own.
        text: ``given``, the text as it is, or ``rollouts``: the first `prompt_tokens` of each
            sequence, which the model continues by sampling at temperature 1, and of which only the
            continuation is measured.
        seed: of the sampling.
        rescaled: whether vectors are multiplied, layer by layer, so that their mean norm is that of
            the model in which the dictionary was trained, on the given text.
        massive: whether tokens with massive activations are ``kept`` or ``excluded``; by default as
            in training.
    """

    model: ModelSpec
    data: DataSpec = field(default_factory=DataSpec)
    text: Literal["given", "rollouts"] = "given"
    prompt_tokens: int = 32
    seed: int = 0
    rescaled: bool = added(False)
    massive: Literal["kept", "excluded"] | None = added(None)

    _prefix = "target."

    def __post_init__(self):
        super().__post_init__()
        self._positive("prompt_tokens")
        self._seed("seed")
        longest = self.data.context_length - 2  # a prediction needs two tokens after the prompt
        fits = self.text == "given" or self.prompt_tokens <= longest
        self._require(fits, "prompt_tokens", f"at most {longest}, two less than the context")

    def read(self, run: SubjectSpec) -> SubjectSpec:
        """The run as if its dictionary had been trained in this model, on this text."""
        site = dataclasses.replace(run.site, massive=self.massive or run.site.massive)
        return dataclasses.replace(run, model=self.model, data=self.data, site=site)

    def settings(self) -> dict:
        """The fields that count by themselves; model and text count by their content."""
        own = {"text": self.text, "random_weights": self.model.random_weights}
        own |= {"dtype": self.model.dtype, "context_length": self.data.context_length}
        if self.text == "rollouts":
            own |= {"prompt_tokens": self.prompt_tokens, "seed": self.seed}
        return own | later(self.model) | later(self)

    @property
    def start(self) -> int:
        """The first position that is measured."""
        return self.prompt_tokens if self.text == "rollouts" else 0

    def source(self, given: TextSource) -> TextSource:
        """What the model reads of a text: it, or its rollouts."""
        if self.text == "given":
            return given
        rollouts = Rollouts(given.lm, given.blocks, self.prompt_tokens, self.seed)
        return dataclasses.replace(given, blocks=rollouts)


class Rollouts:
    """Sequences that a model continued by itself, as many and as long as those of a text.

    Every pass samples the same tokens: the generator of a batch starts from the seed and the number
    of the batch.
    """

    def __init__(self, lm: LanguageModel, given, prompt_tokens: int, seed: int):
        self.lm, self.given, self.prompt_tokens, self.seed = lm, given, prompt_tokens, seed

    def __len__(self) -> int:
        return len(self.given)

    def batches(
        self, size: int, seed: int | None = None, start: int = 0, every: int = 1
    ) -> Iterator[Tensor]:
        """One pass, (batch, position) int64: every `every`-th batch from `start` on."""
        given = self.given.batches(size, seed, start, every)
        for index, tokens in zip(itertools.count(start, every), given, strict=False):
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + index)
            prompts = tokens[:, : self.prompt_tokens]
            yield sample(self.lm, prompts, tokens.shape[1] - self.prompt_tokens, generator)


@torch.no_grad()
def sample(lm: LanguageModel, prompts: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Continue prompts by sampling from the model's own distribution, at temperature 1.

    A document that ends is followed by the next, as in packed text.

    Args:
        prompts: (batch, position) int64.
        length: tokens to add to each.

    Returns:
        (batch, position + length) int64, the prompts first.
    """
    tokens, cache, step = prompts.to(lm.device), None, prompts.to(lm.device)
    for _ in range(length):
        output = lm.model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        chances = output.logits[:, -1].float().softmax(-1).cpu()
        step = torch.multinomial(chances, 1, generator=generator).to(lm.device)
        tokens = torch.cat([tokens, step], 1)
    return tokens


def everywhere(source: TextSource) -> TextSource:
    """The same activations, of all layers of the model."""
    return dataclasses.replace(source, site=dataclasses.replace(source.site, layers="all"))


class Matched(nn.Module):
    """A dictionary that reads vectors of every layer moved to the mean and the spread of its own.

    Reconstructions are moved back.

    Args:
        sae: of n_inputs, n_latents and dead_threshold, which are this one's as well.
        means: (layer, n_inputs) of the vectors. own: (n_inputs,) to which they are moved.
        factors: (layer,) by which what is left of the vectors is multiplied.
    """

    def __init__(self, sae: MLSAE | SingleLayers, means: Tensor, own: Tensor, factors: Tensor):
        super().__init__()
        self.sae, self.means, self.own = sae, means[:, None], own
        self.factors = factors[:, None, None]
        self.n_inputs, self.n_latents = sae.n_inputs, sae.n_latents
        self.dead_threshold = sae.dead_threshold

    def encode(self, x: Tensor) -> TopK:
        """x (layer, token, n_inputs) to values and indices (layer, token, k), as `MLSAE.encode`."""
        return self.sae.encode((x - self.means) * self.factors + self.own)

    def forward(self, x: Tensor) -> Output:
        """Reconstruct x (layer, token, n_inputs), as `MLSAE.forward`."""
        output = self.sae((x - self.means) * self.factors + self.own)
        return Output((output.recon - self.own) / self.factors + self.means, output.topk)


@torch.no_grad()
def matched(
    source: TextSource, sae: MLSAE | SingleLayers, size: int = 8, sequences: int = 32
) -> Matched:
    """A dictionary for vectors of all layers of a model, whose mean and spread are made its own's.

    The spread is the root of the mean squared distance from the mean.

    Args:
        source: at the site where the dictionary was trained. If that is several layers, vectors are
            moved to the mean of their means, and of their spreads.
        size: sequences that are read at a time.
        sequences: how many to read for means and spreads.

    Raises:
        ValueError: an empty source.
    """
    moments = LayerMoments(source.n_layers, source.d_model, source.device)
    for x in _first(source, size, sequences):
        moments.update(x)
    means, spreads = moments.mean, (moments.scatter.sum(1) / moments.tokens).sqrt()
    own, factors = means[source.layers].mean(0), spreads[source.layers].mean() / spreads
    return Matched(sae, *(numbers.to(sae.decoder) for numbers in (means, own, factors)))


@torch.no_grad()
def mean_norms(source: TextSource, size: int = 8, sequences: int = 32) -> Tensor:
    """(layer,) mean norm of the vectors of every layer of a model, in `sequences` of its text."""
    norms = [x.norm(dim=-1).double() for x in _first(source, size, sequences)]
    return torch.cat(norms, 1).mean(1)


def rescaled(sae: MLSAE | SingleLayers, factors: Tensor) -> Matched:
    """A dictionary that reads vectors of every layer multiplied by its factor, (layer,)."""
    nowhere = sae.decoder.new_zeros(sae.n_inputs)
    return Matched(sae, nowhere.expand(len(factors), -1), nowhere, factors.to(nowhere))


def _first(source: TextSource, size: int, sequences: int) -> Iterator[Tensor]:
    """(layer, token, d_model) batches of the first sequences of a text, of all layers."""
    read = everywhere(dataclasses.replace(source, blocks=First(source.blocks, sequences)))
    for batch in one_pass(read.batches(size), read, size, "norms", progress=False):
        yield batch.source


def across_layers(
    source: TextSource,
    sae: MLSAE | SingleLayers | Matched,
    size: int = 8,
    *,
    ablations: bool = False,
    start: int = 0,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    """A dictionary measured at every layer of a model (MLSAE paper, Appendix B.4).

    A single-layer autoencoder takes a vector of any layer, since all have the same width and each
    vector is standardised by itself. One such table is a row of the layer × layer matrix of
    Figures 19 to 22, and that of an MLSAE the row beneath.

    Args:
        source: at the site where the dictionary was trained, of whose layers all are read; of the
            model that it was trained in, or of another of the same width.
        sae: the dictionary, `matched` or as it is.
        size, ablations, start, checkpoint: as in `analysis.evaluate`.

    Returns:
        The table of `analysis.evaluate`, one row per layer of the model, and ``trained_here``:
        whether the dictionary was trained at this layer. `dead` counts a latent that is active at
        any layer of the model as alive, also where the dictionary was trained at one.

    Raises:
        SpecError: a stacked dictionary, which reads all of its layers at once, or one of another
            width than the model's.
    """
    needs_model(source)
    source.site.refuse_stacked("a dictionary that is read at single layers")
    if sae.n_inputs != source.d_model:
        raise SpecError(
            f"target.model: expected a model of width {sae.n_inputs}, that of the dictionary, got "
            f"{source.lm.name} of width {source.d_model}"
        )
    table = analysis.evaluate(
        everywhere(source),
        sae,
        size,
        ablations=ablations,
        start=start,
        progress=progress,
        checkpoint=checkpoint,
    )
    return table.assign(trained_here=table.layer.isin(source.layers))


def base_and_tuned(
    base: str, tuned: str, data: DataSpec, prompt_tokens: int = 32, rescaled: bool = False
) -> dict[str, Target]:
    """What Gemma Scope measures of a base model's dictionary (Section 4.5, Figures 19 to 23).

    Both models on the same text, and each on what it wrote itself; the base model, in which the
    dictionary was trained, is what the tuned one is compared with. And the tuned model on the same
    text with vectors as long as those of the base model, if that is asked for.

    Args:
        data: text of the kind that the tuned model was trained on.
        prompt_tokens: of each sequence that is continued.
        rescaled: whether the last of these is wanted.

    Returns:
        Name of each measurement, as a chart shows it → its target.
    """
    models, texts = {"base": base, "tuned": tuned}, ("given", "rollouts")
    names = {"given": "given text", "rollouts": "rollouts"}
    targets = {
        f"{who}, {names[text]}": Target(path, data, text, prompt_tokens)
        for text in texts
        for who, path in models.items()
    }
    if rescaled:
        of_tuned = targets["tuned, given text"]
        targets["tuned, rescaled"] = dataclasses.replace(of_tuned, rescaled=True)
    return targets


# --- finished tables for charts -----------------------------------------------------------------

ERRORS = ("fvu_global", "fvu_per_dimension", "delta_ce", "kl")
ALL_LAYERS = "all (MLSAE)"


def matrix(
    single: pd.DataFrame, mlsae: pd.DataFrame | None = None, errors: tuple[str, ...] = ERRORS
) -> pd.DataFrame:
    """The layer × layer matrix and the MLSAE's row, one row per cell and metric.

    Args:
        single: tables of :func:`across_layers` of single-layer autoencoders, one after another;
            ``trained_here`` says where each was trained. There may be none of some layers.
        mlsae: the table of :func:`across_layers` or `analysis.evaluate` of the MLSAE, if there is
            one.
        errors: columns of the tables.

    Returns:
        ``trained`` (the layer, as text, or `ALL_LAYERS`), ``layer`` (where it was measured),
        ``metric``, ``value``, ``last`` (whether either is the last layer, which the paper leaves
        out).

    Raises:
        ValueError: rows that make no matrix of dictionaries, each trained at another layer.
    """
    n = int(single.layer.max()) + 1
    trained = single.layer[single.trained_here].to_numpy()
    if len(single) != n * len(trained) or len(set(trained)) != len(trained):
        raise ValueError(
            f"expected tables of {n} layers, each of a dictionary trained at another of them, got "
            f"{len(single)} rows of dictionaries trained at {', '.join(map(str, trained))}"
        )
    at = trained.repeat(n)
    both = single.assign(trained=at.astype(str), last=at == n - 1)
    if mlsae is not None:
        beneath = mlsae.assign(trained=ALL_LAYERS, last=False)
        both = pd.concat([both, beneath], ignore_index=True)
    both["last"] |= both.layer == n - 1
    present = [name for name in errors if name in both]
    return both.melt(["trained", "layer", "last"], present, "metric", "value")


def summary(cells: pd.DataFrame) -> pd.DataFrame:
    """Means of each metric over the layers but the last: own layer, other layers, the MLSAE.

    Args:
        cells: what :func:`matrix` returns.

    Returns:
        Per metric: ``own``, mean of the diagonal; ``other``, mean off it; ``mlsae``, mean of the
        MLSAE's row; ``spread_own`` and ``spread_mlsae``, largest less smallest of the same;
        ``best_at_own``, the number of test layers at which the dictionary trained there is the best
        of the single-layer ones, and ``layers``, how many of these there are.
    """
    rows = []
    for metric, found in cells[~cells["last"]].groupby("metric", sort=False):
        beneath = found[found.trained == ALL_LAYERS].value
        square = found[found.trained != ALL_LAYERS]
        table = square.assign(trained=square.trained.astype(int))
        table = table.pivot_table(index="trained", columns="layer", values="value")
        own = pd.Series([table.loc[layer, layer] for layer in table.index], table.index)
        others = table.size - len(own)
        row = {"own": own.mean(), "other": (table.to_numpy().sum() - own.sum()) / others}
        row |= {"mlsae": beneath.mean(), "spread_own": own.max() - own.min()}
        row |= {"spread_mlsae": beneath.max() - beneath.min()}
        row |= {"best_at_own": int((table.idxmin() == table.columns).sum()), "layers": len(own)}
        rows.append({"metric": metric, **row})
    return pd.DataFrame(rows).set_index("metric")


# --- distributions over layers where a dictionary was not trained ---------------------------------

#: What can be shown of a single-layer dictionary, as the reader is told of it.
AS_THEY_ARE, MOVED, GAUSSIAN = "vectors as they are", "vectors moved", "null model: Gaussian input"


def heatmaps(as_they_are: Read, moved: Read, most: int = 46) -> pd.DataFrame:
    """P(layer | latent) of single-layer dictionaries at all layers, for `charts.sweeps.gallery`.

    Args:
        as_they_are, moved: what `experiments.all_distributions` reads of the stages ``everywhere``
            and ``everywhere_matched``; the labels' ``layers`` says where each was trained.
        most: latents of a dictionary, evenly spaced by mean layer.

    Returns:
        One row per dictionary, choice, latent and layer: ``run``, ``of`` (one of the three above),
        ``latent``, ``layer``, ``probability``, ``order``.
    """
    chosen = {AS_THEY_ARE: (as_they_are, "probs"), MOVED: (moved, "probs")}
    chosen[GAUSSIAN] = (as_they_are, "probs_gaussian")
    parts = []
    for of, (read, source) in chosen.items():
        named = [({"run": f"SAE of layer {_trained(one)}"}, *one[1:]) for one in read]
        parts.append(spread.sampled(named, most, source).assign(of=of))
    return pd.concat(parts, ignore_index=True).dropna(subset="probability")


def own_shares(as_they_are: Read, moved: Read) -> pd.DataFrame:
    """How much of single-layer dictionaries' latents is at the layer where they were trained.

    Args:
        as_they_are, moved: as in :func:`heatmaps`.

    Returns:
        One row per dictionary: ``trained`` (the layer, as text); means over live latents of
        P(L | j) at that layer: ``own``, ``own_moved`` and ``own_gaussian``; and at the last layer:
        ``last``.
    """
    rows = []
    for one, other in zip(as_they_are, moved, strict=True):
        layer, arrays = _trained(one), one[1]
        row = {"trained": str(layer), "own": _share(arrays["probs"], layer)}
        row["own_moved"] = _share(other[1]["probs"], layer)
        row["own_gaussian"] = _share(arrays["probs_gaussian"], layer)
        rows.append(row | {"last": _share(arrays["probs"], -1)})
    return pd.DataFrame(rows)


def _trained(one) -> int:
    [layer] = one[0]["layers"]
    return layer


def _share(probs: Tensor, layer: int) -> float:
    return probs[layer].nanmean().item()
