"""What is known of each latent: its card in the explorer.

One pass over a text keeps every activation, 11 bytes each, so the text has to be of moderate size;
quantiles and counts are then exact. A second, short one moves the residual stream along each of its
dimensions, which says to first order what every latent does to the predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from mlsae_book.tables import interventions
from mlsae_book.tables.examples import BEFORE
from mlsae_core.activations import TextSource, needs_model, one_pass
from mlsae_core.lm import LanguageModel
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SpecError

#: Activations are stored in so many steps of a latent's largest one.
STEPS = 255
#: Half of the step along a dimension of the standardised vectors, whose norm is √d_model.
STEP = 0.5
#: Dimensions along which one batch of copies is moved.
DIMENSIONS_AT_ONCE = 4
#: Floating-point operations that effects on predictions may take: of Pythia-70m they do, within
#: minutes of a GPU or hours of two cores; of larger models they are left out.
MOST_OPERATIONS = 2e15
#: Examples of a card: the strongest, and further ones of each quarter.
STRONGEST, OF_QUARTER = 6, 4


class Activations(NamedTuple):
    """Every activation above 0 in a text, by latent, layer and place."""

    latent: np.ndarray
    """uint16 or int32, ascending."""
    layer: np.ndarray
    """uint8, ascending within a latent."""
    place: np.ndarray
    """int32, sequence · context + position, ascending within a layer."""
    value: np.ndarray
    """float32."""
    text: np.ndarray
    """(sequence, context) int32, all tokens."""


def cards(
    source: TextSource,
    sae: MLSAE,
    size: int = 8,
    *,
    strongest: int = STRONGEST,
    of_quarter: int = OF_QUARTER,
    window: int = 24,
    bins: int = 16,
    most: int = 6,
    progress: bool = True,
) -> dict[str, np.ndarray]:
    """The cards of all latents of a dictionary of the residual stream.

    A token counts once for a latent, at the layer where it is most active there; histograms count
    every layer. Examples that repeat the window of a stronger one are left out.

    Args:
        size: sequences that are read at a time; the first of these are moved for `promoted`.
        strongest: examples with the largest activations.
        of_quarter: further ones, drawn at random from each quarter of the range from 0 to the
            largest.
        window: tokens of context of an example, its peak among them.
        bins: equal parts of that range in a histogram.
        most: tokens in a list.

    Returns:
        ``largest`` (latent,), the largest activation, 0 where there is none. ``tokens`` (latent,),
        tokens at which it is active, and ``quarters`` (latent, 4), those in each quarter.
        ``histogram`` (latent, layer, bins). ``top_token`` and ``top_share`` (latent, most): the
        tokens at which it is active most often, and their fractions of `tokens`; ``spread``
        (latent,), exp of the entropy of these fractions over all tokens: on how many it would be
        active were it equally often so on each. ``place`` (latent, example): sequence · context +
        position of the peak in the split, −1 where there is no example, the strongest first, then
        from the highest quarter to the lowest; ``peak``, where in its window it stands; ``layer``;
        ``window`` (…, window) token ids; in steps of largest / `STEPS`, ``around`` (…, window), the
        activation at that layer, and ``by_layer`` (…, layer), at the peak. ``promoted``,
        ``promoted_by``, ``suppressed`` and ``suppressed_by`` (layer, latent, most): tokens whose
        logits change most when one activation more is added at every token after that block, and
        by how much (nats, relative to the mean over the vocabulary, means over positions); of no
        layer where that would take more than `MOST_OPERATIONS`.

    Raises:
        SpecError: a dictionary that does not write to the residual stream itself, one vector per
            layer, or a source without a language model.
        ValueError: an empty source.
    """
    interventions.check(source.site)
    needs_model(source)
    if not source.lens.is_identity:
        raise SpecError("basis: cards need a dictionary of the identity basis, got that of a lens")
    n_layers = len(source.site.indices(source.n_layers))
    found = collect(source, sae, size, progress)
    bounds = np.searchsorted(found.latent, np.arange(sae.n_latents + 1))
    n_examples = strongest + 4 * of_quarter
    window = min(window, found.text.shape[1])
    shape = (sae.n_latents, n_examples)
    token = np.min_scalar_type(source.lm.vocab_size - 1)
    arrays = {
        "largest": np.zeros(sae.n_latents, np.float32),
        "tokens": np.zeros(sae.n_latents, np.int32),
        "quarters": np.zeros((sae.n_latents, 4), np.int32),
        "histogram": np.zeros((sae.n_latents, n_layers, bins), np.int32),
        "top_token": np.zeros((sae.n_latents, most), token),
        "top_share": np.zeros((sae.n_latents, most), np.float16),
        "spread": np.zeros(sae.n_latents, np.float32),
        "place": np.full(shape, -1, np.int32),
        "peak": np.zeros(shape, np.uint8),
        "layer": np.zeros(shape, np.uint8),
        "window": np.zeros((*shape, window), token),
        "around": np.zeros((*shape, window), np.uint8),
        "by_layer": np.zeros((*shape, n_layers), np.uint8),
    }
    for latent in range(sae.n_latents):
        rows = slice(bounds[latent], bounds[latent + 1])
        own = found._replace(**{f: getattr(found, f)[rows] for f in ("layer", "place", "value")})
        if len(own.value):
            card = _card(own, latent, arrays, strongest, of_quarter)
            for name, value in card.items():
                if np.ndim(value):
                    arrays[name][latent, : len(value)] = value
                else:
                    arrays[name][latent] = value
    moved = next(iter(source.blocks.batches(size)))
    affordable = _operations(source.lm, source.layers, moved) <= MOST_OPERATIONS
    return arrays | _effects(
        source.lm, sae, source.layers if affordable else [], moved, most, progress
    )


@torch.no_grad()
def collect(source: TextSource, sae: MLSAE, size: int, progress: bool = True) -> Activations:
    """Every activation above 0 of one pass over a source."""
    parts, texts, seen = [], [], 0
    for batch in one_pass(source.batches(size), source, size, "cards", progress):
        values, indices = sae.encode(batch.source)
        place = (seen + batch.sequence) * batch.text.shape[1] + batch.position
        layer, token, _ = at = (values > 0).nonzero(as_tuple=True)
        columns = (indices[at].int(), layer.byte(), place[token].int(), values[at].float())
        parts.append([column.cpu().numpy() for column in columns])
        texts.append(batch.text.cpu().numpy().astype(np.int32))
        seen += len(batch.text)
    latent, layer, place, value = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((place, layer, latent))
    return Activations(
        latent[order], layer[order], place[order], value[order], np.concatenate(texts)
    )


def _card(own: Activations, latent: int, arrays: dict, strongest: int, of_quarter: int) -> dict:
    """What one latent's activations say, by the names of the arrays."""
    _, n_layers, bins = arrays["histogram"].shape
    most, window = arrays["top_token"].shape[1], arrays["window"].shape[2]
    largest = own.value.max()
    part = own.value / largest
    cell = own.layer * np.int64(bins) + np.minimum(part * bins, bins - 1).astype(np.int64)
    histogram = np.bincount(cell, minlength=n_layers * bins).reshape(n_layers, bins)
    # each token once, where it is strongest; of equals at the first layer
    order = np.lexsort((own.layer, -own.value, own.place))
    once = order[np.unique(own.place[order], return_index=True)[1]]
    place, layer, part = own.place[once], own.layer[once], part[once]
    token, count = np.unique(own.text.flat[place], return_counts=True)
    share = count / count.sum()
    top = np.argsort(-count, kind="stable")[:most]
    quarter = np.minimum(part * 4, 3).astype(int)
    falling = np.argsort(-part, kind="stable")
    drawn = np.random.default_rng(latent).permutation(len(part))
    context = own.text.shape[1]
    start = place % context - int(BEFORE * window)
    start = place - place % context + np.clip(start, 0, context - window)
    chosen: list[int] = []
    seen: set[bytes] = set()
    slots = np.full(arrays["place"].shape[1], -1)
    groups = [(falling, strongest)]
    groups += [(drawn[quarter[drawn] == q], of_quarter) for q in (3, 2, 1, 0)]
    first = 0
    for candidates, wanted in groups:
        chosen = []
        for one in candidates:
            if len(chosen) == wanted:
                break
            words = own.text.flat[start[one] : start[one] + window].tobytes()
            if words not in seen:
                seen.add(words)
                chosen.append(one)
        chosen.sort(key=lambda one: -part[one])
        slots[first : first + len(chosen)] = chosen
        first += wanted
    there, at = slots >= 0, slots.clip(0)
    where = start[at, None] + np.arange(window)
    steps = {
        "around": _look_up(own, layer[at, None], where),
        "by_layer": _look_up(own, np.arange(n_layers)[None], place[at, None]),
    }
    steps = {name: np.ceil(value / largest * STEPS) for name, value in steps.items()}
    found = {"peak": place[at] - start[at], "layer": layer[at], "window": own.text.flat[where]}
    found |= steps
    empty = {
        name: value * there.reshape(-1, *[1] * (value.ndim - 1)) for name, value in found.items()
    }
    return empty | {
        "place": np.where(there, place[at], -1),
        "largest": largest,
        "tokens": len(place),
        "quarters": np.bincount(quarter, minlength=4),
        "histogram": histogram,
        "top_token": token[top],
        "top_share": share[top],
        "spread": np.exp(-(share * np.log(share)).sum()),
    }


def _look_up(own: Activations, layer: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The latent's activation at layers and places, of shapes that fit; 0 where it is not active."""
    stride = own.text.size
    keys = own.layer * np.int64(stride) + own.place  # ascending
    wanted = layer * np.int64(stride) + place
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, own.value[at], 0)


# --- what latents do to the predictions -----------------------------------------------------------


@torch.no_grad()
def logit_slopes(
    lm: LanguageModel,
    sae: MLSAE,
    tokens: Tensor,
    layer: int,
    done: Callable[[int], object] = lambda dimensions: None,
) -> Tensor:
    """Change of the logits per unit along each dimension of the vectors after a block.

    All tokens that are not special are moved at once, by σ of each vector, as `interventions` steer
    them; central differences, means over all positions.

    Args:
        tokens: (batch, position) int64.
        done: is told how many dimensions were moved, as often as some were.

    Returns:
        (d_model, vocabulary).
    """
    keep, original = lm.keep_mask(tokens), lm.original(tokens)
    x = original.residual[layer]
    std = sae.standardise(x.float())[1].std
    unit = torch.ones_like(x[..., :1]) if std is None else std.to(x.dtype)
    unit = unit * keep[..., None]
    slopes = []
    for dimensions in torch.eye(lm.d_model, device=x.device).split(DIMENSIONS_AT_ONCE):
        moves = STEP * dimensions[:, None, None] * unit
        rows = torch.stack([x + moves, x - moves])
        last = lm.resume_layers(original, {layer: rows})[0]
        ends = [torch.stack([lm.logits(one).mean((0, 1)) for one in side]) for side in last]
        slopes.append((ends[0] - ends[1]) / (2 * STEP))
        done(len(dimensions))
    return torch.cat(slopes)


def _effects(
    lm: LanguageModel,
    sae: MLSAE,
    layers: list[int],
    tokens: Tensor,
    most: int,
    progress: bool = True,
) -> dict:
    """Tokens that latents promote and suppress at each layer."""
    shape, token = (len(layers), sae.n_latents, most), np.min_scalar_type(lm.vocab_size - 1)
    found = {}
    for name in ("promoted", "suppressed"):
        found |= {name: np.zeros(shape, token), f"{name}_by": np.zeros(shape, np.float16)}
    options = {"unit": " dimensions", "disable": not progress or not layers}
    with tqdm(None, "effects on predictions", len(layers) * lm.d_model, **options) as bar:
        for row, layer in enumerate(layers):
            slopes = logit_slopes(lm, sae, tokens.to(lm.device), layer, bar.update)
            change = sae.decoder.detach() @ (slopes - slopes.mean(1, keepdim=True)).float()
            for name, largest in (("promoted", True), ("suppressed", False)):
                values, ids = change.topk(most, largest=largest)
                found[name][row] = ids.cpu().numpy()
                found[f"{name}_by"][row] = values.cpu().numpy()
    return found


def _operations(lm: LanguageModel, layers: list[int], tokens: Tensor) -> float:
    """Of `_effects`: two passes of the blocks above, with logits, for every dimension and layer."""
    block, logits = 2 * 12 * lm.d_model**2, 2 * lm.d_model * lm.vocab_size
    of_token = sum((lm.n_layers - 1 - layer) * block + logits for layer in layers)
    return 2.0 * lm.d_model * tokens.numel() * of_token


# --- files and tables -----------------------------------------------------------------------------


def save(arrays: dict[str, np.ndarray], path: Path) -> None:
    """Write the arrays as safetensors."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def load(path: Path) -> dict[str, np.ndarray]:
    """What `save` wrote."""
    from safetensors.numpy import load_file

    return load_file(path)


def one_token(arrays: dict[str, np.ndarray], examples: int = 3) -> pd.DataFrame:
    """How pure latents look by their strongest examples, and by others.

    Args:
        arrays: what `cards` returns, with `STRONGEST` and `OF_QUARTER` examples.
        examples: how many are looked at, of each group.

    Returns:
        One row per group: ``examples``, the strongest, then "75 to 100 %" of the largest activation
        and so on; ``latents``, those with so many examples there; ``one_token``, the fraction of
        them of which all these have the same token at their peak.
    """
    window, peak = arrays["window"], arrays["peak"].astype(np.int64)
    tokens = np.take_along_axis(window, peak[..., None], -1)[..., 0]
    starts = [0, *(STRONGEST + OF_QUARTER * q for q in range(4))]
    names = ["strongest", *(f"{75 - 25 * q} to {100 - 25 * q} %" for q in range(4))]
    rows = []
    for name, start in zip(names, starts, strict=True):
        group = slice(start, start + examples)
        full = (arrays["place"][:, group] >= 0).all(1)
        same = (tokens[:, group] == tokens[:, start, None]).all(1)
        rows.append((name, int(full.sum()), float(same[full].mean())))
    return pd.DataFrame(rows, columns=["examples", "latents", "one_token"])
