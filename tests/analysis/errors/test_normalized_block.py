"""A block on an axis with a random divisor."""

from __future__ import annotations

import math

import pytest

from blockhess.analysis.axes import Axis
from blockhess.analysis.errors.normalized_block import BlockOnAxis
from tests.analysis.errors.test_bands import SPECTRA
from tests.helpers.dense_measures import lanczos
from tests.helpers.spectra_cases import as_spectra, float64


def test_a_random_divisor_widens_the_band_by_how_far_it_moves_the_value() -> None:
    q = lanczos(SPECTRA["uniform"], num_probes=5, num_steps=20).quadrature
    one = as_spectra(q)
    seen = BlockOnAxis(q, 0, Axis(normalize="trace"))
    low, high = seen.divisor_interval(0.95)
    lower, upper = one.trace_interval()
    assert (low, high) == (float(lower), float(upper)) and low < seen.axis.divisor < high
    y = float64([0.5 / seen.axis.divisor])
    fixed, free = one.cdf_band([0.5]), one.cdf_band(y, axis=Axis(normalize="trace"))
    moved = max(float(one.cdf(0.5 * c / seen.axis.divisor)[1]) - float(fixed.value) for c in (low, high))
    expected = math.hypot(float(fixed.upper - fixed.value), moved)
    assert float(free.upper - free.value) == pytest.approx(expected, rel=0.05)
    assert seen.divisor_range(0.95)[0].divisor == pytest.approx(low) and len(seen.divisor_range(0.95, 1e-9)) == 64
    assert BlockOnAxis(q, 0, Axis()).divisor_range(0.95) == []
