"""bench/end_to_end/slices.py: jobs are stopped and extrapolated."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.end_to_end import slices
from blockhess import estimate
from tests.bench.cases import small_case


class Counting:
    """A clock that is advanced by hand."""

    def __init__(self) -> None:
        self.time = 0.0

    def __call__(self) -> float:
        return self.time


def test_our_job_is_stopped_and_extrapolated_step_by_step(monkeypatch):
    """Set-up takes 7 s, the first step 100 s more than a later one, in which products take 2 and 3 s."""
    case, clock = small_case(), Counting()

    def spectrum(*_, blocks, num_probes, num_steps, **__):
        assert list(blocks) == list(case.blocks) and (num_probes, num_steps) == (10, 100)
        with estimate.progress_bar(1, "", False) as product:
            clock.time += 7
            for step in range(100):
                clock.time += 100 if step == 0 else 0
                for seconds in (2, 3):
                    clock.time += num_probes * seconds
                    for _ in range(num_probes):  # made together
                        product()

    monkeypatch.setattr(slices, "now", clock)
    monkeypatch.setattr(slices.blockhess, "spectrum", spectrum)
    counts = dict.fromkeys(case.blocks, 10) | {case.blocks[3]: 20}
    found = slices.of_ours(case, counts, 20, steps=3)
    # Stopped by the first of the products that were made together with the last one.
    assert clock.time == 7 + 100 + 4 * 50
    assert found.setup == pytest.approx(7 + 100)
    assert found.work == pytest.approx(2.5 * 120)


def test_a_rival_is_extrapolated_block_by_block(monkeypatch):
    case, clock = small_case(), Counting()
    measured = dataclasses.replace(case, blocks=case.blocks[3:5])

    class Slow:
        """Takes 1 s to make, 0.5 s per block, 2 or 3 s per product depending on the block, 4 s per step."""

        def __init__(self, case):
            clock.time += 1

        def of_block(self, name):
            clock.time += 0.5

            def product(v):
                clock.time += 2 if name == case.blocks[3] else 3
                return torch.linspace(0, 1, len(v)) * v

            return product

        def step(self):
            clock.time += 4

    monkeypatch.setattr(slices, "now", clock)
    monkeypatch.setattr(slices, "timed", lambda call: (before := clock.time, call(), clock.time - before)[2])
    monkeypatch.setitem(slices.RIVALS, "slow", Slow)
    counts = dict.fromkeys(case.blocks, 10) | {case.blocks[3]: 20}
    probe = {name: case.vector(name) for name in measured.blocks}
    found = slices.of_rival("slow", measured, counts, [probe], 3)
    assert found.setup == pytest.approx(1 + 2 * 0.5 * 11 / 2)
    assert found.work == pytest.approx((20 * 2 + 10 * 3) * 120 / 30 + 20 * 4)
    assert found.whole == found.setup + found.work and len(found.quadratures[case.blocks[3]][0][0]) == 3
