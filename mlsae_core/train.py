"""The training loop of an MLSAE (Lawson et al. 2025, Section 3 and Appendix A), through accelerate.

Micro-batches are numbered over the whole run and dealt to processes in turn; a step's gradient is
the mean over its micro-batches. So how many processes there are does not change what is computed,
and a run continues after a stop from its last checkpoint as if nothing had happened.
"""

from __future__ import annotations

import itertools
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType, recursively_apply
from torch import Tensor
from tqdm.auto import tqdm

from mlsae_core import activations, kernels, metrics, objective, stops, store
from mlsae_core.activations import ActivationError, ActivationSource, Batch
from mlsae_core.kernels import Kernel
from mlsae_core.keys import run_settings
from mlsae_core.processes import process_state
from mlsae_core.sae import MLSAE
from mlsae_core.spec import RunSpec, SpecError
from mlsae_core.store import Stopped

LOG_ROWS = 200
CHECKPOINT_SECONDS = 60.0
CHECKPOINT_EVERY = 20.0  # times as long as the last one took to write, at least
_ACCELERATE_PRECISION = {"fp32": "no", "tf32": "no", "fp16": "fp16", "bf16": "bf16"}


class Trained(NamedTuple):
    """A trained autoencoder, its log (see `train`), and the seconds of training, stops left out."""

    sae: MLSAE
    log: pd.DataFrame
    seconds: float


def make_accelerator(
    run: RunSpec, trackers: tuple[str, ...] = (), *, cpu: bool = False, **options
) -> Accelerator:
    """The accelerator a run asks for; `cpu`: where the language model is on the CPU.

    Raises:
        SpecError: a precision that the device does not have, or a batch that cannot be dealt to the
            processes.
    """
    precision, device = _ACCELERATE_PRECISION[run.train.precision], process_state(cpu).device
    if run.train.precision != "fp32" and device.type != "cuda":
        raise SpecError(
            f"precision: expected fp32 on {device.type}, got {run.train.precision}, which needs a "
            "CUDA device"
        )
    AcceleratorState._reset_state()  # else the precision of this process' first run stays
    accelerator = Accelerator(mixed_precision=precision, log_with=list(trackers) or None, **options)
    _Plan.of(run, accelerator)
    return accelerator


def check_trackers(names: tuple[str, ...]):
    """Refuse trackers that accelerate does not know or whose package is not installed."""
    known = [name for name in LoggerType.list() if name != "all"]
    for name in names:
        if name not in known:
            raise SpecError(f"--track: expected one of {', '.join(known)}, got {name}")
        if name not in get_available_trackers():
            raise SpecError(
                f"--track: expected an installed tracker, got {name}, whose package is missing; "
                f"`pip install {name.replace('_', '-')}` installs it"
            )


def build_sae(run: RunSpec, source: ActivationSource) -> MLSAE:
    """The untrained autoencoder of a run; refuses what `RunSpec.n_latents` refuses."""
    n_latents = run.n_latents(source.n_layers, source.d_model)
    return MLSAE(
        n_latents // run.sae.expansion_factor,
        n_latents,
        run.sae.k,
        run.sae.aux_k,
        run.sae.standardize,
        dead_tokens=run.sae.dead_tokens,
        dead_threshold=run.sae.dead_threshold,
        activation=run.sae.activation,
        generator=torch.Generator().manual_seed(run.train.seed),
    )


def train(
    run: RunSpec,
    source: ActivationSource,
    *,
    accelerator: Accelerator | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    should_stop: Callable[[int], bool] = lambda step: False,
    description: str = "training",
    kernel: Kernel = "sparse",
) -> Trained:
    """Train the autoencoder of `run` on the activations of `source`.

    Args:
        source: where activations come from, at the run's site.
        accelerator: on the device of `source`; by default one is made there.
        checkpoint: file to continue from if it exists, and to write every `checkpoint_seconds` or
            20 times as long as it took to write, whichever is longer; also when a signal (`stops`)
            or text that is no longer to be had ends the run.
        should_stop: asked after every step but the last; true ends the run at a checkpoint.
        kernel: how the same numbers are computed, see `mlsae_core.kernels`.

    Returns:
        The autoencoder on the device of `source`, and the log, at most 400 rows. Each is of
        the interval that ends with optimiser step ``step``, when ``tokens`` training tokens were
        read; means over its steps of ``loss`` (see `objective.Loss.total`), ``auxk``
        (0 while no latent is dead), ``fvu`` (mean over layers) and ``fvu_<layer>`` (one per layer,
        or ``fvu_stacked``), all global FVU (see `objective`); ``dead_fraction`` of latents at
        its end; ``tokens_per_second`` since the start.

    Raises:
        SpecError: precision, batch, k or site that do not fit the activations or device, or an
            accelerator on another device than theirs.
        StoreError: a checkpoint that is damaged, of another run or of other activations.
        Stopped: NaN or infinite activations or loss, text that holds nothing but special tokens or
            can be read no further (with the batch, the step and the last checkpoint), or a stop
            that was asked for. stops.Interrupted: a signal came.
    """
    sites = (replace(s, layers=s.indices(source.n_layers)) for s in (run.site, source.site))
    activations.check_site(*sites, [f.name for f in fields(run.site)], "are")
    accelerator = accelerator or make_accelerator(run, cpu=source.device.type == "cpu")
    device = torch.empty(0, device=accelerator.device).device  # with its number
    if device != source.device:
        raise SpecError(
            f"accelerator: expected the activations' device {source.device}, got {device}; move "
            "the model there, or leave the accelerator out"
        )
    kernels.check(kernel, device)
    sae = build_sae(run, source).to(device)
    sae.kernel = kernel
    optimizer = sae.make_optimizer(run.train.learning_rate, run.train.adam_eps)
    loop = _Loop(run, source, accelerator, sae, optimizer, _Plan.of(run, accelerator))
    saved = _Checkpoint(checkpoint, loop)
    state = saved.restore()
    progress = tqdm(
        total=loop.plan.steps * loop.plan.step_tokens,
        initial=state.step * loop.plan.step_tokens,
        desc=description,
        unit=" tokens",
        unit_scale=True,
        disable=not accelerator.is_main_process,
    )
    try:
        together = stops.held(throughout=True) if loop.plan.every > 1 else nullcontext()
        with stops.raised(), together, progress, _products(run.train.precision):
            for row in loop.steps(state):
                progress.update(loop.plan.step_tokens)
                if row is not None:
                    progress.set_postfix(
                        fvu=f"{row['fvu']:.4f}", dead=f"{row['dead_fraction']:.1%}"
                    )
                    accelerator.log(row, step=state.step)
                stop = state.step < loop.plan.steps and should_stop(state.step)
                if stop or saved.is_due(checkpoint_seconds):
                    saved.write(state)
                if stop:
                    raise Stopped("stopped as asked")
            saved.settle()
    except (Stopped, ActivationError, stops.Interrupted) as error:
        if isinstance(error, store.Unavailable | stops.Interrupted):  # between two steps
            with stops.held():  # a launcher whose process ends stops the others
                saved.write(state)
                saved.settle()
                # After the last step the others are told nothing more, and would not come.
                if isinstance(error, stops.Interrupted) and state.step < loop.plan.steps:
                    accelerator.wait_for_everyone()
        saved.settle()
        where = f"after step {state.step} of {loop.plan.steps}; {kept(checkpoint)}"
        if isinstance(error, stops.Interrupted):
            raise error.kept(where) from error
        raise Stopped(f"{error}, {where}") from error
    finally:
        saved.close()
    return Trained(sae, pd.DataFrame(state.log), state.seconds)


@contextmanager
def _products(precision: str) -> Iterator[None]:
    """Products on a GPU are in TensorFloat-32 while this is entered, if the run says so."""
    setting = torch.backends.cuda.matmul
    before, setting.allow_tf32 = setting.allow_tf32, precision == "tf32"
    try:
        yield
    finally:
        setting.allow_tf32 = before


@dataclass
class _State:
    """What a checkpoint holds besides the weights and the optimiser: how far a run is.

    running: (2 + layers,) sums of loss, AuxK and FVU over the steps since the last log row.
    """

    step: int = 0
    seconds: float = 0.0
    running: Tensor | None = None
    log: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class _Plan:
    """How a run's tokens are cut, and which micro-batches are this process' own.

    sequences: per micro-batch. micro_batches: per step, of all processes. every: processes.
    """

    sequences: int
    micro_batches: int
    step_tokens: int
    steps: int
    every: int
    offset: int

    @classmethod
    def of(cls, run: RunSpec, accelerator: Accelerator) -> _Plan:
        """The plan of a run; a step whose micro-batches cannot be dealt evenly is refused."""
        context, every = run.data.context_length, accelerator.num_processes
        sequences = run.train.micro_batch_tokens // context
        micro_batches = run.train.batch_tokens // (sequences * context)
        if micro_batches % every:
            raise SpecError(
                f"batch_tokens: expected a multiple of {every} micro-batches, one for each "
                f"process, got {micro_batches} micro-batches of {sequences * context} tokens"
            )
        step_tokens = micro_batches * sequences * context
        steps = run.train.tokens // step_tokens
        return cls(sequences, micro_batches, step_tokens, steps, every, accelerator.process_index)


@dataclass(frozen=True)
class _Loop:
    """What a run is made of, and its steps."""

    run: RunSpec
    source: ActivationSource
    accelerator: Accelerator
    sae: MLSAE
    optimizer: torch.optim.Optimizer
    plan: _Plan

    def steps(self, state: _State) -> Iterator[dict[str, Any] | None]:
        """Make the steps that are left, one per item; yields a log row where an interval ends."""
        plan, interval = self.plan, max(self.plan.steps // LOG_ROWS, 1)
        numbered = plan.sequences, self.run.train.seed
        if state.step == 0:
            self.set_bias(next(self.source.batches(*numbered)))
        first = state.step * plan.micro_batches + plan.offset
        batches = _Ahead(self.source.batches(*numbered, first, plan.every))
        prepared = self.accelerator.prepare(self.optimizer)
        dead = self.sae.dead.nonzero().squeeze(1)
        last = time.perf_counter()
        while state.step < plan.steps:
            with stops.held():  # a checkpoint has all of a step or nothing
                queued, order = self.step(batches, prepared, dead)
                if queued.device.type != "cpu" and state.step + 1 < plan.steps:
                    batches.make()  # the language model works while the host waits for this step
                *sums, n_dead, told = queued.cpu()
                sums, dead = torch.stack(sums), order[: int(n_dead)]
                if not sums.isfinite().all():
                    raise Stopped(f"loss is {float(sums[0])}")
                state.running = sums if state.running is None else state.running + sums
                state.step += 1
                now = time.perf_counter()
                state.seconds, last = state.seconds + now - last, now
                row = None
                if state.step % interval == 0 or state.step == plan.steps:
                    row = self.row(state, state.step % interval or interval, len(dead))
                    state.log.append(row)
                    state.running = None
            yield row
            if told:  # one of several processes was to stop
                raise stops.Interrupted(stops.waiting() or signal.SIGTERM)

    @torch.no_grad()
    def set_bias(self, batch: Batch):
        """Start the bias at the geometric median of the first batch's standardised vectors, and the
        activation with them."""
        scaled = self.sae.standardise(batch.source)[0].flatten(0, 1)
        self.sae.pre_bias.copy_(metrics.geometric_median(scaled))
        self.sae.activation.start(self.sae, scaled)

    def step(self, batches: Iterator[Batch], optimizer, dead: Tensor) -> tuple[Tensor, Tensor]:
        """One optimiser step with the dead latents given, queued: nothing in it waits for a device.

        Returns (2 + layers + 2,) means of loss, AuxK and FVU per layer, the number of latents that
        are dead after it, and whether one of several processes is to stop; and all latents, the
        dead ones first.
        """
        sae, accelerator, own = (
            self.sae,
            self.accelerator,
            self.plan.micro_batches // self.plan.every,
        )
        logs, fired, kept = [], torch.zeros_like(sae.tokens_since_active, dtype=torch.bool), 0
        coefficients = (self.run.sae.aux_alpha, self.run.sae.l0_coefficient or 0.0)
        for batch in itertools.islice(batches, own):
            target = None if batch.target is batch.source else batch.target
            with accelerator.autocast():
                loss = objective.loss(sae, batch.source, target, *coefficients, dead)
            accelerator.backward(loss.total / own)
            logged = [loss.total.detach()[None], loss.auxk[None], loss.fvu]
            logs.append(torch.cat([*logged, loss.seen]))
            fired |= loss.fired
            kept += len(batch.tokens)
        log = torch.stack(logs).mean(0)
        told = log.new_zeros(())
        if self.plan.every > 1:
            for parameter in sae.parameters():
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
            log = accelerator.reduce(log, "mean")
            fired = accelerator.reduce(fired.int(), "sum") > 0
            # Not torch.tensor, which makes the host wait for the device.
            kept = accelerator.reduce(torch.full((), kept, device=fired.device), "sum")
            told = accelerator.reduce(told + stops.waiting(), "sum")
        optimizer.step()
        optimizer.zero_grad()
        log, seen = log.tensor_split([len(log) - len(loss.seen)])
        sae.activation.update(seen)
        sae.count_tokens(fired, kept)
        dead = sae.dead
        order = dead.byte().argsort(descending=True, stable=True)
        return torch.cat([log, torch.stack([dead.sum().to(log), told])]), order

    def row(self, state: _State, steps: int, n_dead: int) -> dict[str, Any]:
        """The log row of the `steps` steps since the last one, with `n_dead` latents now dead."""
        loss, auxk, *fvu = (state.running / steps).tolist()
        site, tokens = self.run.site, state.step * self.plan.step_tokens
        names = ["stacked"] if site.stacked else site.indices(self.source.n_layers)
        return {
            "step": state.step,
            "tokens": tokens,
            "loss": loss,
            "auxk": auxk,
            "fvu": sum(fvu) / len(fvu),
            "dead_fraction": n_dead / self.sae.n_latents,
            "tokens_per_second": round(tokens / state.seconds),
            **{f"fvu_{name}": value for name, value in zip(names, fvu, strict=True)},
        }


class _Ahead(Iterator):
    """An iterator whose next item can be made before it is asked for.

    Signals do not wait while one is waited for: nothing has changed by then.
    """

    def __init__(self, items: Iterator):
        self._items, self._made = items, []

    def make(self):
        """An error is raised where the item would be used."""
        try:
            self._made = [(next(self._items), None)]
        except Exception as error:
            self._made = [(None, error)]

    def __next__(self):
        with stops.released():
            item, error = self._made.pop() if self._made else (next(self._items), None)
        if error is not None:
            raise error
        return item


class _Checkpoint:
    """The file from which a run continues, or none.

    Of a device's tensors a copy is queued, and written while the next steps are made.
    """

    def __init__(self, path: Path | None, loop: _Loop):
        self.path, self.loop = path, loop
        self.source = loop.source.key if path else None
        self.written, self.seconds = time.perf_counter(), 0.0  # when last, and how long it took
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future | None = None

    def is_due(self, interval: float) -> bool:
        """Whether so many seconds have passed since the last one, and writing stays a small share.

        Of a large dictionary it takes seconds, in which a CPU trains nothing.
        """
        if self._writing is not None and not self._writing.done():
            return False
        return time.perf_counter() - self.written > max(interval, CHECKPOINT_EVERY * self.seconds)

    def write(self, state: _State):
        """Write all that the rest of the run depends on; the main process does it for all."""
        loop = self.loop
        if self.path is None or not loop.accelerator.is_main_process:
            return
        self.settle()
        scaler = loop.accelerator.scaler
        content = {
            "run": run_settings(loop.run),
            "source": self.source,
            "sae": loop.sae.state_dict(),
            "optimizer": loop.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else {},
            "state": vars(state),
        }
        if loop.sae.encoder.device.type == "cpu":
            self._save(content)
        else:
            self._writing = self._writer.submit(self._save, *_in_host_memory(content))

    def settle(self):
        """Wait for what is being written; an error of it is raised here."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self):
        """Wait for what is being written, whatever becomes of it."""
        self._writer.shutdown()

    def _save(self, content: dict, copied: torch.cuda.Event | None = None):
        began = time.perf_counter()
        if copied is not None:
            copied.synchronize()
        store.save_checkpoint(self.path, content)
        self.written = time.perf_counter()
        self.seconds = self.written - began

    def restore(self) -> _State:
        """Where the run stands; weights and optimiser are set to it."""
        if self.path is None or not self.path.exists():
            return _State()
        loop = self.loop
        with store.restoring(self.path, "a checkpoint of this run") as content:
            if content["run"] != run_settings(loop.run):
                raise ValueError("it belongs to another run")
            if content["source"] != self.source:
                raise ValueError("it was trained on other activations")
            state = _State(**content["state"])
            if state.step not in range(loop.plan.steps + 1):
                raise ValueError(f"its step is {state.step} of {loop.plan.steps}")
            loop.sae.load_state_dict(content["sae"])
            loop.optimizer.load_state_dict(content["optimizer"])
            if loop.accelerator.scaler and content["scaler"]:
                loop.accelerator.scaler.load_state_dict(content["scaler"])
            return state


def _in_host_memory(state: dict) -> tuple[dict, torch.cuda.Event | None]:
    """A copy of all tensors, and the event after which it is whole where nothing waits for it."""
    cuda = torch.cuda.is_available()

    def copy(tensor: Tensor) -> Tensor:
        # A copy that nothing waits for is made in pinned memory.
        at_home = tensor.device.type == "cpu"
        return tensor.clone() if at_home else tensor.to("cpu", non_blocking=cuda)

    copied = recursively_apply(copy, state)
    if not cuda:
        return copied, None
    whole = torch.cuda.Event()
    whole.record()
    return copied, whole


def kept(checkpoint: Path | None) -> str:
    """What is left after a stop, for messages."""
    if checkpoint is None or not checkpoint.exists():
        return "no checkpoint was written"
    return f"the last good checkpoint is {checkpoint}; the same command continues from it"
