"""Bands of densities, distribution functions and traces: coverage against exact spectra, and what must hold always."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from blockhess.analysis.axes import Axis
from blockhess.analysis.errors import bands
from blockhess.analysis.errors.normalized_block import BlockOnAxis
from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext import Quadrature, batched_slq
from tests.helpers.dense_measures import lanczos, spectra
from tests.helpers.spectra_cases import float64, make_spectra, random_spectra

SPECTRA = spectra()
N_PROBES, N_RUNS = 5, 60


def as_spectra(q: Quadrature) -> Spectra:
    return Spectra([BlockInfo(f"b{i}", (dim,), dim, (f"b{i}",)) for i, dim in enumerate(q.dims)], q, {})


def rotated(eigenvalues: Tensor, **options: object) -> Quadrature:
    """Lanczos on a dense matrix with these eigenvalues, as many probes as all runs need."""
    n = len(eigenvalues)
    basis = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
    matrix = (basis * eigenvalues) @ basis.T
    settings = {"num_probes": N_PROBES * N_RUNS, "num_steps": 20, "dtype": torch.float64, **options}
    return batched_slq(lambda v: v @ matrix, [n], **settings)  # type: ignore[arg-type]


def runs(q: Quadrature) -> list[Quadrature]:
    return [q.of_probes(slice(i * N_PROBES, (i + 1) * N_PROBES)) for i in range(N_RUNS)]


def coverage(inside: list[Tensor]) -> float:
    return float(torch.stack(inside).double().mean())


@pytest.mark.parametrize("name", ["uniform", "spikes and bulk", "low rank"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_bands_cover_what_they_promise(name: str, distribution: str) -> None:
    eigenvalues = SPECTRA[name]
    q = rotated(eigenvalues, distribution=distribution)
    low, high = float(eigenvalues.min()), float(eigenvalues.max())
    sigma = 0.03 * (high - low)
    grid = torch.linspace(low, high, 23, dtype=torch.float64)[1:-1]
    z = (grid[:, None] - eigenvalues) / sigma
    true_density = (-0.5 * z**2).exp().mean(1) / (sigma * math.sqrt(2 * math.pi))
    true_cdf = (eigenvalues <= grid[:, None]).double().mean(1)
    everything = as_spectra(q)
    mean_density, mean_cdf = everything.density(sigma, grid)[1], everything.cdf(grid)[1]

    statistical: list[Tensor] = []
    total: list[Tensor] = []
    traces: list[Tensor] = []
    for part in runs(q):
        one = as_spectra(part)
        for band, mean, truth in (
            (one.density_band(sigma, grid), mean_density, true_density),
            (one.cdf_band(grid), mean_cdf, true_cdf),
        ):
            statistical.append((band.lower <= mean) & (mean <= band.upper))
            total.append((band.total_lower <= truth) & (truth <= band.total_upper))
        lower, upper = one.trace_interval()
        traces.append((lower <= eigenvalues.sum()) & (eigenvalues.sum() <= upper))
    assert 0.9 <= coverage(statistical) <= 0.99
    assert coverage(total) >= 0.9
    assert coverage(traces) >= 0.85  # 60 trials: two standard errors below 0.93


def worst_point_of_cdf_band() -> float:
    eigenvalues, n_runs = torch.linspace(0, 1, 1000, dtype=torch.float64), 200
    q = lanczos(eigenvalues, num_probes=N_PROBES * n_runs, num_steps=20, reorthogonalize="none").quadrature
    x = q.nodes[:, 0].median(0).values  # where half of the probes have a node on either side
    mean = as_spectra(q).cdf(x)[1][0]
    found = [bands.cdf_band(q.of_probes(slice(i * N_PROBES, (i + 1) * N_PROBES)), [0], x, 0.95) for i in range(n_runs)]
    return float(torch.stack([(b.lower[0] <= mean) & (mean <= b.upper[0]) for b in found]).double().mean(0).min())


def test_no_single_point_of_the_cdf_band_is_left_uncovered(monkeypatch: pytest.MonkeyPatch) -> None:
    assert worst_point_of_cdf_band() >= 0.9
    monkeypatch.setattr(bands, "_may_cross", lambda nodes, x, *_: torch.zeros_like(x, dtype=torch.bool))
    assert worst_point_of_cdf_band() < 0.9  # five probes on one side of x know nothing of the other


def test_where_the_next_node_may_be() -> None:
    nodes = float64([[0.0, 1.0], [0.0, 1.1], [0.0, 0.9]])
    may = bands._may_cross(nodes, float64([-1.0, 0.3, 0.8, 1.3, 3.0]), 0.95)
    # Mean 1, spread 0.1: Student's 4.303 sqrt(4/3) 0.1 = 0.497 to both sides.
    assert may.tolist() == [False, False, True, True, False]
    assert bands._may_cross(nodes[:1], float64([9.0]), 0.95).tolist() == [True]


def test_bands_contain_the_value_and_each_other() -> None:
    result = random_spectra(n_probes=4, dims=[40, 50, 60, 70])
    for band in (result.density_band(0.05), result.cdf_band(), result.density_band(confidence=0.5)):
        assert (band.total_lower <= band.lower).all() and (band.upper <= band.total_upper).all()
        assert (band.lower <= band.value + 1e-15).all() and (band.value <= band.upper + 1e-15).all()
        assert (band.lower >= 0).all() and band.value.isfinite().all() and band.upper.isfinite().all()
    assert (result.cdf_band().total_upper <= 1).all()


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


def test_exact_blocks_have_no_truncation() -> None:
    seen = lanczos(torch.tensor([0.0, 1.0, 3.0]).repeat(20), num_probes=4, num_steps=10)
    band = as_spectra(seen.quadrature).cdf_band([-1.0, 0.5, 2.0, 4.0])
    torch.testing.assert_close(band.total_lower, band.lower)
    torch.testing.assert_close(band.total_upper, band.upper)
    assert band.lower[0, 1] < 1 / 3 < band.upper[0, 1]
    assert band.lower[0, 0] == band.upper[0, 0] == 0 and band.lower[0, 3] == band.upper[0, 3] == 1
    assert not as_spectra(seen.quadrature).wasserstein_error()[1].any()


def test_one_probe_knows_nothing_but_of_a_single_element() -> None:
    result = make_spectra(
        [[[1.0, 2.0], [5.0, 5.0]]], [[[0.5, 0.5], [1.0, 0.0]]], dims=[9, 1], steps=[[2, 1]], dtype="float64"
    )
    band = result.density_band(0.1, [1.0, 5.0])
    peak = 1 / (0.1 * math.sqrt(2 * math.pi))
    assert not band.lower[0].any() and (band.upper[0] == peak).all()
    torch.testing.assert_close(band.lower[1], band.upper[1], rtol=0, atol=1e-10)
    lower, upper = result.trace_interval()
    assert lower[0] == -math.inf and upper[0] == math.inf and lower[1] == upper[1] == 5
    assert result.wasserstein_error()[0].tolist() == [math.inf, 0.0]


def test_a_block_of_which_nothing_is_known() -> None:
    result = make_spectra(
        [[[1.0, 2.0], [0.0, 0.0]]] * 2, [[[0.5, 0.5], [0.0, 0.0]]] * 2, dims=[9, 9], steps=[[2, 0]] * 2
    )
    density, cdf = result.density_band(0.1), result.cdf_band([0.0, 1.5])
    assert not density.value[1].any() and not density.total_lower[1].any() and density.total_upper[1].min() > 3.9
    assert cdf.value[1].isnan().all() and not cdf.total_lower[1].any() and (cdf.total_upper[1] == 1).all()
    assert result.trace_interval()[0][1] == -math.inf
    assert all(part[1].isnan() for part in result.wasserstein_error())


def test_area_of_the_standard_error_by_hand() -> None:
    # Two probes say 0 and 2: the cdf between is 1 or 0, of standard error 1/2, over a length of 2.
    result = make_spectra([[[0.0]], [[2.0]]], [[[1.0]], [[1.0]]], dims=[3])
    assert result.wasserstein_error()[0].item() == pytest.approx(1.0)


def test_trace_interval_is_skewed_towards_the_side_of_the_outlier() -> None:
    for sign in (1.0, -1.0):
        eigenvalues = torch.zeros(200).double()
        eigenvalues[0] = sign
        lower, upper = as_spectra(lanczos(eigenvalues, num_probes=5).quadrature).trace_interval()
        value = as_spectra(lanczos(eigenvalues, num_probes=5).quadrature).trace()[0]
        below, above = float(value - lower), float(upper - value)
        assert above > 1.5 * below if sign > 0 else below > 1.5 * above
        assert lower <= sign <= upper


def test_range_error() -> None:
    q = rotated(SPECTRA["uniform"], num_steps=6)
    few = as_spectra(q.of_probes(slice(0, 10)))
    (low_bias, _), (high_bias, high_stderr) = few.range_error()
    high = few.eigenvalue_range()[1]
    assert low_bias[0] >= 0 >= high_bias[0] and high_stderr[0] > 0
    assert abs(high - high_bias - 1.0)[0] < abs(high - 1.0)[0]  # nearer to the truth
    one = as_spectra(q.of_probes(slice(0, 1)))
    assert one.range_error()[0][0].isnan().all()


def test_errors_of_a_block_are_those_of_its_own_probes() -> None:
    q = rotated(SPECTRA["uniform"], num_steps=6)
    few = q.of_probes(slice(0, 3))
    beside = as_spectra(Quadrature.concatenate([few, q.of_probes(slice(3, 15))], 1))
    for name, options in (("range_error", ()), ("kth_eigenvalue", (5,)), ("trace_interval", ())):
        alone, both = (getattr(result, name)(*options) for result in (as_spectra(few), beside))
        if name == "range_error":
            alone, both = (sum(values, ()) for values in (alone, both))
        for one, two in zip(alone, both, strict=True):
            assert one[0].isfinite() and two[0] == pytest.approx(float(one[0]), rel=1e-12), name
            assert two[1] != two[0]
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


def test_rademacher_probes_are_not_taken_for_gaussian_ones() -> None:
    # On a diagonal operator every Rademacher probe gives the exact trace: the sample knows, theory for the sphere errs.
    diagonal = torch.linspace(0, 1, 50, dtype=torch.float64)
    q = batched_slq(
        lambda v: v * diagonal, [50], num_probes=4, num_steps=5, distribution="rademacher", dtype=torch.float64
    )
    lower, upper = as_spectra(q).trace_interval()
    assert (upper - lower).item() < 1e-10
    assert float64([25.0]).sub(lower).abs().item() < 1e-10


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
