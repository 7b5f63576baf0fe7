"""Stops from outside: Ctrl-C, a scheduler's SIGTERM, the SIGHUP of a terminal that is closed."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_waiting: list[int] | None = None  # signals that came while they were held back
_throughout = False  # whether they are until the outermost `held` is left


class Interrupted(KeyboardInterrupt):
    """One of the signals came; the message, if any, says what is kept."""

    def __init__(self, number: int = signal.SIGINT, message: str = ""):
        super().__init__(message)
        self.number = number

    def kept(self, message: str) -> Interrupted:
        """The same, with what is kept."""
        return Interrupted(self.number, f"stopped by {signal.Signals(self.number).name}, {message}")


@contextmanager
def raised() -> Iterator[None]:
    """The signals raise `Interrupted` while this is entered.

    Those that are ignored, as under nohup, stay so. In other threads than the main one nothing
    changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _raise)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def held(throughout: bool = False) -> Iterator[None]:
    """The signals wait until this is left, for what has to change as a whole.

    throughout: whatever is held or released within. So do several processes, one of which would
    wait for the others where these have stopped: they settle by `waiting` where all do.
    """
    global _waiting, _throughout
    if _throughout:
        yield
        return
    _waiting, _throughout = (came := []), throughout
    try:
        yield
    finally:
        _waiting, _throughout = None, False
    if came:
        raise Interrupted(came[0])


@contextmanager
def released() -> Iterator[None]:
    """Within `held`, they do not wait while this is entered."""
    global _waiting
    if _throughout:
        yield
        return
    waiting, _waiting = _waiting, None
    if waiting:
        raise Interrupted(waiting[0])
    try:
        yield
    finally:
        _waiting = waiting


def waiting() -> int:
    """The number of the first signal that is held back, or 0."""
    return _waiting[0] if _waiting else 0


def _raise(number: int, _):
    if _waiting is None:
        raise Interrupted(number)
    _waiting.append(number)
