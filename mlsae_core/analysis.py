"""Activations and a dictionary give tidy tables: one row per thing measured, a column per number.

Each measurement takes an `activations.ActivationSource`, the dictionary, and how many sequences are
read at a time, and makes one pass over the source.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mlsae_core.activations import ActivationSource, Work, needs_model, one_pass
from mlsae_core.metrics import (
    DistributionResult,
    Downstream,
    Drift,
    DriftResult,
    LayerDistribution,
    LayerMoments,
    Reconstruction,
    basic_interval,
    ce_recovered,
    cross_entropy,
    gaussian_like,
    permute_layers,
)
from mlsae_core.processes import ALONE, Share
from mlsae_core.resume import Pass
from mlsae_core.sae import MLSAE

# Numbers in the batch that replaced layers share as it grows: 64 MiB in float32, of which a block
# makes about 16 times as much. A GPU's batches are as large as its memory allows already.
VECTORS_AT_ONCE = {"cpu": 2**24}

# What distributions over layers are compared with: see `distributions`.
NULL_MODELS = ("permuted", "gaussian")


@torch.no_grad()
def evaluate(
    source: ActivationSource,
    sae: MLSAE,
    size: int = 8,
    *,
    ablations: bool | None = None,
    mean_tokens: int = 8192,
    layers_at_once: int | None = None,
    start: int = 0,
    replaced: int | None = None,
    progress: bool = True,
    share: Share = ALONE,
    checkpoint: Path | None = None,
) -> pd.DataFrame:
    """Reconstruction error and downstream loss of every layer.

    Where the source can put vectors back (`activations.TextSource.passes`), the site's target is
    replaced by its reconstruction, one layer at a time, and the rest of the model is run (MLSAE
    paper, Section 4.1 and Appendix B). The original pass is made once per batch. With a tuned lens,
    FVU, MSE and L1 are measured in the lens space and the downstream columns after its inverse.

    Args:
        source: `stacked` sites are measured layer by layer.
        sae: called as ``sae(source)``, or ``sae(source, target)`` for a transcoder.
        size: sequences that are read at a time.
        ablations: also replace each layer by zero and by its mean; about three times slower. By
            default where the source can.
        mean_tokens: read before the pass, to take the mean of a layer from them; whole sequences.
        layers_at_once: layers that share a growing batch; by default as many as `VECTORS_AT_ONCE`
            has room for.
        start: the position from which on vectors are replaced and measured, and predictions scored;
            those before it are context.
        replaced: sequences in which layers are replaced and predictions scored, spread evenly over
            the source; all by default.
        progress: show a progress bar.
        checkpoint: file to continue from if it exists, and to write every minute.
        share: where several processes measure together, each of which gets the whole table.

    Returns:
        One row per layer. Means over `tokens` non-special tokens: ``fvu_global``,
        ``fvu_per_dimension``, ``mse``, ``l1``, ``l0`` (number of non-zero latents; for stacked
        sites the same in every row). Fractions of latents: ``dead`` (never active at any layer of
        this sample, equal in every row), ``inactive`` (never at this layer). Only of a source that
        can put vectors back, means over `predictions`, in nats per predicted token:
        ``ce_original``, ``ce_replaced``, ``delta_ce``, ``kl`` (original ‖ replaced); ``logit_mse``.
        With `ablations`: ``ce_zero``, ``ce_mean``, and the fraction of the loss that each costs and
        the reconstruction recovers, ``ce_recovered_zero``, ``ce_recovered_mean``. With `replaced`,
        of both FVU, ``mse``, ``delta_ce`` and ``kl``: 95 % bootstrap intervals over sequences,
        ``_low`` and ``_high``.

    Raises:
        ActivationError: NaN or infinite activations, naming the batch and the layers.
        SpecError: `ablations`, `start` or `replaced` with a source that cannot put vectors back.
        ValueError: an empty source.
    """
    asked = {"ablations": ablations, "start": start, "replaced": replaced}
    for name in [name for name, value in asked.items() if value]:
        needs_model(source, name)
    replaces = hasattr(source, "passes")
    layers, device = source.site.indices(source.n_layers), source.device
    n = len(layers)
    others = torch.zeros(n, 0, source.d_model, device=device)
    if replaces and ablations is not False:
        others = source.ablations(mean_tokens, size)
    blocks = min(replaced or 1, 64)
    reconstruction = Reconstruction(n, source.d_model, device, blocks)
    downstream = Downstream(n, device, blocks)
    ablated = torch.zeros(others.shape[:2], dtype=torch.float64, device=device)  # Σ CE
    active = torch.zeros(n, sae.n_latents + 1, dtype=torch.bool, device=device)

    done = Pass(
        checkpoint, size, device, reconstruction=reconstruction, downstream=downstream,
        ablated=ablated, active=active,
    )  # fmt: skip
    own = share.index + done.first * share.count, share.count
    if replaces:
        passes = source.passes(size, start, *own, replaced)
    else:
        passes = ((batch, None) for batch in source.batches(size, None, *own))
    work, costs = Work(), _costs(source, layers) if replaces else None
    passes = one_pass(passes, source, size, "evaluate", progress, done, share, work)
    for number, (batch, put_back) in enumerate(passes, done.first):
        target = None if batch.target is batch.source else batch.target
        output = sae(batch.source) if target is None else sae(batch.source, target)
        values, indices = (part.expand(n, -1, -1) for part in output.topk)
        recon = _unstack(output.recon, n)
        sequence = batch.sequence + (number * share.count + share.index) * size
        reconstruction.update(_unstack(batch.target, n), recon, values, sequence)
        # Pairs below the threshold are counted in a spare column.
        spare = indices.masked_fill(values <= sae.dead_threshold, sae.n_latents)
        active.scatter_(1, spare.flatten(1), True)
        each = (1 + others.shape[1]) * batch.text.numel() * source.d_model
        at_once = layers_at_once or max(VECTORS_AT_ONCE.get(device.type, n * each) // each, 1)
        for rows in torch.arange(n).split(at_once) if put_back else ():
            part, rows = slice(int(rows[0]), int(rows[-1]) + 1), rows.tolist()
            for before, after, following, sequence in put_back(rows, recon[part], others[part]):
                downstream.update(before, after[:, 0], following, rows, sequence)
                for row, logits in zip(rows, after[:, 1:], strict=True):
                    for column, scores in enumerate(logits):
                        losses = cross_entropy(scores, following)
                        ablated[row, column] += losses.sum(dtype=torch.float64)
            work.done(float(costs[: rows[-1] + 1].sum() / costs.sum()))

    share.merge(reconstruction, downstream)
    ablated, active = share.sum(ablated), (share.sum(active) > 0)[:, :-1].double()
    columns = reconstruction.compute()._asdict()
    columns |= {"dead": 1 - active.amax(0).mean(), "inactive": 1 - active.mean(1)}
    if replaces:
        effect = downstream.compute()
        columns["predictions"] = effect.tokens
        columns |= {name: value for name, value in effect._asdict().items() if name != "tokens"}
        if (replaced or 0) > 1:
            columns |= _intervals(reconstruction, downstream)
        for name, total in zip(("zero", "mean"), ablated.unbind(1), strict=False):
            ce = columns[f"ce_{name}"] = total / effect.tokens
            recovered = ce_recovered(effect.ce_original, effect.ce_replaced, ce)
            columns[f"ce_recovered_{name}"] = recovered
    columns = {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in columns.items()}
    return pd.DataFrame({"layer": layers} | columns)


def _costs(source, layers: list[int]) -> Tensor:
    """What replacing each layer costs, in passes of a vector through a block: those above it, and
    the output embeddings, of which a block of 12 d_model² weights is the unit."""
    head = source.lm.vocab_size / (12 * source.d_model)
    return source.n_layers - 1 - torch.tensor(layers) + head


def _intervals(
    reconstruction: Reconstruction, downstream: Downstream, replicates: int = 1000
) -> dict[str, np.ndarray]:
    """95 % bootstrap intervals of every layer, over sequences."""
    generators = (torch.Generator().manual_seed(0) for _ in range(2))
    errors, effects = (
        found.bootstrap(replicates, generator)
        for found, generator in zip((reconstruction, downstream), generators, strict=True)
    )
    values = reconstruction.compute()._asdict() | downstream.compute()._asdict()
    draws = errors | {name: getattr(effects, name) for name in ("delta_ce", "kl")}
    found = {}
    for name, of_layers in draws.items():
        each = zip(values[name].tolist(), of_layers.T.cpu(), strict=True)
        ends = [basic_interval(value, of_layer) for value, of_layer in each]
        found |= dict(zip((f"{name}_low", f"{name}_high"), np.array(ends).T, strict=True))
    return found


def _unstack(x: Tensor, n_layers: int) -> Tensor:
    """(1, token, n_layers · d_model) as (layer, token, d_model); other tensors as they are."""
    if x.shape[0] == n_layers:
        return x
    return x[0].unflatten(-1, (n_layers, -1)).transpose(0, 1)


@torch.no_grad()
def distributions(
    source: ActivationSource,
    sae: MLSAE,
    size: int = 8,
    *,
    replicates: int = 1000,
    progress: bool = True,
    share: Share = ALONE,
    checkpoint: Path | None = None,
) -> tuple[dict[str, Tensor], dict]:
    """Distributions of every latent over layers, their variances, intervals and null models.

    Null models: ``permuted``, the codes of each token dealt anew to the layers; ``gaussian``, codes
    of isotropic Gaussian vectors with the norms of the activations, which the dictionary has not
    learnt to write (`metrics.permute_layers`, `metrics.gaussian_like`).

    Args:
        size: sequences that are read at a time; the null models are drawn batch by batch.
        replicates: bootstrap replicates over blocks of sequences, for 95 % intervals.
        checkpoint: file to continue from if it exists, and to write every minute; not of several
            processes, which keep in step.
        share: where several processes measure together, each of which gets the whole result.

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
        ValueError: an empty source.
    """
    source.site.refuse_stacked("distributions over layers")
    n, device = len(source.site.indices(source.n_layers)), source.device
    found = LayerDistribution(n, sae.n_latents, n_blocks=64, device=device)
    sums = {name: LayerDistribution(n, sae.n_latents, device=device) for name in NULL_MODELS}
    # The numbers depend on where they are drawn; a GPU would wait for those of a CPU.
    drawn_on = device if device.type == "cuda" else "cpu"
    generator, noise = (torch.Generator(drawn_on).manual_seed(seed) for seed in (0, 1))
    kept = checkpoint if share.count == 1 else None
    done = Pass(kept, size, device, found=found, sums=sums, generator=generator, noise=noise)
    own = source.batches(size, None, share.index + done.first, share.count)
    own = one_pass(own, source, size, "distributions", progress, done, share)
    for number, (counts, batch) in enumerate(share.rounds(own), done.first):
        for index, tokens in enumerate(counts):
            if index != share.index:  # what another draws, so that it is the same without it
                torch.rand(n, tokens, generator=generator, device=drawn_on)
                torch.randn(n, tokens, source.d_model, generator=noise, device=drawn_on)
            elif batch is not None:
                values, indices = sae.encode(batch.source)
                first = (number * share.count + index) * size
                found.update(indices, values, batch.sequence + first)
                sums["permuted"].update(*permute_layers(indices, values, generator))
                values, indices = sae.encode(gaussian_like(batch.source, noise))
                sums["gaussian"].update(indices, values)
    share.merge(found, *sums.values())
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


@torch.no_grad()
def drift(
    source: ActivationSource,
    size: int = 8,
    *,
    progress: bool = True,
    checkpoint: Path | None = None,
) -> DriftResult:
    """Norms and similarities of the layers' vectors, in two passes: the first finds their means.

    What a dictionary would predict, and whether layers are stacked, does not matter.

    Args:
        size: sequences that are read at a time.
        checkpoint: file to continue from if it exists, and to write every minute; that of the first
            pass stands beside it.

    Raises:
        ActivationError: NaN or infinite activations.
        ValueError: an empty source.
    """
    n, device = len(source.site.indices(source.n_layers)), source.device
    moments = LayerMoments(n, source.d_model, device)
    means = checkpoint and checkpoint.with_stem(f"{checkpoint.stem}-means")
    done = Pass(means, size, device, moments=moments)
    batches = source.batches(size, None, done.first)
    for batch in one_pass(batches, source, size, "means", progress, done):
        moments.update(_unstack(batch.source, n))
    found = Drift(moments.mean)
    done = Pass(checkpoint, size, device, found=found)
    batches = source.batches(size, None, done.first)
    for batch in one_pass(batches, source, size, "drift", progress, done):
        found.update(_unstack(batch.source, n), batch.sequence)
    return found.compute()
