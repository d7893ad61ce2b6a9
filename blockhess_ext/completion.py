"""Tracking on the host which recurrences have finished, without synchronizing with the device.

On a GPU the answer may be a few steps old. Kernels skip a finished recurrence anyway, so a late answer costs time but
does not change results.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from blockhess_ext.recurrences import RUNNING, Recurrences


class Event(Protocol):
    """A point in a device's queue of work."""

    def query(self) -> bool:
        """Return whether the device has reached it."""


class Completion:
    """Completion of recurrences on the CPU, known immediately."""

    def __init__(self, recurrences: Recurrences) -> None:
        self._status = recurrences.status

    def poll(self) -> Tensor:
        """Return which recurrences are known to have finished, (n_probes, n_blocks) bool on the CPU.

        Call it once after every step.
        """
        return self._status != RUNNING


class DeviceCompletion(Completion):
    """Completion of recurrences on a GPU: every few steps the status is copied to pinned memory asynchronously."""

    EVERY = 4  # steps

    def __init__(self, recurrences: Recurrences) -> None:
        super().__init__(recurrences)
        self._pinned_status = self._allocate()
        self._known = torch.zeros(self._status.shape, dtype=torch.bool)
        self._copied: Event | None = None
        self._step = 0

    def _allocate(self) -> Tensor:
        return torch.empty(self._status.shape, dtype=self._status.dtype, pin_memory=True)

    def _copy(self) -> Event:
        self._pinned_status.copy_(self._status, non_blocking=True)
        event: Event = torch.cuda.current_stream(self._status.device).record_event()
        return event

    def poll(self) -> Tensor:
        """Return what the last completed copy says."""
        self._step += 1
        if self._copied is not None and self._copied.query():
            self._known, self._copied = self._pinned_status != RUNNING, None
        if self._copied is None and self._step % self.EVERY == 0:
            self._copied = self._copy()
        return self._known


def track(recurrences: Recurrences) -> Completion:
    """Return the completion tracker for the device of the recurrences."""
    return DeviceCompletion(recurrences) if recurrences.status.is_cuda else Completion(recurrences)
