"""When to save the state of a unit: so often that saving takes no more than SHARE of the time.

    wait after a save = max(LEAST_SECONDS, seconds of the save / SHARE)

The state on a CUDA device is copied to pinned memory asynchronously and written once the copy is complete; the device
continues meanwhile.
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
# Assumed time of the first save: that of a slow disk.
FIRST_SECONDS, FIRST_BYTES_PER_SECOND = 0.02, 1e8


def copied(state: State) -> tuple[State, Event | None]:
    """Return the state on the host, and the CUDA event that completes the copy; None if it is on the host already."""
    device = state.tensors["v"].device if "v" in state.tensors else torch.device("cpu")
    if device.type != "cuda":
        return state, None
    tensors = {
        name: torch.empty(t.shape, dtype=t.dtype, pin_memory=True, device="cpu").copy_(t, non_blocking=True)
        for name, t in state.tensors.items()
    }
    return replace(state, tensors=tensors), torch.cuda.current_stream(device).record_event()


class Checkpoints:
    """Saves states periodically by save(state, number of products); took `seconds` for `count` saves so far."""

    def __init__(self, save: Callable[[State, int], None]) -> None:
        self._save = save
        self._due: float | None = None
        self._copy: tuple[State, int, Event | None] | None = None
        self.seconds, self.count = 0.0, 0

    def after_step(self, state: State, hvps: int) -> None:
        """Save the state if a save is due; to be called after every step."""
        start = time.perf_counter()
        if self._due is None:
            self._due = start + wait_after(FIRST_SECONDS + state.nbytes / FIRST_BYTES_PER_SECOND)
        if self._copy is None and start >= self._due:
            state, arrived = copied(state)
            self._copy = state, hvps, arrived
        if self._copy is not None and (self._copy[2] is None or self._copy[2].query()):
            self._write(start)

    def save_now(self, state: State, hvps: int) -> None:
        """Save the state before returning."""
        self._copy = state.copy(), hvps, None
        self._write(time.perf_counter())

    def forget(self) -> None:
        """Discard a pending copy, because its unit is complete."""
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
    """Return the seconds to wait after a save that took `cost` seconds."""
    return max(LEAST_SECONDS, cost / SHARE)
