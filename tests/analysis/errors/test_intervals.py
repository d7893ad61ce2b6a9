"""intervals.py: quantiles of scipy, known coverage, and the jackknife against textbook identities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from blockhess.analysis.errors.intervals import (
    check_confidence,
    gamma_interval,
    jackknife,
    leave_one_out,
    mean_and_variance,
    normal_quantile,
    variance_of_mean,
)
from tests.helpers.spectra_cases import float64


def test_gamma_interval_inverts_the_gamma_distribution() -> None:
    mean, variance = float64([0.3, 2.0, 40.0, 1e-9]), float64([0.5, 1.0, 1.0, 1e-18])
    lower, upper = gamma_interval(mean, variance, 0.9)
    scale = variance / mean
    for expectation, tail in ((lower, 0.95), (upper, 0.05)):
        below = stats.gamma.cdf(mean.numpy(), (expectation / scale).numpy(), scale=scale.numpy())
        np.testing.assert_allclose(below, tail, rtol=1e-9)


def test_gamma_interval_becomes_the_normal_one() -> None:
    lower, upper = gamma_interval(float64([1e3, 1e5, 1e8]), torch.ones(3).double(), 0.95)
    z = stats.norm.ppf(0.975)
    np.testing.assert_allclose((lower + upper - 2 * float64([1e3, 1e5, 1e8])).numpy(), 0, atol=1e-2)
    np.testing.assert_allclose((upper - lower).numpy(), 2 * z, rtol=1e-3)


def test_gamma_interval_at_its_ends() -> None:
    lower, upper = gamma_interval(float64([0.0, 0.0, 5.0, 5.0]), float64([0.0, 1.0, 0.0, math.inf]), 0.95)
    assert lower.tolist() == [0.0, 0.0, 5.0, 0.0]
    assert upper[0] == 0 and upper[1] > 1.9 and upper[2] == 5 and upper[3] == math.inf


@pytest.mark.parametrize("degrees", [1, 4, 200])
def test_coverage_of_the_mean_of_five(degrees: int) -> None:
    """The weight of an eigenvalue of that multiplicity, five probes; a third has only the sample to go by."""
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.chisquare(degrees, (5, 4000)))
    # What theory knows, as error_bars estimates it: Var = 2 E for each unit of the mean.
    for known, least in ((2 * values.mean(0), 0.94), (torch.zeros(4000).double(), 0.87)):
        lower, upper = gamma_interval(values.mean(0), variance_of_mean(values, known, 0.95), 0.95)
        covered = float(((lower <= degrees) & (degrees <= upper)).double().mean())
        assert least <= covered <= 0.99
    # Control: the symmetric normal interval of the sample misses far more often.
    half = 1.96 * values.std(0) / 5**0.5
    assert float(((values.mean(0) - degrees).abs() <= half).double().mean()) < 0.89


def test_variance_of_mean_is_students() -> None:
    values = float64([[1.0], [2.0], [6.0]])
    variance = variance_of_mean(values, torch.zeros(1).double(), 0.9)
    half = stats.t.interval(0.9, 2, 3.0, stats.sem([1, 2, 6]))[1] - 3.0
    assert normal_quantile(0.9) * variance.sqrt().item() == pytest.approx(half)
    assert variance_of_mean(values, float64([12.0]), 0.9).item() == pytest.approx(4.0)
    assert variance_of_mean(values[:1], float64([12.0]), 0.9).item() == math.inf


def test_mean_and_variance() -> None:
    mean, variance, count = mean_and_variance(float64([[1.0, 4.0], [3.0, 4.0]]))
    assert mean.tolist() == [2, 4] and variance.tolist() == [2, 0] and count == 2
    assert mean_and_variance(float64([[1.0]]))[1].item() == math.inf


def test_jackknife_of_a_mean_is_its_standard_error() -> None:
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)).double()
    value, parts = leave_one_out(lambda probes: x[probes].mean(0), 9)
    bias, stderr = jackknife(value, parts)
    torch.testing.assert_close(bias, torch.zeros(3).double(), atol=1e-14, rtol=0)
    torch.testing.assert_close(stderr, x.std(0) / 3)


def test_jackknife_turns_the_plain_variance_into_the_unbiased_one() -> None:
    x = torch.randn(7, generator=torch.Generator().manual_seed(1)).double()
    value, parts = leave_one_out(lambda probes: x[probes].var(correction=0), 7)
    torch.testing.assert_close(value - jackknife(value, parts)[0], x.var())


def test_jackknife_of_one_probe_knows_nothing() -> None:
    value, parts = leave_one_out(lambda probes: float64([1.0, 2.0]), 1)
    assert len(parts) == 0
    assert all(part.isnan().all() and part.shape == (2,) for part in jackknife(value, parts))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.5, math.nan])
def test_refuses_confidence(confidence: float) -> None:
    with pytest.raises(ValueError, match="op: confidence must be between 0 and 1, got"):
        check_confidence("op", confidence)
