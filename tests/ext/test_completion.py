"""Completion on a device is known late on the host, at the same step in every run; results do not depend on it."""

from __future__ import annotations

import torch

from blockhess_ext import batched_slq, completion
from blockhess_ext.completion import DeviceCompletion
from blockhess_ext.recurrences import FINISHED, Recurrences


class Event:
    """A device event; the copy before it arrives when the host waits for it."""

    def __init__(self, arrive) -> None:
        self.synchronize = arrive


class Late(DeviceCompletion):
    """A device's completion tracker whose copies arrive as late as they can."""

    def _allocate(self) -> torch.Tensor:
        return torch.zeros_like(self._status)

    def _copy(self) -> Event:
        status = self._status.clone()
        return Event(lambda: self._pinned_status.copy_(status))


def test_a_copy_is_read_at_the_next_copy():
    recurrences = Recurrences.start(1, torch.tensor([9, 9]))
    tracker = Late(recurrences)
    assert not tracker.poll(0).any()
    recurrences.status[0, 1] = FINISHED
    known = [tracker.poll(step).tolist() for step in range(1, 2 * Late.EVERY + 1)]
    assert known == [[[False, False]]] * (2 * Late.EVERY - 1) + [[[False, True]]]


def test_a_returned_mask_does_not_change():
    recurrences = Recurrences.start(1, torch.tensor([9, 9]))
    tracker = Late(recurrences)
    before = tracker.poll(Late.EVERY)
    recurrences.status.fill_(FINISHED)
    known = tracker.poll(2 * Late.EVERY)
    last = tracker.poll(3 * Late.EVERY)
    assert not before.any() and not known.any() and last.all()


def test_a_resumed_run_knows_the_same_at_every_step():
    ends = torch.tensor([[2, 4, 5, 7, 8, 9, 12, 13]])
    recurrences = Recurrences.start(1, torch.full((8,), 20))

    def advance(step: int) -> None:
        recurrences.steps.copy_(ends.clamp(max=step))
        recurrences.status[ends <= step] = FINISHED

    tracker, known = Late(recurrences), []
    resumed: dict[int, Late] = {}
    for step in range(21):
        advance(step)
        known.append(tracker.poll(step))
        resumed[step] = Late(recurrences, step)
        for start, other in resumed.items():
            assert torch.equal(other.poll(step), known[-1]), (start, step)
    assert known[-1].all() and not known[8].all()


def test_results_do_not_depend_on_when_the_host_knows(monkeypatch):
    scales = torch.linspace(1, 2, 40)

    def run() -> list[torch.Tensor]:
        q = batched_slq(lambda v: v * scales, [3, 1, 30, 6], num_probes=2, num_steps=20)
        return [q.nodes, q.weights, q.alpha, q.beta, q.steps]

    at_once = run()
    monkeypatch.setattr(completion, "track", Late)
    for a, b in zip(at_once, run(), strict=True):
        assert torch.equal(a, b)
