"""Completion on a device is known late on the host, and results do not depend on when."""

from __future__ import annotations

import torch

from blockhess_ext import batched_slq, completion
from blockhess_ext.completion import DeviceCompletion
from blockhess_ext.recurrences import FINISHED, Recurrences


class Event:
    """A device event that completes when `done` is set."""

    done = False

    def query(self) -> bool:
        return self.done


class Late(DeviceCompletion):
    """A device's completion tracker whose copies arrive when the test sets their event."""

    def _allocate(self) -> torch.Tensor:
        return torch.zeros_like(self._status)

    def _copy(self) -> Event:
        self.copies = getattr(self, "copies", 0) + 1
        self._pinned_status.copy_(self._status)
        self.event = Event()
        return self.event


def test_a_copy_is_read_only_once_its_event_is_done():
    recurrences = Recurrences.start(1, torch.tensor([9, 9]))
    tracker = Late(recurrences)
    recurrences.status[0, 1] = FINISHED
    for _ in range(3 * Late.EVERY):
        assert not tracker.poll().any()
    assert tracker.copies == 1  # no copy starts while another is in progress
    tracker.event.done = True
    assert tracker.poll().tolist() == [[False, True]]


def test_a_returned_mask_does_not_change():
    recurrences = Recurrences.start(1, torch.tensor([9, 9]))
    tracker = Late(recurrences)
    for _ in range(Late.EVERY):
        before = tracker.poll()
    tracker.event.done = True
    recurrences.status.fill_(FINISHED)
    known = tracker.poll()
    for _ in range(2 * Late.EVERY):
        tracker.event.done = True
        last = tracker.poll()
    assert not before.any() and not known.any() and last.all()


def test_results_do_not_depend_on_when_the_host_knows(monkeypatch):
    scales = torch.linspace(1, 2, 40)

    def run() -> list[torch.Tensor]:
        q = batched_slq(lambda v: v * scales, [3, 1, 30, 6], num_probes=2, num_steps=20)
        return [q.nodes, q.weights, q.alpha, q.beta, q.steps]

    at_once = run()
    monkeypatch.setattr(completion, "track", Late)
    for a, b in zip(at_once, run(), strict=True):
        assert torch.equal(a, b)
