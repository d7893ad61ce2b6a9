"""bench/harness/machine.py: limits, shares and required memory."""

from __future__ import annotations

from bench.harness.machine import Machine
from bench.harness.timing import CPU
from tests.bench.cases import TINY


def test_shares_of_limits():
    # 6e9 bytes in 4 s are 1.5e9 a second.
    assert TINY.share(6e9, 4.0) == 1.5
    assert TINY.share(6e9, 4.0, "triad") == 0.75


def test_limits_are_measured_and_consistent():
    limits = Machine.measured(CPU, "tiny").limits
    assert set(limits) == {"copy", "triad", "read", "gemm"} and min(limits.values()) > 0
