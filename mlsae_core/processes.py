"""The processes of an accelerate launch: which one this is, and how they wait for each other."""

from __future__ import annotations

import functools
import io
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from mlsae_core.store import Stopped

T = TypeVar("T")
WAIT = timedelta(days=30)


def process_state(cpu: bool = False) -> PartialState:
    """This process among those of an accelerate launch, on the CPU where the launch says so.

    cpu: also where the launch does not, which only a process that is alone can decide.
    """
    cpu = cpu or parse_flag_from_env("ACCELERATE_USE_CPU")
    state = PartialState(cpu=cpu)
    other = state.device.type != "cpu" if cpu else state._cpu
    if other and state.num_processes == 1:
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=cpu)
    return state


@functools.cache
def _patient() -> torch.distributed.ProcessGroup:
    """All processes, once more, without the limit of training's own reductions."""
    return torch.distributed.new_group(timeout=WAIT, backend="gloo")


@contextmanager
def _together() -> Iterator[torch.distributed.ProcessGroup]:
    try:
        yield _patient()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise Stopped(f"another process of this launch has ended, see there: {reason}") from error


def meet():
    """Wait for the other processes of a launch, however long one of them works alone.

    Raises:
        Stopped: one of them has ended.
    """
    if process_state().num_processes > 1:
        with _together() as group:
            torch.distributed.barrier(group)


@dataclass(frozen=True)
class Share:
    """Which of the processes this is that measure something together, and how many they are.

    Each reads every `count`-th batch from number `index` on, and all get what all have summed.
    """

    index: int = 0
    count: int = 1

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in their order; tensors on the CPU, if they are several.

        Raises:
            Stopped: one of the others has ended.
        """
        if self.count == 1:
            return [value]
        written, found = io.BytesIO(), [None] * self.count
        torch.save(value, written)
        with _together() as group:
            torch.distributed.all_gather_object(found, written.getvalue(), group)
        read = (io.BytesIO(each) for each in found)  # from processes of this launch alone
        return [torch.load(each, "cpu", weights_only=False) for each in read]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the tensors of all processes."""
        return torch.stack([each.to(tensor.device) for each in self.gather(tensor)]).sum(0)

    def merge(self, *accumulators):
        """Let accumulators have seen what those of all processes have."""
        for index, others in enumerate(self.gather(accumulators)):
            for mine, other in zip(accumulators, others, strict=True):
                if index != self.index:
                    mine.merge(other)

    def rounds(self, batches: Iterable[T]) -> Iterator[tuple[list[int], T | None]]:
        """The vectors in the next `activations.Batch` of each process, and the own one, until no
        one has any."""
        for batch in itertools.chain(batches, itertools.repeat(None)):
            counts = self.gather(0 if batch is None else len(batch.tokens))
            if not any(counts):
                return
            yield counts, batch


ALONE = Share()
