"""bench/ops/rows.py: memory traffic of the ops."""

from __future__ import annotations

import pytest

from bench.ops import rows


def test_traffic_is_counted_by_segments():
    from blockhess_ext.layout import Layout

    assert rows.moved_elements(Layout.of([5, 7])) == 4
    half = Layout.of([10**5, 10**6 * 2])
    assert rows.moved_elements(half) == pytest.approx((4 * 1 + 8 * 20) / 21)
    assert rows.basis_reads(Layout.of([100, 300_000])) == pytest.approx((100 + 3 * 300_000) / 300_100)
