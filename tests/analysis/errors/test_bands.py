"""Bands of densities, distribution functions and traces: coverage against exact spectra, and what must hold always."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blockhess.analysis.errors import bands
from blockhess_ext import Quadrature, batched_slq
from tests.helpers.dense_measures import lanczos, spectra
from tests.helpers.spectra_cases import as_spectra, float64, make_spectra, random_spectra

SPECTRA = spectra()
N_PROBES, N_RUNS = 5, 60


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
