"""A run and text give tidy tables: one row per thing measured, one column per number."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from mlsae_core.activations import gather, hook_points, stream
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel, Original
from mlsae_core.metrics import (
    DistributionResult,
    Downstream,
    LayerDistribution,
    LayerMoments,
    Reconstruction,
    basic_interval,
    ce_recovered,
    gaussian_like,
    permute_layers,
)
from mlsae_core.sae import MLSAE
from mlsae_core.spec import SiteSpec, SpecError

# Logits held at a time, over all replaced layers together: 32 MiB in float32 on a CPU, enough rows
# to read the output embeddings seldom, and 256 MiB on a GPU, which is busy only with more.
LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**26}

# What distributions over layers are compared with: see `distributions`.
NULL_MODELS = ("permuted", "gaussian")


@torch.no_grad()
def evaluate(
    lm: LanguageModel,
    sae: MLSAE,
    lens: Lens,
    site: SiteSpec,
    batches: Iterable[Tensor],
    *,
    ablations: bool = True,
    mean_tokens: int = 8192,
    layers_at_once: int | None = None,
    start: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Reconstruction error and downstream loss of every layer, in one pass over text.

    The site's target is replaced by its reconstruction at the non-special positions, one layer at
    a time, and the rest of the model is run (MLSAE paper, Section 4.1 and Appendix B). The original
    pass is made once per batch; all replaced layers share a growing batch. With a tuned lens, FVU,
    MSE and L1 are measured in the lens space and the downstream columns after its inverse.

    Every position but a sequence's last makes one prediction, scored against the token that really
    follows, also where that is an end-of-sentence token or the position itself is special: the same
    predictions for the original and the replaced model, so differences are of like with like.

    Args:
        sae: called as ``sae(source)``, or ``sae(source, target)`` for a transcoder.
        lens: the basis in which `sae` was trained.
        site: layers, source, target; `stacked` dictionaries are measured layer by layer.
        batches: (batch, position) int64 tokens.
        ablations: also replace each layer by zero and by its mean; about three times slower.
        mean_tokens: read before the pass, to take the mean of a layer from them; whole sequences.
        layers_at_once: layers that share a growing batch; fewer take less memory.
        start: the position from which on vectors are replaced and measured, and predictions scored;
            those before it are context.
        progress: show a progress bar.

    Returns:
        One row per layer. Means over `tokens` non-special tokens: ``fvu_global``,
        ``fvu_per_dimension``, ``mse``, ``l1``, ``l0`` (number of non-zero latents; for stacked
        sites the same in every row). Fractions of latents: ``dead`` (never active at any layer of
        this sample, equal in every row), ``inactive`` (never at this layer). Means over
        `predictions`, in nats per predicted token: ``ce_original``, ``ce_replaced``,
        ``delta_ce``, ``kl`` (original ‖ replaced); ``logit_mse``. With `ablations`: ``ce_zero``,
        ``ce_mean``, and the fraction of the loss that each costs and the reconstruction recovers,
        ``ce_recovered_zero``, ``ce_recovered_mean``.

    Raises:
        ActivationError: NaN or infinite activations, naming the batch and the layers.
        ValueError: no batches.
    """
    layers, points = site.indices(lm.n_layers), hook_points(site)
    point, n = points[-1], len(layers)  # the last hook point is the target
    total = len(batches) if hasattr(batches, "__len__") else None
    batches = iter(batches)
    first, opening = _opening(batches, mean_tokens if ablations else 0)
    if not first:
        raise ValueError("batches: expected at least one batch of tokens, got none")
    means = _layer_means(lm, opening, layers, point) if ablations else None

    reconstruction = Reconstruction(n, lm.d_model, lm.device)
    downstream = Downstream(n, lm.device)
    ablated = torch.zeros(n, 2, dtype=torch.float64, device=lm.device)  # Σ CE of zero, mean
    active = torch.zeros(n, sae.n_latents + 1, dtype=torch.bool, device=lm.device)

    pass_over = tqdm(itertools.chain(first, batches), "evaluate", total, disable=not progress)
    for index, tokens in enumerate(pass_over):
        tokens = tokens.to(lm.device)
        keep = lm.keep_mask(tokens)
        keep[:, :start] = False
        original = lm.original(tokens, points)
        captured = {name: original.activations[name][layers] for name in points}
        batch = gather(captured, tokens, keep, site, layers, lens, index)
        target = None if batch.target is batch.source else batch.target
        output = sae(batch.source) if target is None else sae(batch.source, target)
        values, indices = (part.expand(n, -1, -1) for part in output.topk)
        recon = _unstack(output.recon, n)
        reconstruction.update(_unstack(batch.target, n), recon, values)
        # Pairs below the threshold are counted in a spare column.
        spare = indices.masked_fill(values <= sae.dead_threshold, sae.n_latents)
        active.scatter_(1, spare.flatten(1), True)

        recon = lens.invert(recon, layers)
        for rows in torch.arange(n).split(layers_at_once or n):
            replacements = {}
            for row in rows.tolist():
                layer = layers[row]
                choices = [recon[row]] if means is None else [recon[row], 0.0, means[row]]
                replacements[layer] = _replace(original.activations[point][layer], keep, choices)
            last = lm.resume_layers(original, replacements, point)
            _score(lm, original, last, rows, downstream, ablated, start)

    seen = active[:, :-1]
    return _evaluation(layers, reconstruction, downstream, seen, ablated if ablations else None)


def _evaluation(
    layers: list[int],
    reconstruction: Reconstruction,
    downstream: Downstream,
    active: Tensor,
    ablated: Tensor | None,
) -> pd.DataFrame:
    """What `evaluate` returns, of its sums; ``active`` (layer, latent), ``ablated`` (layer, 2)."""
    effect = downstream.compute()
    columns = reconstruction.compute()._asdict() | {
        "dead": 1 - active.any(0).double().mean(),
        "inactive": 1 - active.double().mean(1),
        "predictions": effect.tokens,
        **{name: value for name, value in effect._asdict().items() if name != "tokens"},
    }
    if ablated is not None:
        zero, mean = (ablated / effect.tokens[:, None]).unbind(1)
        for name, ce in (("zero", zero), ("mean", mean)):
            columns[f"ce_{name}"] = ce
            columns[f"ce_recovered_{name}"] = ce_recovered(
                effect.ce_original, effect.ce_replaced, ce
            )
    columns = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
    return pd.DataFrame({"layer": layers} | columns)


@torch.no_grad()
def distributions(
    lm: LanguageModel,
    sae: MLSAE,
    lens: Lens,
    site: SiteSpec,
    batches: Iterable[Tensor],
    *,
    replicates: int = 1000,
    progress: bool = True,
) -> tuple[dict[str, Tensor], dict]:
    """Distributions of every latent over layers, their variances, intervals and null models.

    Null models: ``permuted``, the codes of each token dealt anew to the layers; ``gaussian``, codes
    of isotropic Gaussian vectors with the norms of the activations, which the dictionary has not
    learnt to write (`metrics.permute_layers`, `metrics.gaussian_like`).

    Args:
        batches: (batch, position) int64 tokens.
        replicates: bootstrap replicates over blocks of sequences, for 95 % intervals.

    Returns:
        Arrays, no wider than the three digits they are read to: ``probs``, ``probs_permuted``,
        ``probs_gaussian`` (float16, nan for latents never active), ``totals`` (float32) and
        ``counts`` (int32) of shape (layer, latent), ``active_tokens`` (int32, latent);
        `layers.derived` adds what follows from them. Numbers: ``tokens``, ``latents``, ``live``,
        ``mean_entropy``; ``nulls``, with the same for each null model; and per variance and ratio
        of `metrics.Variances` its ``value``, interval (``low``, ``high``) and what the null models
        give (``permuted``, ``gaussian``).

    Raises:
        SpecError: a stacked site, whose one vector per token has no layer to be distributed over.
    """
    if site.stacked:
        raise SpecError("stacked: distributions over layers need one vector per layer, got stacked")
    n = len(site.indices(lm.n_layers))
    found = LayerDistribution(n, sae.n_latents, n_blocks=64, device=lm.device)
    sums = {name: LayerDistribution(n, sae.n_latents, device=lm.device) for name in NULL_MODELS}
    # The numbers depend on where they are drawn; a GPU would wait for those of a CPU.
    drawn_on = lm.device if lm.device.type == "cuda" else "cpu"
    generator, noise = (torch.Generator(drawn_on).manual_seed(seed) for seed in (0, 1))
    seen = 0
    total = len(batches) if hasattr(batches, "__len__") else None
    counted = tqdm(batches, "distributions", total, disable=not progress)
    for batch in stream(lm, counted, site, lens):
        values, indices = sae.encode(batch.source)
        found.update(indices, values, batch.sequence + seen)
        sums["permuted"].update(*permute_layers(indices, values, generator))
        values, indices = sae.encode(gaussian_like(batch.source, noise))
        sums["gaussian"].update(indices, values)
        seen += int(batch.sequence.max()) + 1
    result, nulls = found.compute(), {name: null.compute() for name, null in sums.items()}
    resampled = found.bootstrap(replicates, generator)

    def of_all(result: DistributionResult) -> dict:
        return {"live": int(result.live.sum()), "mean_entropy": result.mean_entropy}

    numbers: dict = {"tokens": result.tokens, "latents": sae.n_latents, **of_all(result)}
    numbers["nulls"] = {name: of_all(null) for name, null in nulls.items()}
    for name, draws in resampled._asdict().items():
        value = getattr(result, name)
        low, high = basic_interval(value, draws)
        numbers[name] = {"value": value, "low": low, "high": high}
        numbers[name] |= {null: getattr(other, name) for null, other in nulls.items()}
    arrays = {
        "probs": result.probs.half(),
        **{f"probs_{name}": null.probs.half() for name, null in nulls.items()},
        "totals": result.totals.float(),
        "counts": result.counts.int(),
        "active_tokens": result.active_tokens.int(),
    }
    return {name: array.cpu().contiguous() for name, array in arrays.items()}, numbers


def _opening(batches: Iterator[Tensor], tokens: int) -> tuple[list[Tensor], list[Tensor]]:
    """The batches in which the first so many tokens lie, at least one sequence, and these tokens.

    However the text is cut into batches, the tokens are the same.
    """
    first, opening, left = [], [], 1
    while left > 0 and (batch := next(batches, None)) is not None:
        left = left if first else max(tokens // batch.shape[1], 1)
        first.append(batch)
        opening.append(batch[:left])
        left -= len(batch)
    return first, opening


def _layer_means(lm: LanguageModel, batches: list[Tensor], layers: list[int], point: str) -> Tensor:
    """(layer, d_model) mean over the non-special tokens, in the model's own basis."""
    moments = LayerMoments(len(layers), lm.d_model, lm.device)
    for tokens in batches:
        captured = lm.capture(tokens, layers, [point])[point]
        moments.update(captured[:, lm.keep_mask(tokens.to(lm.device))])
    return moments.mean


def _unstack(x: Tensor, n_layers: int) -> Tensor:
    """(1, token, n_layers · d_model) as (layer, token, d_model); other tensors as they are."""
    if x.shape[0] == n_layers:
        return x
    return x[0].unflatten(-1, (n_layers, -1)).transpose(0, 1)


def _replace(activation: Tensor, keep: Tensor, choices: list) -> Tensor:
    """(choice, batch, position, d_model): the activation with each choice at kept positions."""
    copies = activation.repeat(len(choices), 1, 1, 1)
    for copy, choice in zip(copies, choices, strict=True):
        copy[keep] = choice.to(copy.dtype) if isinstance(choice, Tensor) else choice
    return copies


def _score(
    lm: LanguageModel,
    original: Original,
    last: Tensor,
    rows: Tensor,
    downstream: Downstream,
    ablated: Tensor,
    start: int,
) -> None:
    """Add the losses of (layer, choice, batch, position, d_model) last residual streams.

    Logits are made for a few predictions at a time, so memory does not grow with the batch.
    """
    n, n_choices = last.shape[:2]
    targets = original.tokens[:, start + 1 :].flatten()
    streams = [original.residual[-1][None], last.flatten(0, 1)]
    streams = torch.cat([x[:, :, start:-1] for x in streams]).flatten(1, 2)
    at_once = LOGITS_AT_ONCE.get(lm.device.type, LOGITS_AT_ONCE["cpu"])
    size = max(1, at_once // (len(streams) * lm.vocab_size))
    for piece, target in _pieces(streams, targets, size):
        logits = lm.logits(piece)
        before, after = logits[0], logits[1:].unflatten(0, (n, n_choices))
        downstream.update(before, after[:, 0], target, rows.tolist())
        if n_choices > 1:
            for column in range(n_choices - 1):
                for row, scores in zip(rows.tolist(), after[:, 1 + column].float(), strict=True):
                    losses = F.cross_entropy(scores, target, reduction="none")
                    ablated[row, column] += losses.sum(dtype=torch.float64)


def _pieces(streams: Tensor, targets: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    yield from zip(streams.split(size, 1), targets.split(size), strict=True)
