"""What a measurement has added up so far, in a file from which it continues after a stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from mlsae_core import store

SECONDS = 60.0
EVERY = 20.0  # times as long as the last one took to write, at least


class Pass:
    """One pass over batches of `size` sequences on a device, whose sums are in `parts`.

    Args:
        path: the file, or nothing. It belongs to one pass of one size on one kind of device.
        parts: accumulators, tensors, generators and nested dictionaries of them by name, as they
            are before the first batch; those of a file that is there are put in their place, and
            `first` batches are behind them. Lists and dictionaries that begin empty are filled.

    Raises:
        StoreError: a file that is damaged, or holds other parts.
    """

    def __init__(self, path: Path | None, size: int, device: torch.device, **parts):
        self.path, self.parts, self.first = path, parts, 0
        self.device, self.of = device, [size, device.type]
        self.written, self.seconds = time.perf_counter(), 0.0  # when last, and how long it took
        if path is not None and path.is_file():
            with store.restoring(path, "the sums of this measurement") as content:
                self._restore(content)

    def _restore(self, content):
        if content["of"] == self.of:
            for name, part in self.parts.items():
                _restored(part, content["parts"][name], self.device)
            self.first = content["batches"]

    def batch_done(self):
        """Count a batch that is in all sums; write them if the last time is a minute ago."""
        self.first += 1
        began = time.perf_counter()
        if self.path is not None and began - self.written > max(SECONDS, EVERY * self.seconds):
            parts = {name: _state(part) for name, part in self.parts.items()}
            content = {"of": self.of, "batches": self.first, "parts": parts}
            store.save_checkpoint(self.path, content)
            self.written = time.perf_counter()
            self.seconds = self.written - began


def _state(part) -> Any:
    """Tensors, numbers and shapes of an accumulator, nested."""
    if isinstance(part, torch.Generator):
        return part.get_state()
    if (inner := _inner(part)) is not None:
        return {name: _state(value) for name, value in inner.items()}
    return part


def _restored(part, state, device):
    """`part` as `_state` saw it, changed in place; what it began without is put on `device`."""
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, Tensor):
        return part.copy_(state)
    elif part == []:
        part.extend(send_to_device(state, device))
    elif part == {}:
        part.update(send_to_device(state, device))
    elif (inner := _inner(part)) is not None:
        inner.update({name: _restored(value, state[name], device) for name, value in inner.items()})
    else:
        return state
    return part


def _inner(part) -> dict | None:
    """What a dictionary or an accumulator is made of."""
    if isinstance(part, Tensor | torch.Generator):
        return None
    return part if isinstance(part, dict) else getattr(part, "__dict__", None)
