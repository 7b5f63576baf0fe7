"""A few latents of a dictionary, chosen by a rule, with the texts at which they are most active."""

from __future__ import annotations

from html import escape

import torch
from torch import Tensor

from mlsae_book.tables.examples import shown
from mlsae_core.activations import TextSource, one_pass
from mlsae_core.metrics import LayerDistribution
from mlsae_core.sae import MLSAE


@torch.no_grad()
def chosen(
    source: TextSource,
    sae: MLSAE,
    size: int = 8,
    *,
    number: int = 20,
    texts: int = 4,
    least: int = 16,
    window: int = 10,
    progress: bool = True,
) -> list[dict]:
    """Latents from early to late layers, each the one of its kind with the largest activation.

    The latents that are active at `least` tokens or more are sorted by their mean layer, and cut
    into `number` groups of equal size; from each comes the latent that is at some token and layer
    more active than the others ever are. Nobody has looked at its texts before.

    Args:
        source: not stacked.
        size: sequences that are read at a time.
        texts: tokens that are shown of each latent, those at which it is most active at any layer.
        window: tokens of text before and, half as many, after.

    Returns:
        Of each latent: ``latent``, ``tokens`` at which it is active, ``of`` all; its ``mean_layer``
        and ``probs``, P(L | J) over the layers; ``texts``, most active first, each with its
        ``activation``, the ``layer`` of that, and ``before``, ``token`` and ``after``.

    Raises:
        SpecError: a stacked site.
        ValueError: an empty source.
    """
    source.site.refuse_stacked("latents and their layers")
    layers = source.site.indices(source.n_layers)
    found = LayerDistribution(len(layers), sae.n_latents, device=source.device)
    best = torch.zeros(3, sae.n_latents, texts, device=source.device).double()
    read: list[Tensor] = []
    seen = 0
    for batch in one_pass(source.batches(size), source, size, "texts", progress):
        values, indices = sae.encode(batch.source)
        found.update(indices, values)
        strongest, layer = _over_layers(values, indices, sae.n_latents)
        top, rows = strongest.topk(min(texts, len(strongest)), 0)
        place = seen + batch.sequence * batch.text.shape[1] + batch.position
        new = torch.stack([top.double(), place[rows].double(), layer.gather(0, rows).double()])
        both = torch.cat([best, new.transpose(1, 2)], 2)
        order = both[0].topk(texts, 1).indices
        best = both.gather(2, order.expand(3, -1, -1))
        read.append(batch.text.cpu())
        seen += batch.text.numel()
    result, tokens = found.compute(), torch.cat(read)
    frequent = (result.active_tokens >= least).nonzero()[:, 0]
    groups = frequent[result.mean_layer[frequent].argsort(stable=True)].tensor_split(number)
    made = []
    for group in groups:
        if not len(group):
            continue
        latent = int(group[best[0, group, 0].argmax()])
        rows = [
            {"activation": value, "layer": layers[int(layer)]}
            | _around(source.lm.tokenizer, tokens, int(place), window)
            for value, place, layer in best[:, latent].T.tolist()
            if value > 0
        ]
        made.append(
            {
                "latent": latent,
                "tokens": int(result.active_tokens[latent]),
                "of": result.tokens,
                "mean_layer": float(result.mean_layer[latent]),
                "probs": result.probs[:, latent].tolist(),
                "texts": rows,
            }
        )
    return made


def _over_layers(values: Tensor, indices: Tensor, n_latents: int) -> tuple[Tensor, Tensor]:
    """Every latent's largest activation over layers at every token, and its layer, both (token,
    latent); the first of several."""
    strongest = values.new_zeros(values.shape[1], n_latents)
    layer = torch.zeros_like(strongest, dtype=torch.long)
    for number, (h, j) in enumerate(zip(values, indices, strict=True)):
        dense = torch.zeros_like(strongest).scatter_(1, j, h)
        larger = dense > strongest
        strongest, layer = torch.maximum(strongest, dense), layer.masked_fill(larger, number)
    return strongest, layer


def _around(tokenizer, tokens: Tensor, place: int, window: int) -> dict[str, str]:
    """A token of a text and those beside it in its sequence, as text."""
    sequence, position = divmod(place, tokens.shape[1])
    row = tokens[sequence].tolist()
    parts = {
        "before": row[max(position - window, 0) : position],
        "token": row[position : position + 1],
        "after": row[position + 1 : position + 1 + window // 2],
    }
    return {name: tokenizer.decode(part) for name, part in parts.items()}


def as_html(found: list[dict], names: dict[int, str]) -> str:
    """The latents that `chosen` gives as an HTML table; all text is escaped, and the token itself
    is bold and underlined.

    names: what somebody who has read the texts would call a latent, by its number.
    """
    rows = []
    for latent in found:
        low, high = _middle(latent["probs"])
        texts = "<br>".join(
            f"{_shown(text['before'])}<b style='text-decoration:underline'>"
            f"{_shown(text['token'])}</b>{_shown(text['after'])}"
            for text in latent["texts"]
        )
        cells = (
            str(latent["latent"]),
            escape(names.get(latent["latent"], "?")),
            f"{latent['mean_layer']:.1f}",
            f"{low}–{high}",
            f"{1000 * latent['tokens'] / latent['of']:.1f}",
        )
        cells = "".join(f"<td>{cell}</td>" for cell in cells)
        style = "text-align:left;white-space:pre-wrap;font-family:monospace"
        rows.append(f"<tr>{cells}<td style='{style}'>{texts}</td></tr>")
    heads = "latent", "called", "mean layer", "layers", "of 1000 tokens", "most active at"
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return f"<table class='dataframe'><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _middle(probs: list[float]) -> tuple[int, int]:
    """The layers between which the middle nine tenths of a latent lie."""
    below = torch.tensor(probs, dtype=torch.float64).cumsum(0)
    ends = torch.searchsorted(below, torch.tensor([0.05, 0.95], dtype=torch.float64))
    low, high = ends.clamp_max(len(probs) - 1).tolist()
    return low, high


def _shown(text: str) -> str:
    return escape(shown(text), quote=True)
