"""When the state of a run is saved: so often that it takes no more than SHARE of the time.

    wait after a save = max(LEAST_SECONDS, what it took / SHARE)

From a CUDA device the state is copied to pinned memory behind the kernels, and written once it has arrived; meanwhile
the device goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from blockhess_ext import State
from blockhess_ext.completion import Event

SHARE = 0.02
LEAST_SECONDS = 1.0
# Until a save was measured: what a slow disk takes.
FIRST_SECONDS, FIRST_BYTES_PER_SECOND = 0.02, 1e8


def copied(state: State) -> tuple[State, Event | None]:
    """The state on the host, and what says that it is all there: itself, and nothing, if it is there already."""
    device = state.tensors["v"].device if "v" in state.tensors else torch.device("cpu")
    if device.type != "cuda":
        return state, None
    tensors = {
        name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
        for name, t in state.tensors.items()
    }
    return replace(state, tensors=tensors), torch.cuda.current_stream(device).record_event()


class Checkpoints:
    """Saves states at times.

    Args:
        save: writes one; given the state and what belongs to it.

    Attributes:
        seconds: that saving took. count: of saves.
    """

    def __init__(self, save: Callable[[State, int], None]) -> None:
        self._save = save
        self._due: float | None = None
        self._copy: tuple[State, int, Event | None] | None = None
        self.seconds, self.count = 0.0, 0

    def after_step(self, state: State, hvps: int) -> None:
        """To be called after every step; saves where it is time."""
        start = time.perf_counter()
        if self._due is None:
            self._due = start + wait_after(FIRST_SECONDS + state.nbytes / FIRST_BYTES_PER_SECOND)
        if self._copy is None and start >= self._due:
            state, arrived = copied(state)
            self._copy = state, hvps, arrived
        if self._copy is not None and (self._copy[2] is None or self._copy[2].query()):
            self._write(start)

    def save_now(self, state: State, hvps: int) -> None:
        """Saves, and returns when that is done."""
        self._copy = state.copy(), hvps, None
        self._write(time.perf_counter())

    def forget(self) -> None:
        """The unit is done: a copy under way is of no use."""
        self._copy = None

    def _write(self, start: float) -> None:
        assert self._copy is not None
        state, hvps, _ = self._copy
        self._save(state, hvps)
        self._copy = None
        now = time.perf_counter()
        self.seconds, self.count = self.seconds + now - start, self.count + 1
        self._due = now + wait_after(now - start)


def wait_after(cost: float) -> float:
    """Seconds until the next save, after one that took so many."""
    return max(LEAST_SECONDS, cost / SHARE)
