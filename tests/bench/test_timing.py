"""bench/harness/timing.py: wrong and absent rivals are not timed, rivals take turns, clocks count what they should."""

from __future__ import annotations

import time

import pytest
import torch

from bench.harness import timing
from bench.harness.rows import Row
from bench.harness.timing import Rival, WrongResult, alternate, compare_and_time, failure_reason


def rival(result: float, **options: float) -> Rival:
    return Rival(lambda: lambda: result, lambda found: abs(found - 1.0), 1e-3, **options)


def test_wrong_absent_and_broken_rivals_are_not_timed():
    def absent():
        raise ImportError("No module named 'peer'")

    def broken():
        raise RuntimeError("this cannot be\nsecond line")

    entries = compare_and_time(
        {
            "ours": rival(1.0),
            "close": rival(1.0005),
            "wrong": rival(1.01),
            "nan": rival(float("nan")),
            "absent": Rival(absent, float, 1),
            "broken": Rival(lambda: broken, float, 1),
        },
        rounds=4,
    )
    assert [len(entry.seconds) for entry in entries.values()] == [4, 4, 0, 0, 0, 0]
    assert entries["wrong"].failure == "wrong by 0.01, tolerance 0.001"
    assert entries["nan"].failure.startswith("wrong") and not entries["ours"].failure
    assert entries["absent"].failure == "absent (No module named 'peer')"
    assert entries["broken"].failure == "RuntimeError: this cannot be"
    with pytest.raises(WrongResult, match=r"wrong: wrong by 0.01, .* nothing was timed"):
        Row.of({"wrong": entries["wrong"], "ours": entries["ours"]})


def test_a_rival_that_is_not_ready_in_time_is_absent():
    def slow():
        time.sleep(30)

    entries = compare_and_time(
        {"ours": rival(1.0), "slow": Rival(lambda: slow, lambda _: 0.0, 1, limit=0.05)}, rounds=1
    )
    assert entries["slow"].failure == "absent (TimeoutError: not ready within 0 s)"
    assert failure_reason(torch._dynamo.exc.Unsupported("no such thing")).startswith(
        "absent (Unsupported: no such thing"
    )


def test_rivals_take_turns_and_another_begins_each_round():
    seen: list[str] = []
    clocks = {name: lambda name=name: seen.append(name) or 0.0 for name in "abc"}
    for _ in alternate(clocks, 3):
        pass
    assert "".join(seen) == "abcbcacab"
    seen.clear()
    for _ in alternate(clocks, 10, seconds=0.0):
        pass
    assert "".join(seen) == "abc"


def test_scaled_times():
    entries = compare_and_time(
        {"ours": Rival(lambda: lambda: time.sleep(0.01), lambda _: 0.0, 1, scale=100.0)}, rounds=2
    )
    assert min(entries["ours"].seconds) >= 1.0


def test_cpu_clock_excludes_waiting():
    timing.use_clock("cpu")
    try:
        waited = timing.timed(lambda: time.sleep(0.3))
        worked = timing.timed(lambda: sum(range(10**6)))
    finally:
        timing.use_clock("wall")
    assert waited < 0.2 and worked > 0 and timing.timed(lambda: time.sleep(0.3)) >= 0.3
