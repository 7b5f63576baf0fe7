"""The processes of an accelerate launch: which one this is, and how they wait for each other."""

from __future__ import annotations

import functools
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import parse_flag_from_env

from mlsae_core.store import Stopped

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


def meet():
    """Wait for the other processes of a launch, however long one of them works alone.

    Raises:
        Stopped: one of them has ended.
    """
    if process_state().num_processes == 1:
        return
    try:
        torch.distributed.barrier(_patient())
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise Stopped(f"another process of this launch has ended, see there: {reason}") from error
