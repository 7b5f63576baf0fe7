"""The training loop of an MLSAE (Lawson et al. 2025, Section 3 and Appendix A), through accelerate.

Micro-batches are numbered over the whole run and dealt to processes in turn; a step's gradient is
the mean over its micro-batches. So how many processes there are does not change what is computed,
and a run continues after a stop from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from mlsae_core import activations, metrics, objective, store
from mlsae_core.activations import ActivationError
from mlsae_core.lens import Lens
from mlsae_core.lm import LanguageModel
from mlsae_core.sae import MLSAE
from mlsae_core.spec import RunSpec, SpecError, canonical, flat
from mlsae_core.text import StreamedBlocks, TokenBlocks

LOG_ROWS = 200
CHECKPOINT_SECONDS = 60.0
_ACCELERATE_PRECISION = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


class Trained(NamedTuple):
    """A trained autoencoder and its log: one row per interval, see `log_row`."""

    sae: MLSAE
    log: pd.DataFrame


class TrainingStopped(RuntimeError):
    """The run stopped before its end; the message says why and names the last checkpoint."""


def make_accelerator(run: RunSpec, trackers: list[str] | None = None, **options) -> Accelerator:
    """The accelerator a run asks for; a precision that the device does not have is refused."""
    if run.train.precision != "fp32" and not torch.cuda.is_available():
        raise SpecError(
            f"precision: {run.train.precision} needs a CUDA device, and there is none here; "
            "expected fp32"
        )
    return Accelerator(
        mixed_precision=_ACCELERATE_PRECISION[run.train.precision],
        log_with=trackers or None,
        **options,
    )


def build_sae(run: RunSpec, lm: LanguageModel) -> MLSAE:
    """The untrained autoencoder of a run; refuses k larger than the number of latents."""
    width = lm.d_model
    if run.site.stacked:
        width *= len(activations.site_layers(run.site, lm.n_layers))
    n_latents = width * run.sae.expansion_factor
    if run.sae.k > n_latents:
        raise SpecError(
            f"k: expected at most the {n_latents} latents that expansion_factor "
            f"{run.sae.expansion_factor} gives at width {width}, got {run.sae.k}"
        )
    return MLSAE(
        width,
        n_latents,
        run.sae.k,
        run.sae.aux_k,
        run.sae.standardize,
        dead_tokens=run.sae.dead_tokens,
        dead_threshold=run.sae.dead_threshold,
        generator=torch.Generator().manual_seed(run.train.seed),
    )


def train(
    run: RunSpec,
    lm: LanguageModel,
    blocks: TokenBlocks | StreamedBlocks,
    lens: Lens | None = None,
    *,
    accelerator: Accelerator | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    should_stop: Callable[[int], bool] = lambda step: False,
    description: str = "training",
) -> Trained:
    """Train the autoencoder of `run` on the activations of `lm` on `blocks`.

    Args:
        lens: the basis of the activations; by default the one `run.site` names.
        checkpoint: file to continue from if it exists and to write every `checkpoint_seconds`.
        should_stop: asked after every step; true ends the run at a checkpoint.

    Returns:
        The autoencoder on the accelerator's device, and the log: per interval the mean over its
        steps of loss, AuxK and FVU per layer (`fvu_<layer>`), the fraction of dead latents at its
        end, tokens so far and tokens per second.

    Raises:
        SpecError: precision, k, layers or hook points that do not fit the model or the device.
        TrainingStopped: NaN or infinite activations (with layer, batch and last checkpoint), or a
            stop that was asked for.
    """
    accelerator = accelerator or make_accelerator(run)
    sae = build_sae(run, lm).to(accelerator.device)
    lens = lens if lens is not None else Lens.load(run.site, accelerator.device)
    optimizer = sae.make_optimizer(run.train.learning_rate, run.train.adam_eps)
    plan = _Plan(run, accelerator)

    state = _restore(run, checkpoint, sae, optimizer, accelerator)
    first, log, running, seconds = state["step"], state["log"], state["running"], state["seconds"]
    if first == 0:
        _set_bias(sae, _stream(run, lm, blocks, lens, plan, start=0, every=1), accelerator)
    prepared = accelerator.prepare(optimizer)
    batches = _stream(run, lm, blocks, lens, plan, first * plan.micro_batches, plan.every)
    layers = activations.site_layers(run.site, lm.n_layers)
    names = ["stacked"] if run.site.stacked else layers
    interval = max(plan.steps // LOG_ROWS, 1)
    started = saved = time.perf_counter()

    def save(step: int):
        if checkpoint is None or not accelerator.is_main_process:
            return
        content = {
            "run": canonical(flat(run)),
            "sae": sae.state_dict(),
            "optimizer": optimizer.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else {},
            "step": step,
            "log": log,
            "running": running,
            "seconds": seconds + time.perf_counter() - started,
        }
        store.save_checkpoint(checkpoint, content)

    progress = tqdm(
        total=plan.steps * plan.step_tokens,
        initial=first * plan.step_tokens,
        desc=description,
        unit=" tokens",
        unit_scale=True,
        disable=not accelerator.is_main_process,
    )
    for step in range(first, plan.steps):
        try:
            step_log = _step(sae, prepared, batches, run, plan, accelerator)
        except ActivationError as error:
            reason = f"{error}; step {step} of {plan.steps}, {_kept(checkpoint)}"
            raise TrainingStopped(reason) from error
        running = step_log if running is None else running + step_log
        progress.update(plan.step_tokens)
        done = step + 1
        if done % interval == 0 or done == plan.steps:
            elapsed = seconds + time.perf_counter() - started
            row = _log_row(running / (done % interval or interval), names, done, plan, elapsed, sae)
            running = None
            if not row["loss"] < float("inf"):
                raise TrainingStopped(
                    f"loss is {row['loss']} at step {done} of {plan.steps}; {_kept(checkpoint)}"
                )
            log.append(row)
            progress.set_postfix(fvu=f"{row['fvu']:.4f}", dead=f"{row['dead_fraction']:.1%}")
            if accelerator.trackers:
                accelerator.log(row, step=done)
        stop = should_stop(done)
        if stop or time.perf_counter() - saved > checkpoint_seconds:
            save(done)
            saved = time.perf_counter()
        if stop and done < plan.steps:
            progress.close()
            raise TrainingStopped(f"stopped after step {done} of {plan.steps}; {_kept(checkpoint)}")
    progress.close()
    return Trained(sae, pd.DataFrame(log))


class _Plan:
    """How a run's tokens are cut: steps, micro-batches per step, sequences per micro-batch."""

    def __init__(self, run: RunSpec, accelerator: Accelerator):
        context = run.data.context_length
        self.sequences = max(run.train.micro_batch_tokens // context, 1)
        self.micro_batches = max(run.train.batch_tokens // (self.sequences * context), 1)
        self.step_tokens = self.micro_batches * self.sequences * context
        self.steps = max(run.train.tokens // self.step_tokens, 1)
        self.every, self.offset = accelerator.num_processes, accelerator.process_index
        if self.micro_batches % self.every:
            raise SpecError(
                f"batch_tokens: {self.micro_batches} micro-batches of {self.sequences * context} "
                f"tokens cannot be dealt to {self.every} processes; expected a multiple"
            )
        self.own_micro_batches = self.micro_batches // self.every


def _stream(run, lm, blocks, lens, plan: _Plan, start: int, every: int):
    """Activations of this process' micro-batches, from micro-batch number `start` on."""
    numbered = blocks.batches(plan.sequences, seed=run.train.seed, start=start)
    offset = plan.offset if every > 1 else 0
    own = itertools.islice(numbered, offset, None, every)
    return activations.stream(lm, own, run.site, lens)


@torch.no_grad()
def _set_bias(sae: MLSAE, batches, accelerator: Accelerator):
    """Start the bias at the geometric median of the first batch's standardised vectors."""
    scaled, _ = sae.standardise(next(batches).source)
    sae.pre_bias.copy_(metrics.geometric_median(scaled.flatten(0, 1)))


def _step(sae: MLSAE, optimizer, batches, run: RunSpec, plan: _Plan, accelerator: Accelerator):
    """One optimiser step; returns (2 + layers,) means of loss, AuxK and FVU per layer."""
    logs, fired, kept = [], torch.zeros_like(sae.tokens_since_active, dtype=torch.bool), 0
    for _ in range(plan.own_micro_batches):
        batch = next(batches)
        target = None if batch.target is batch.source else batch.target
        with accelerator.autocast():
            loss = objective.loss(sae, batch.source, target, run.sae.aux_alpha)
        accelerator.backward(loss.total / plan.own_micro_batches)
        logs.append(torch.cat([loss.total.detach()[None], loss.auxk[None], loss.fvu]))
        fired |= sae.fired(loss.topk)
        kept += len(batch.tokens)
    log = torch.stack(logs).mean(0)
    if accelerator.num_processes > 1:
        for parameter in sae.parameters():
            parameter.grad = accelerator.reduce(parameter.grad, "mean")
        log = accelerator.reduce(log, "mean")
        fired = accelerator.reduce(fired.int(), "sum") > 0
        kept = int(accelerator.reduce(torch.tensor(kept, device=fired.device), "sum"))
    optimizer.step()
    optimizer.zero_grad()
    sae.count_tokens(fired, kept)
    return log.cpu()


def _log_row(means, names, step, plan: _Plan, seconds, sae: MLSAE) -> dict[str, Any]:
    loss, auxk, *fvu = means.tolist()
    tokens = step * plan.step_tokens
    return {
        "step": step,
        "tokens": tokens,
        "loss": loss,
        "auxk": auxk,
        "fvu": sum(fvu) / len(fvu),
        "dead_fraction": float(sae.dead.float().mean()),
        "tokens_per_second": round(tokens / seconds),
        **{f"fvu_{name}": value for name, value in zip(names, fvu, strict=True)},
    }


def _kept(checkpoint: Path | None) -> str:
    if checkpoint is None or not checkpoint.exists():
        return "no checkpoint was written"
    return f"the last good checkpoint is {checkpoint}; the same command continues from it"


def _restore(run: RunSpec, checkpoint, sae, optimizer, accelerator) -> dict[str, Any]:
    fresh = {"step": 0, "log": [], "running": None, "seconds": 0.0}
    if checkpoint is None or not checkpoint.exists():
        return fresh
    state = store.load_checkpoint(checkpoint)
    if state["run"] != canonical(flat(run)):
        raise store.StoreError(f"{checkpoint}: belongs to another run; delete it to start anew")
    sae.load_state_dict(state["sae"])
    optimizer.load_state_dict(state["optimizer"])
    if accelerator.scaler and state["scaler"]:
        accelerator.scaler.load_state_dict(state["scaler"])
    return state
