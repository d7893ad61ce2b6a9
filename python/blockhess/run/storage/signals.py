"""SIGINT, SIGTERM and SIGHUP raise `Interrupted`: immediately, or, during the computation of a unit, between two steps.

A second signal does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(KeyboardInterrupt):
    """A signal, `signal`, asked the process to end. Shells expect the exit code 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal = number

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int]]:
        return type(self), (self.signal,)


class Catcher:
    """Signal handler; `pending` is the number of the signal that waits for the end of a step, or None."""

    def __init__(self) -> None:
        self.pending: int | None = None
        self._working = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        if self._working and self.pending is None:
            self.pending = number
        else:
            raise Interrupted(number)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Delay signals until `check` or the end of the block."""
        self._working = True
        try:
            yield
        finally:
            self._working = False
        self.check()

    def check(self) -> None:
        """Raise Interrupted if a signal is pending."""
        if self.pending is not None:
            raise Interrupted(self.pending)


@contextmanager
def caught() -> Iterator[Catcher]:
    """Handle CAUGHT by a Catcher in the main thread, except a SIGHUP that is ignored, as under nohup.

    Other threads leave the handlers unchanged.
    """
    catcher = Catcher()
    if threading.current_thread() is not threading.main_thread():
        yield catcher
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN else set()
    before = {number: signal.signal(number, catcher) for number in CAUGHT if number not in ignored}
    try:
        yield catcher
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
