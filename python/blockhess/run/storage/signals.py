"""Signals that ask a process to end: kept until its state is saved.

SIGINT and SIGTERM raise `Interrupted`: at once, or while work is under way when that asks, between two steps. The
second one does not wait.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The process was asked to end.

    Attributes:
        signal: which signal asked. Shells expect the exit code 128 + signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.signal = number


class Catcher:
    """Keeps what signals ask for, while `caught` lasts.

    Attributes:
        pending: the signal that waits, or None.
    """

    def __init__(self) -> None:
        self.pending: int | None = None
        self._working = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Takes a signal."""
        if self._working and self.pending is None:
            self.pending = number
        else:
            raise Interrupted(number)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Signals wait until `check`, or until the end of the work."""
        self._working = True
        try:
            yield
        finally:
            self._working = False
        self.check()

    def check(self) -> None:
        """Raises Interrupted if a signal waits."""
        if self.pending is not None:
            raise Interrupted(self.pending)


@contextmanager
def caught() -> Iterator[Catcher]:
    """SIGINT and SIGTERM go to the Catcher, in the main thread; in others they stay what they are."""
    catcher = Catcher()
    if threading.current_thread() is not threading.main_thread():
        yield catcher
        return
    before = {number: signal.signal(number, catcher) for number in CAUGHT}
    try:
        yield catcher
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
