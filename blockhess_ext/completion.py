"""Which recurrences have finished, as far as the host knows: on a GPU it learns of it late, and never waits."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from blockhess_ext.recurrences import RUNNING, Recurrences


class Event(Protocol):
    """A point in the work of a device."""

    def query(self) -> bool:
        """Whether it has been passed."""


class Completion:
    """What has finished, at once: for recurrences on the CPU."""

    def __init__(self, recurrences: Recurrences) -> None:
        self._status = recurrences.status

    def look(self) -> Tensor:
        """What is known to have finished, (n_probes, n_blocks) bool on the CPU. To be called after every step."""
        return self._status != RUNNING


class FinishedOnDevice(Completion):
    """What has finished, some steps later: every few steps the status is copied to pinned memory behind the kernels.

    A recurrence that has finished is skipped by the kernels from then on, so a late answer costs time, never a result.
    """

    EVERY = 4  # steps

    def __init__(self, recurrences: Recurrences) -> None:
        super().__init__(recurrences)
        self._landing = self._pinned()
        self._known = torch.zeros(self._status.shape, dtype=torch.bool)
        self._copied: Event | None = None
        self._step = 0

    def _pinned(self) -> Tensor:
        return torch.empty(self._status.shape, dtype=self._status.dtype, pin_memory=True)

    def _copy(self) -> Event:
        self._landing.copy_(self._status, non_blocking=True)
        event: Event = torch.cuda.current_stream(self._status.device).record_event()
        return event

    def look(self) -> Tensor:
        """As in `Finished`."""
        self._step += 1
        if self._copied is not None and self._copied.query():
            self._known, self._copied = self._landing != RUNNING, None
        if self._copied is None and self._step % self.EVERY == 0:
            self._copied = self._copy()
        return self._known


def watch(recurrences: Recurrences) -> Completion:
    """The watch that suits the device of the recurrences."""
    return FinishedOnDevice(recurrences) if recurrences.status.is_cuda else Completion(recurrences)
