"""Tracking on the host which recurrences have finished, without waiting for the device's current work.

On a GPU the answer is a few steps old: kernels skip a finished recurrence anyway. How old depends on the number of the
step alone, so that an operator that skips finished vectors makes the same products in every run, also a resumed one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from blockhess_ext.recurrences import NON_FINITE, RUNNING, Recurrences


class Event(Protocol):
    """A point in a device's queue of work."""

    def synchronize(self) -> None:
        """Wait until the device has reached it."""

    def query(self) -> bool:
        """Return whether the device has reached it."""


class Completion:
    """Completion of recurrences on the CPU, known immediately.

    Args:
        recurrences: their status.
        step: number of steps made so far.
    """

    def __init__(self, recurrences: Recurrences, step: int = 0) -> None:
        self._status = recurrences.status

    def poll(self, step: int) -> Tensor:
        """Return which recurrences are known to have finished, (n_probes, n_blocks) bool on the CPU.

        Args:
            step: number of steps made so far; call it once after every step.
        """
        return self._status != RUNNING


class DeviceCompletion(Completion):
    """Completion of recurrences on a GPU: every few steps, its status is copied, to be read at the next copy.

    The host thus never is more than 2 * EVERY steps ahead of the device.
    """

    EVERY = 4  # steps

    def __init__(self, recurrences: Recurrences, step: int = 0) -> None:
        super().__init__(recurrences)
        self._pinned_status = self._allocate()
        self._copied: Event | None = None
        # What a run that was not interrupted would have copied.
        status, steps = self._status.cpu(), recurrences.steps.cpu()
        ended = torch.where(status == RUNNING, step + 1, steps + (status == NON_FINITE))
        self._last = step - step % self.EVERY
        self._known, self._next = ended <= self._last - self.EVERY, ended <= self._last

    def _allocate(self) -> Tensor:
        return torch.empty(self._status.shape, dtype=self._status.dtype, pin_memory=True, device="cpu")

    def _copy(self) -> Event:
        self._pinned_status.copy_(self._status, non_blocking=True)
        event: Event = torch.cuda.current_stream(self._status.device).record_event()
        return event

    def poll(self, step: int) -> Tensor:
        """Return what the copy before the last one says."""
        if step >= self._last + self.EVERY:
            if self._copied is not None:
                self._copied.synchronize()
                self._next = self._pinned_status != RUNNING
            self._known, self._copied, self._last = self._next, self._copy(), step
        return self._known


def track(recurrences: Recurrences, step: int) -> Completion:
    """Return the completion tracker for the device of the recurrences, after `step` steps."""
    return (DeviceCompletion if recurrences.status.is_cuda else Completion)(recurrences, step)
