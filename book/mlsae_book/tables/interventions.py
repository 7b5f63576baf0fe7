"""What a latent does: change it at one layer and watch the later layers and the predictions.

The dictionary is used for its directions alone: a vector x with activation h_j is changed by
Δh · σ · w_j, with σ the vector's own standard deviation and w_j the unit decoder row. So Δh is
counted in activations, the same unit at every layer and token, and what the dictionary fails to
reconstruct stays in place. With a tuned lens the change is made in the lens space and mapped back.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel, Original
from mlsae_core.metrics import cross_entropy, kl_divergence
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec, SpecError

#: Add a number of activations, or remove the latent: Δh = −h.
Change = float | Literal["ablate"]


class Effect(NamedTuple):
    """Outcomes of several changes of one latent at one layer."""

    layer: int
    latent: int
    changes: tuple[Change, ...]
    tokens: Tensor
    """(batch, position) int64."""
    keep: Tensor
    """(batch, position) bool: where the token is not special."""
    changed: Tensor
    """(change, batch, position) bool: where the vector was changed."""
    residual: Tensor
    """(layer, batch, position, d_model), from the changed layer on, without a change."""
    residual_after: Tensor
    """(change, layer, batch, position, d_model)."""
    logits: Tensor
    """(batch, position, vocabulary), without a change."""
    logits_after: Tensor
    """(change, batch, position, vocabulary)."""


def resume(lm: LanguageModel, original: Original, layer: int, rows: Tensor) -> list[Tensor]:
    """The residual stream from `layer` on when it is replaced there.

    Args:
        rows: (…, batch, position, d_model), after block `layer`. Gradients flow.

    Returns:
        One tensor for every layer from `layer` on: first `rows` itself, then the blocks' outputs,
        leading axes flattened. Each is a node of the graph: gradients can be asked for at any.
    """
    later: list[Tensor] = []
    with ExitStack() as hooks:
        for block in lm.blocks[layer + 1 :]:
            handle = block.register_forward_hook(
                lambda _, __, out: later.append(out[0] if isinstance(out, tuple) else out)
            )
            hooks.callback(handle.remove)
        lm.resume_layers(original, {layer: rows})
    return [rows, *later]


@torch.no_grad()
def shift(
    sae: MLSAE, lens: Lens, x: Tensor, layer: int, latent: int, changes: Sequence[Change]
) -> Tensor:
    """What each change of a latent adds to residual-stream vectors of a layer.

    Args:
        x: (token, d_model).

    Returns:
        (change, token, d_model): Δh · σ · w_j, through the linear part of the lens's inverse.
    """
    z = lens.apply(x[None].to(sae.decoder.dtype), [layer])
    values, indices = sae.encode(z)
    active = (values * (indices == latent)).sum(-1)[0]
    std = sae.standardise(z)[1].std
    std = torch.ones_like(active) if std is None else std[0, :, 0]
    amount = torch.stack(
        [-active if c == "ablate" else torch.full_like(active, float(c)) for c in changes]
    )
    step = (amount * std)[..., None] * sae.decoder[latent]
    if lens.is_identity:
        return step
    # The inverse is affine: its offset is what it makes of nothing.
    offset = lens.invert(torch.zeros_like(step[:1]), [layer])
    return torch.cat([lens.invert(part[None], [layer]) for part in step]) - offset


@torch.no_grad()
def intervene(
    lm: LanguageModel,
    sae: MLSAE,
    lens: Lens,
    site: SiteSpec,
    tokens: Tensor,
    layer: int,
    latent: int,
    changes: Sequence[Change],
) -> Effect:
    """Change one latent after one block, at every token that is not special; run the rest.

    A number α is steering: x + α σ w_j, whether or not the latent is active. "ablate" removes the
    latent's contribution, x − h_j σ w_j, and changes nothing where it is inactive.

    Args:
        tokens: (batch, position) int64.
        layer: block index; the dictionary need not have been trained there.
        latent: row of the dictionary.
        changes: run together as one batch; memory grows with
            change · layer · batch · position · d_model and change · batch · position · vocabulary.

    Raises:
        SpecError: a dictionary that does not write to the residual stream, or no such latent.
    """
    check(site)
    if not 0 <= latent < sae.n_latents:
        raise SpecError(f"latent: expected 0 to {sae.n_latents - 1}, got {latent}")
    tokens = tokens.to(lm.device)
    keep, original = lm.keep_mask(tokens), lm.original(tokens)
    x = original.residual[layer]
    rows = x.repeat(1 + len(changes), 1, 1, 1)  # the first stays as it is
    steps = shift(sae, lens, x[keep].float(), layer, latent, changes)
    rows[1:, keep] += steps.to(x.dtype)
    changed = torch.zeros(rows.shape[:-1], dtype=torch.bool, device=x.device)
    changed[1:, keep] = (steps != 0).any(-1)
    streams = torch.stack([x.view(rows.shape) for x in resume(lm, original, layer, rows)], 1)
    logits = lm.logits(streams[:, -1])
    # Rows of one batch can differ in the last digit; what was not changed has no effect at all.
    reached = changed[1:].cumsum(-1) > 0  # blocks look back: nothing before the first change
    residual = torch.where(reached[:, None, ..., None], streams[1:], streams[:1])
    after = torch.where(reached[..., None], logits[1:], logits[:1])
    changes = tuple(changes)
    return Effect(
        layer, latent, changes, tokens, keep, changed[1:], streams[0], residual, logits[0], after
    )


def check(site: SiteSpec) -> None:
    """Refuse sites whose latents do not write to the residual stream of one layer."""
    if site.source != "residual" or site.target not in ("same", "residual") or site.stacked:
        raise SpecError(
            "source/target: interventions need a dictionary of the residual stream, one vector "
            f"per layer; got source {site.source}, target {site.target}, stacked {site.stacked}"
        )


# --- tidy tables ------------------------------------------------------------------------------


@torch.no_grad()
def losses(effect: Effect) -> pd.DataFrame:
    """Effect on the predictions of all positions but the last.

    Returns:
        One row per change: ``change``, ``delta_ce`` and ``kl`` (unchanged ‖ changed), means over
        ``predictions``, nats per predicted token; ``changed``, the fraction of the non-special
        tokens whose vector was changed.
    """
    before, targets = effect.logits[:, :-1], effect.tokens[:, 1:]
    ce = cross_entropy(before, targets)
    rows = []
    for change, logits, changed in zip(
        effect.changes, effect.logits_after[:, :, :-1], effect.changed, strict=True
    ):
        rows.append(
            {
                "change": change,
                "delta_ce": (cross_entropy(logits, targets) - ce).double().mean().item(),
                "kl": kl_divergence(before, logits).double().mean().item(),
                "changed": changed[effect.keep].double().mean().item(),
            }
        )
    return pd.DataFrame(rows).assign(predictions=targets.numel())


@torch.no_grad()
def promoted(effect: Effect, tokenizer, most: int = 10) -> pd.DataFrame:
    """The tokens whose logits rise and fall most, on average over the changed positions.

    Logits have no zero, so each position's change is taken relative to its mean over the
    vocabulary.

    Returns:
        One row per (change, direction, rank): ``token``, ``logit_change``. No rows for a change
        that changed nothing.
    """
    rows = []
    for change, logits, changed in zip(
        effect.changes, effect.logits_after, effect.changed, strict=True
    ):
        if not changed.any():
            continue
        difference = (logits - effect.logits)[changed]
        mean = (difference - difference.mean(-1, keepdim=True)).mean(0)
        for direction, largest in (("promoted", True), ("suppressed", False)):
            values, ids = mean.sort(descending=largest, stable=True)
            for rank, (value, token) in enumerate(zip(values[:most], ids, strict=False), 1):
                text = tokenizer.decode([int(token)])
                rows.append((change, direction, rank, text, value.item()))
    return pd.DataFrame(rows, columns=["change", "direction", "rank", "token", "logit_change"])


@torch.no_grad()
def later_layers(effect: Effect, sae: MLSAE, lens: Lens) -> pd.DataFrame:
    """How far the change reaches: residual vectors and the latent's activation at later layers.

    Returns:
        One row per (change, layer), means over the changed tokens: ``relative_change``
        ‖Δx‖ / ‖x‖; ``activation_before`` and ``activation_after`` of the latent, as the dictionary
        reads the vectors there; ``active_before``, ``active_after``, the fractions of tokens at
        which it is among the k. nan for a change that changed nothing.
    """
    rows = []
    for change, after, changed in zip(
        effect.changes, effect.residual_after, effect.changed, strict=True
    ):
        for offset, (x, y) in enumerate(zip(effect.residual, after, strict=True)):
            layer = effect.layer + offset
            x, y = x[changed].float(), y[changed].float()
            reach = torch.linalg.vector_norm(y - x, dim=-1) / torch.linalg.vector_norm(x, dim=-1)
            row = {"change": change, "layer": layer, "relative_change": reach.mean().item()}
            for name, vectors in (("before", x), ("after", y)):
                h = _activations(sae, lens, vectors, layer)[:, effect.latent]
                row[f"activation_{name}"] = h.mean().item()
                row[f"active_{name}"] = (h > 0).double().mean().item()
            rows.append(row)
    return pd.DataFrame(rows)


@torch.no_grad()
def most_changed(effect: Effect, sae: MLSAE, lens: Lens, most: int = 5) -> pd.DataFrame:
    """The latents whose activations change most at each layer from the changed one on.

    Returns:
        One row per (change, layer, rank), by the mean absolute change over the changed tokens:
        ``latent``, ``change_of_activation`` (mean, with its sign). No rows for a change that
        changed nothing.
    """
    rows = []
    for change, after, changed in zip(
        effect.changes, effect.residual_after, effect.changed, strict=True
    ):
        if not changed.any():
            continue
        for offset, (x, y) in enumerate(zip(effect.residual, after, strict=True)):
            layer = effect.layer + offset
            before = _activations(sae, lens, x[changed].float(), layer)
            difference = _activations(sae, lens, y[changed].float(), layer) - before
            mean = difference.mean(0)
            order = difference.abs().mean(0).argsort(descending=True, stable=True)
            for rank, latent in enumerate(order[:most], 1):
                rows.append((change, layer, rank, int(latent), mean[latent].item()))
    columns = ["change", "layer", "rank", "latent", "change_of_activation"]
    return pd.DataFrame(rows, columns=columns)


def _activations(sae: MLSAE, lens: Lens, x: Tensor, layer: int) -> Tensor:
    """(token, latent): every latent's activation on vectors (token, d_model) of a layer."""
    if not len(x):  # the kernels expect a vector
        return x.new_zeros(0, sae.n_latents)
    values, indices = sae.encode(lens.apply(x[None], [layer])[0])
    return values.new_zeros(len(x), sae.n_latents).scatter_(-1, indices, values)
