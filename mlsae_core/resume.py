"""What a measurement has added up so far, in a file from which it continues after a stop."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlsae_core import store

SECONDS = 60.0
EVERY = 20.0  # times as long as the last one took to write, at least


class Pass:
    """One pass over batches of `size` sequences, whose sums are in `parts`.

    Args:
        parts: accumulators, tensors and generators by name, as they are before the first batch;
            those of a file that is there are put in their place, and `first` batches are behind
            them.
        path: the file, or nothing. It belongs to one pass of one size on one kind of device.

    Raises:
        StoreError: a file that is damaged, or holds other parts.
    """

    def __init__(self, path: Path | None, size: int, **parts):
        self.path, self.parts, self.first = path, parts, 0
        self.of = [size, *sorted({t.device.type for t in _tensors(parts)})]
        self.written, self.seconds = time.perf_counter(), 0.0  # when last, and how long it took
        if path is not None and path.is_file():
            self._restore(store.load_checkpoint(path))

    def _restore(self, content):
        try:
            if content["of"] == self.of:
                for name, part in self.parts.items():
                    _restored(part, content["parts"][name])
                self.first = content["batches"]
        except (KeyError, TypeError, RuntimeError) as error:  # as of another version of the code
            raise store.StoreError(
                f"{self.path}: expected the sums of this measurement; {error}; delete it to start "
                "anew"
            ) from error

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


def _restored(part, state):
    """`part` as `_state` saw it; accumulators and generators are changed in place."""
    if isinstance(part, torch.Generator):
        part.set_state(state)
    elif isinstance(part, Tensor):
        return part.copy_(state)
    elif (inner := _inner(part)) is not None:
        inner.update({name: _restored(value, state[name]) for name, value in inner.items()})
    else:
        return state
    return part


def _inner(part) -> dict | None:
    """What a dictionary or an accumulator is made of."""
    if isinstance(part, Tensor | torch.Generator):
        return None
    return part if isinstance(part, dict) else getattr(part, "__dict__", None)


def _tensors(part):
    if isinstance(part, Tensor):
        yield part
    for inner in (_inner(part) or {}).values():
        yield from _tensors(inner)
