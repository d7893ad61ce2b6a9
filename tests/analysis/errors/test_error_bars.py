"""Error bars of a result: arguments, defaults and tables."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from blockhess.analysis.axes import Axis
from blockhess_ext import Quadrature
from tests.analysis.errors.test_bands import SPECTRA, rotated
from tests.helpers.dense_measures import lanczos
from tests.helpers.spectra_cases import as_spectra, make_spectra, random_spectra


def test_values_are_those_of_density_and_cdf() -> None:
    result = random_spectra(n_probes=3, dims=[40] * 4)
    grid = torch.linspace(-2, 2, 30, dtype=torch.float64)
    torch.testing.assert_close(result.density_band(0.1, grid).value, result.density(0.1, grid)[1])
    torch.testing.assert_close(result.cdf_band(grid).value, result.cdf(grid)[1])
    few = result.density_band(0.1, grid, blocks=["block2", "block0"])
    torch.testing.assert_close(few.value, result.density(0.1, grid)[1][[2, 0]])
    assert result.density_band().x.equal(result.density()[0])


def test_more_confidence_and_fewer_probes_are_wider() -> None:
    q = rotated(SPECTRA["uniform"])
    grid = torch.linspace(0.1, 0.9, 9, dtype=torch.float64)

    def width(probes: int, confidence: float) -> float:
        band = as_spectra(q.of_probes(slice(0, probes))).density_band(0.05, grid, confidence)
        return float((band.upper - band.lower).mean())

    assert width(10, 0.5) < width(10, 0.95) < width(10, 0.999)
    assert 2.5 < width(10, 0.95) / width(160, 0.95) < 6.0  # about 4


@pytest.mark.parametrize("probes", [1, 5])
@pytest.mark.parametrize("name", SPECTRA)
def test_bounds_contain_the_extreme_eigenvalues(name: str, probes: int) -> None:
    """They hold with 95 %: of 40 runs at most 5 may miss, with a probability of 0.98; the nodes miss all."""
    exact = SPECTRA[name].sort().values
    q = lanczos(exact, num_probes=40 * probes, num_steps=8).quadrature
    missed, widths, nodes_miss = 0, [], 0
    for run in range(40):
        few = as_spectra(q.of_probes(slice(run * probes, (run + 1) * probes)))
        (lower, upper), (low, high) = few.eigenvalue_bounds(), few.eigenvalue_range()
        assert lower <= low <= high <= upper
        missed += int(not lower <= exact[0]) + int(not exact[-1] <= upper)
        nodes_miss += int(high < exact[-1] - 1e-9 * exact.abs().max() or low > exact[0] + 1e-9 * exact.abs().max())
        widths.append(float((upper - lower) / (exact[-1] - exact[0])))
    assert missed <= 10 and sorted(widths)[20] < 1.6
    assert nodes_miss == 40 or name == "low rank"


def test_extreme_eigenvalues_of_probes_that_are_not_gaussian_have_no_bound() -> None:
    q = lanczos(SPECTRA["uniform"], distribution="rademacher").quadrature
    assert [float(end) for end in as_spectra(q).eigenvalue_bounds()] == [-math.inf, math.inf]


@pytest.mark.parametrize("num_steps", [2, 12])
def test_frobenius_interval(num_steps: int) -> None:
    exact = SPECTRA["power law"]
    q = lanczos(exact, num_probes=200, num_steps=num_steps).quadrature
    inside = []
    for run in range(40):
        lower, upper = as_spectra(q.of_probes(slice(5 * run, 5 * run + 5))).frobenius_interval()
        inside.append(bool(lower <= exact.norm() <= upper))
    assert sum(inside) >= 34  # 0.98 of the time with 95 %
    lower, upper = as_spectra(q.of_probes(slice(0, 1))).frobenius_interval()
    assert lower == 0 and upper == math.inf


def test_negative_and_zero_shares_are_intervals() -> None:
    exact = torch.cat([torch.linspace(-1, -0.5, 60), torch.zeros(150), torch.linspace(0.5, 1, 90)]).double()
    for probes, steps, width in ((5, 4, 1.0), (20, 30, 0.15)):
        result = as_spectra(lanczos(exact, num_probes=probes, num_steps=steps, dtype=torch.float32).quadrature)
        for (lower, upper), truth in ((result.negative_interval(), 0.2), (result.zero_interval(), 0.5)):
            assert lower <= truth <= upper and upper - lower <= width
    # Of 180 zeros beside eigenvalues of all sizes, no node is zero; the interval contains their share.
    many_sizes = torch.cat([torch.zeros(180), torch.logspace(-6, 0, 120)]).double()
    wide = as_spectra(lanczos(many_sizes, num_probes=5).quadrature)
    assert wide.zero_mass() < 0.1 and wide.zero_interval()[1] > 0.6
    nothing = as_spectra(lanczos(torch.zeros(5)).quadrature)
    assert [float(end) for end in (*nothing.negative_interval(), *nothing.zero_interval())] == [0, 0, 1, 1]
    one = as_spectra(lanczos(exact, num_probes=1).quadrature)
    assert [float(end) for end in one.negative_interval()] == [0, 1]
    with pytest.raises(ValueError, match="zero_interval: tolerance must not be negative, got -1"):
        one.zero_interval(-1)


def test_errors_of_a_block_are_those_of_its_own_probes() -> None:
    q = rotated(SPECTRA["uniform"], num_steps=6)
    few = q.of_probes(slice(0, 3))
    beside = as_spectra(Quadrature.concatenate([few, q.of_probes(slice(3, 15))], 1))
    for name, options in (
        ("eigenvalue_bounds", ()),
        ("kth_eigenvalue", (5,)),
        ("trace_interval", ()),
        ("frobenius_interval", ()),
        ("negative_interval", ()),
    ):
        alone, both = (getattr(result, name)(*options) for result in (as_spectra(few), beside))
        for one, two in zip(alone, both, strict=True):
            assert one[0].isfinite() and two[0] == pytest.approx(float(one[0]), rel=1e-12), name
            assert two[1] != two[0] or name == "negative_interval"
    written_out = dataclasses.replace(few, reorthogonalize=("exact",))
    value, lower, upper = as_spectra(written_out).kth_eigenvalue(5)
    assert lower == value == upper


def test_refusals() -> None:
    result = random_spectra()
    for call in (result.density_band, result.cdf_band, result.trace_interval):
        with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 95"):
            call(confidence=95)  # type: ignore[operator]
    with pytest.raises(ValueError, match="density_band: sigma must be finite"):
        result.density_band(sigma=0.0)
    with pytest.raises(ValueError, match="cdf_band: x must ascend"):
        result.cdf_band([1.0, 0.0])
    with pytest.raises(ValueError, match="no block is called"):
        result.cdf_band(blocks=["x"])


def test_error_table() -> None:
    seen = lanczos(SPECTRA["spikes and bulk"], num_probes=4)
    result = as_spectra(seen.quadrature)
    lines = result.error_table(confidence=0.9).splitlines()
    assert "trace, 90 %" in lines[0] and len(lines) == 3
    lower, upper = result.trace_interval(0.9)
    assert f"{float(lower):.2e} ... {float(upper):.2e}" in lines[2]
    probes, steps = result.wasserstein_error()
    assert lines[2].split()[-2:] == [f"{float(probes):.1e}", f"{float(steps):.1e}"]
    broken = make_spectra([[[1.0, 2.0]]], [[[0.5, 0.5]]], steps=[[0]], nonfinite=[[True]])
    assert "-inf ... inf" in broken.error_table() and "nan" not in broken.error_table()


@pytest.mark.parametrize("axis", ["linear", "asinh"])
@pytest.mark.parametrize("normalize", ["none", "radius", 5, "trace"])
def test_bands_on_an_axis_do_not_depend_on_the_unit(axis: str, normalize: str | int) -> None:
    q = lanczos(SPECTRA["power law"], num_probes=4, num_steps=12).quadrature
    unit = 1.0 if normalize == "none" else 7.0
    scaled = dataclasses.replace(q, **{name: unit * getattr(q, name) for name in ("nodes", "alpha", "beta")})
    one, other = as_spectra(q), as_spectra(scaled)
    where = Axis(axis, normalize, 0.1 if axis == "asinh" else None)
    for call in ("density_band", "cdf_band"):
        band, same = getattr(one, call)(axis=where), getattr(other, call)(axis=where)
        for part in ("value", "lower", "upper", "total_lower", "total_upper"):
            if call == "density_band":  # at a step of the cdf, rounding decides
                torch.testing.assert_close(getattr(band, part), getattr(same, part), rtol=1e-5, atol=1e-5)
        assert (band.total_lower <= band.lower).all() and (band.upper <= band.total_upper).all()
        assert (band.lower <= band.value + 1e-12).all() and (band.value <= band.upper + 1e-12).all()
    density = one.density(axis=where)[1]
    torch.testing.assert_close(one.density_band(axis=where).value, density)
    probes, steps = one.wasserstein_error(axis=where)
    assert probes > 0 and steps > 0
    if where != Axis():
        assert str(where) in one.error_table(axis=where)
