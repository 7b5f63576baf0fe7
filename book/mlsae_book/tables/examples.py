"""What a latent responds to: the tokens at which it is most active, with the text around them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_core.activations import ActivationSource, one_pass
from mlsae_core.metrics import TopExamples
from mlsae_core.resume import Pass
from mlsae_core.sae import MLSAE

#: Tokens before the peak token that a window shows, as a fraction: a model that reads from left
#: to right knows nothing of what follows, which is there for the reader's sake.
BEFORE = 0.7
#: Entries whose windows are looked up at a time, which bounds memory.
ENTRIES_AT_ONCE = 8192


@torch.no_grad()
def examples(
    source: ActivationSource,
    sae: MLSAE,
    size: int = 8,
    *,
    n_examples: int = 3,
    window: int = 16,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> dict[str, Tensor]:
    """Top activating examples of every latent at every layer, with their context, in one pass.

    Memory is some 100 bytes for each of the layer · latent · n_examples entries, whatever the
    number of tokens. A window lies within its sequence, so the peak token stands nearer to an end
    of it where the sequence begins or ends. Special tokens can be context, but no example.

    Args:
        size: sequences that are read at a time.
        n_examples: how many to keep per (layer, latent).
        window: tokens of context, the peak token among them; shorter if the sequences are.
        checkpoint: file to continue from if it exists, and to write every minute.

    Returns:
        Arrays (layer, latent, example), best first; where there are fewer examples, `sequence` is
        −1. ``values``: activation at the peak. ``sequence``, ``position``: which token of the
        split. ``place``: where in the window the peak stands. And with one more axis: ``tokens``
        (…, window), token ids; ``around`` (…, window), the latent's activation at this layer on
        those tokens; ``by_layer`` (…, layer), its activation at the peak token at every layer.

    Raises:
        SpecError: a stacked site, which has no single layers.
        ValueError: an empty source.
    """
    source.site.refuse_stacked("examples of every layer")
    n, device = len(source.site.indices(source.n_layers)), source.device
    top = TopExamples(n, sae.n_latents, n_examples, device)
    kept: dict[str, Tensor] = {}
    read = {"sequences": 0, "context": 0}
    done = Pass(checkpoint, size, device, top=top, kept=kept, read=read)
    batches = source.batches(size, None, done.first)
    for batch in one_pass(batches, source, size, "examples", progress, done):
        tokens, context = batch.text, batch.text.shape[1]
        values, indices = sae.encode(batch.source)
        old = top.positions.clone()
        first = read["sequences"] * context
        local = batch.sequence * context + batch.position
        top.update(indices, values, first + local)
        if not kept:
            kept.update(_empty(top, min(window, context), n))
        _carry(kept, old, top.positions)
        rows = torch.full(tokens.shape, -1, device=device)
        rows[batch.sequence, batch.position] = torch.arange(len(local), device=device)
        for entries in (top.positions >= first).nonzero().split(ENTRIES_AT_ONCE):
            at = (top.positions[tuple(entries.T)] - first).cpu(), entries
            _look_up(kept, *at, tokens, rows, values, indices)
        read.update(sequences=read["sequences"] + len(tokens), context=context)
    context = read["context"]
    missing = top.positions < 0
    sequence = top.positions.div(context, rounding_mode="floor")
    found = {
        "values": top.compute().values,  # noqa: PD011 (a tensor)
        "sequence": sequence.masked_fill(missing, -1).int(),
        "position": (top.positions % context).masked_fill(missing, -1).int(),
        **kept,
    }
    return {name: array.cpu().contiguous() for name, array in found.items()}


def _empty(top: TopExamples, window: int, n_layers: int) -> dict[str, Tensor]:
    shape, device = top.positions.shape, top.positions.device
    return {
        "place": torch.zeros(shape, dtype=torch.int8, device=device),
        "tokens": torch.zeros(*shape, window, dtype=torch.int32, device=device),
        "around": torch.zeros(*shape, window, dtype=torch.float16, device=device),
        "by_layer": torch.zeros(*shape, n_layers, dtype=torch.float16, device=device),
    }


def _carry(kept: dict[str, Tensor], old: Tensor, new: Tensor) -> None:
    """Move what belongs to an example to the slot that the example has moved to."""
    same = new[..., :, None] == old[..., None, :]
    source, stays = same.int().argmax(-1), same.any(-1)
    for name, array in kept.items():
        extra = (1,) * (array.ndim - source.ndim)
        index = source.view(*source.shape, *extra).expand_as(array)
        moved = array.gather(source.ndim - 1, index)
        kept[name] = moved * stays.view(*stays.shape, *extra)


def _look_up(kept, local, entries, tokens, rows, values, indices) -> None:
    """Fill in the windows of new examples, from the batch that they come from."""
    layer, latent, _ = entries.T
    window, context = kept["tokens"].shape[-1], tokens.shape[1]
    local = local.to(tokens.device)
    sequence, position = local // context, local % context
    start = (position - int(BEFORE * window)).clamp(0, context - window)
    where = start[:, None] + torch.arange(window, device=tokens.device)
    slot = tuple(entries.T)
    kept["place"][slot] = (position - start).to(torch.int8)
    kept["tokens"][slot] = tokens[sequence[:, None], where].int()

    def activation(layer, row):  # of each entry's latent; 0 at special tokens
        hit = indices[layer, row] == latent.view(-1, 1, 1)
        return (values[layer, row] * hit * (row >= 0)[..., None]).sum(-1).half()

    kept["around"][slot] = activation(layer[:, None], rows[sequence[:, None], where])
    every = torch.arange(len(values), device=tokens.device)[None]
    kept["by_layer"][slot] = activation(every, rows[sequence, position][:, None])


# --- files ------------------------------------------------------------------------------------


def save(arrays: dict[str, Tensor], path: Path) -> None:
    """Write the arrays as safetensors; token ids take two bytes where they fit."""
    from safetensors.numpy import save_file

    plain = {name: array.numpy() for name, array in arrays.items()}
    if plain["tokens"].max(initial=0) < 2**16:
        plain["tokens"] = plain["tokens"].astype(np.uint16)
    save_file(plain, path)


def load(path: Path) -> dict[str, Tensor]:
    """What `save` wrote, with token ids as int32 and activations as float32."""
    from safetensors.numpy import load_file

    arrays = load_file(path)
    arrays["tokens"] = arrays["tokens"].astype(np.int32)
    floats = {n: a.astype(np.float32) for n, a in arrays.items() if a.dtype == np.float16}
    return {name: torch.from_numpy(array) for name, array in (arrays | floats).items()}


def sequences(arrays: dict[str, Tensor], blocks, layer: int, latent: int) -> Tensor:
    """The whole sequences of a latent's examples at a layer, (example, position) int64.

    Args:
        blocks: `text.TokenBlocks` of the split that was read. layer: within the site's layers.
    """
    found = arrays["sequence"][layer, latent]
    chosen = found[found >= 0].unique().numpy()
    return torch.from_numpy(blocks.blocks[chosen].astype(np.int64))


# --- tidy tables ------------------------------------------------------------------------------


def best(arrays: dict[str, Tensor], latents: Sequence[int], most: int = 4) -> pd.DataFrame:
    """The strongest examples of some latents over all layers, each token of the text once.

    Returns:
        One row per (latent, rank), rank from 1: ``layer``, by position among the site's layers,
        where the activation at that token is largest among the kept examples; ``activation``;
        ``sequence`` and ``position`` of the token in the split; ``slot``, which example of that
        (layer, latent) it is. Latents that were never active have no rows.
    """
    frames = []
    for latent in latents:
        layer, slot = (arrays["sequence"][:, latent] >= 0).nonzero(as_tuple=True)
        at = (layer, torch.full_like(layer, latent), slot)
        columns = {name: arrays[name][at].numpy() for name in ("values", "sequence", "position")}
        table = pd.DataFrame({"latent": latent, "layer": layer, "slot": slot} | columns)
        table = table.rename(columns={"values": "activation"})
        table = table.sort_values(["activation", "layer"], ascending=[False, True])
        table = table.drop_duplicates(["sequence", "position"]).head(most)
        frames.append(table.assign(rank=range(1, len(table) + 1)))
    return pd.concat(frames, ignore_index=True)


def token_table(
    arrays: dict[str, Tensor], tokenizer, latents: Sequence[int], most: int = 4
) -> pd.DataFrame:
    """The tokens of `best` examples one by one.

    Returns:
        One row per (latent, rank, place): ``token``, ``activation`` of the latent there at the
        example's layer, ``peak`` (whether it is the example's token), ``layer``.
    """
    rows = []
    for row in best(arrays, latents, most).itertuples():
        ids, peak = _window(arrays, row)
        around = arrays["around"][row.layer, row.latent, row.slot].tolist()
        for place, (token, value) in enumerate(zip(ids, around, strict=True)):
            text = shown(tokenizer.decode([token]))
            rows.append((row.latent, row.rank, place, text, value, place == peak, row.layer))
    columns = ("latent", "rank", "place", "token", "activation", "peak", "layer")
    return pd.DataFrame(rows, columns=columns)


def layer_table(arrays: dict[str, Tensor], latents: Sequence[int], most: int = 4) -> pd.DataFrame:
    """Activation at the peak token of the `best` examples at every layer.

    Returns:
        One row per (latent, rank, layer): ``activation``.
    """
    table = best(arrays, latents, most)
    rows = [
        (row.latent, row.rank, layer, value)
        for row in table.itertuples()
        for layer, value in enumerate(arrays["by_layer"][row.layer, row.latent, row.slot].tolist())
    ]
    return pd.DataFrame(rows, columns=["latent", "rank", "layer", "activation"])


def one_token(arrays: dict[str, Tensor]) -> pd.DataFrame:
    """How many latents respond to one token: those whose examples at a layer all have one peak.

    Returns:
        One row per layer: ``latents``, those with a full list of examples there, and
        ``one_token``, the fraction of them whose peak tokens are all the same.
    """
    peaks = arrays["tokens"].gather(-1, arrays["place"].long()[..., None])[..., 0]
    full = (arrays["sequence"] >= 0).all(-1)
    same = (peaks == peaks[..., :1]).all(-1) & full
    counts = full.sum(1)
    layers = range(len(counts))
    share = (same.sum(1) / counts).numpy()
    return pd.DataFrame({"layer": layers, "latents": counts.numpy(), "one_token": share})


def html(table: pd.DataFrame) -> str:
    """The windows of a `token_table` as an HTML table, one row per (latent, rank).

    All text is escaped. The colour behind a token says how active the latent is there, relative
    to the largest of the row; it is translucent, so the page's own text colour stays legible on
    it, on light and on dark pages. The peak is also bold and underlined, for prints without
    backgrounds.
    """
    rows = []
    for (latent, rank), tokens in table.groupby(["latent", "rank"], sort=False):
        largest = max(tokens.activation.max(), 1e-9)
        text = "".join(_token(t, largest) for t in tokens.itertuples())
        head = f"<td>{latent}</td><td>{rank}</td><td>{tokens.layer.iloc[0]}</td>"
        cell = "text-align:left;white-space:pre-wrap;font-family:monospace"
        rows.append(f'<tr>{head}<td>{largest:.2f}</td><td style="{cell}">{text}</td></tr>')
    names = ("latent", "rank", "layer", "activation", "text")
    header = "".join(f"<th>{name}</th>" for name in names)
    body = "\n".join(rows)
    return (
        '<table class="dataframe latent-examples">'
        f"<thead><tr>{header}</tr></thead>\n<tbody>{body}</tbody></table>"
    )


def _token(token, largest: float) -> str:
    text = escape(token.token, quote=True)
    share = max(0.0, token.activation / largest)
    style = f"background:rgba(86,180,233,{0.6 * share:.2f})" if share > 0 else ""
    if token.peak:
        return f'<b style="{style};text-decoration:underline">{text}</b>'
    return f'<span style="{style}">{text}</span>' if style else text


def shown(text: str) -> str:
    """Text with its line breaks, tabs and control characters made visible."""
    text = text.replace("\n", "↵").replace("\t", "⇥")
    return "".join(c if c.isprintable() else "·" for c in text)


def _window(arrays: dict[str, Tensor], row) -> tuple[list[int], int]:
    at = row.layer, row.latent, row.slot
    return arrays["tokens"][at].tolist(), int(arrays["place"][at])
