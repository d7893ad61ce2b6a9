"""truncation.py: bounds against the exact measures of the probes, attained where they must be, and hand numbers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import wasserstein_distance

from blockhess.analysis.errors import steps
from blockhess.analysis.errors.steps import Recurrence, density_bound, exact, shortened, wasserstein_bound
from blockhess_ext import batched_slq
from tests.helpers.dense_measures import lanczos, spectra
from tests.helpers.spectra_cases import float64, make_spectra

SPECTRA = spectra()
EPS32 = torch.finfo(torch.float32).eps


def around(eigenvalues: torch.Tensor, points: int = 101) -> torch.Tensor:
    margin = 0.1 * (eigenvalues.max() - eigenvalues.min())
    return torch.linspace(float(eigenvalues.min() - margin), float(eigenvalues.max() + margin), points).double()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 30])
def test_cdf_bounds_hold(name: str, num_steps: int) -> None:
    seen = lanczos(SPECTRA[name], num_steps=num_steps)
    nodes = seen.quadrature.nodes[0, 0]
    x = torch.cat([around(seen.eigenvalues), nodes, nodes + 1e-9, nodes - 1e-6]).sort().values
    recurrence, shift = (
        Recurrence(seen.quadrature, 0),
        1e-12,
    )  # F jumps at eigenvalues, which nodes hit but for rounding
    truth = seen.cdf(x)
    assert (recurrence.cdf_bounds(x - shift)[0] <= truth + 1e-10).all()
    assert (truth <= recurrence.cdf_bounds(x + shift)[1] + 1e-10).all()
    lower, upper = recurrence.cdf_bounds(x)
    assert (lower >= 0).all() and (upper <= 1).all() and (upper >= lower).all()


def test_cdf_bounds_are_attained() -> None:
    # The measure that has all its mass at x that the moments allow is the Gauss-Radau rule itself: run Lanczos on it.
    first = lanczos(SPECTRA["arcsine"], num_probes=1, num_steps=8)
    recurrence = Recurrence(first.quadrature, 0)
    x = 0.3
    _, p, r = recurrence.polynomials(float64([[x]]))
    alpha, beta = recurrence.alpha[0], recurrence.beta[0]
    corner = x - beta[-1] ** 2 * (p / r)[0, 0]
    matrix = torch.diag(torch.cat([alpha, corner[None]])) + torch.diag(beta, 1) + torch.diag(beta, -1)
    nodes, vectors = torch.linalg.eigh(matrix)
    assert (nodes - x).abs().min() < 1e-12
    probe = vectors[0][None]
    q = batched_slq(lambda v: v * nodes, [9], probes=probe, num_steps=8, dtype=torch.float64)
    torch.testing.assert_close(q.alpha[0, 0], alpha, rtol=0, atol=1e-10)
    lower, upper = Recurrence(q, 0).cdf_bounds(float64([x]))
    at = int((nodes - x).abs().argmin())
    assert lower.item() == pytest.approx(float((probe[0, :at] ** 2).sum()), abs=1e-9)
    assert upper.item() == pytest.approx(float((probe[0, : at + 1] ** 2).sum()), abs=1e-9)
    assert upper - lower > 0.05


def test_christoffel_is_the_weight_at_a_node() -> None:
    seen = lanczos(SPECTRA["uniform"], num_steps=12)
    recurrence = Recurrence(seen.quadrature, 0)
    torch.testing.assert_close(recurrence.polynomials(recurrence.nodes)[0], recurrence.weights, rtol=1e-8, atol=0)


def test_christoffel_by_hand() -> None:
    # T = [[0, 1], [1, 0]]: p_0 = 1, p_1 = x, so 1 / (1 + x^2), whose integral is pi.
    spectra = make_spectra([[[-1.0, 1.0]]], [[[0.5, 0.5]]], dims=[9], dtype="float64")
    q = spectra.quadrature
    q.alpha.zero_()
    q.beta.copy_(float64([[[1.0, 0.5]]]))
    x = float64([[0.0, 1.0, -3.0, 1e8]])
    torch.testing.assert_close(Recurrence(q, 0).polynomials(x)[0], 1 / (1 + x**2))
    assert wasserstein_bound(Recurrence(q, 0)).item() == pytest.approx(math.pi, rel=1e-3)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_integral_of_christoffel_equals_quad(name: str) -> None:
    recurrence = Recurrence(lanczos(SPECTRA[name], num_probes=1, num_steps=10).quadrature, 0)
    nodes = recurrence.nodes[0].tolist()
    edges = [-math.inf, *nodes, math.inf]
    value = lambda x: float(recurrence.polynomials(float64([[x]]))[0])  # noqa: E731
    expected = sum(quad(value, a, b, limit=200)[0] for a, b in itertools.pairwise(edges))
    assert float(recurrence.bracket()[1].sum()) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("dtype", "how"), [(torch.float64, "full"), (torch.float32, "none")])
def test_wasserstein_bound(name: str, dtype: torch.dtype, how: str) -> None:
    seen = lanczos(SPECTRA[name], num_steps=20, dtype=dtype, reorthogonalize=how)
    bounds = wasserstein_bound(Recurrence(seen.quadrature, 0))
    for p, bound in enumerate(bounds.tolist()):
        nodes, weights = seen.quadrature.nodes[p, 0].numpy(), seen.quadrature.weights[p, 0].numpy()
        true = wasserstein_distance(seen.eigenvalues.numpy(), nodes, seen.weights[p].numpy(), weights)
        assert true <= bound + 64 * EPS32 * (dtype == torch.float32)
        # It is no empty promise, and would not survive a tenth of the bracket.
        if true > 1e-6:
            assert 0.1 * bound < true


def test_bounds_without_reorthogonalization_hold_up_to_rounding() -> None:
    # 120 steps in float32 on 300 eigenvalues of a steep spectrum: orthogonality is lost many times over.
    seen = lanczos(SPECTRA["power law"], num_steps=120, dtype=torch.float32, reorthogonalize="none")
    nodes = seen.quadrature.nodes[0, 0]
    assert int(((nodes - 1).abs() < 1e-5).sum()) > 1, (
        "no ghost copies of the largest eigenvalue: the test tests nothing"
    )
    x = around(seen.eigenvalues)
    recurrence = Recurrence(seen.quadrature, 0)
    shift = 32 * EPS32
    lower, upper = recurrence.cdf_bounds(x - shift)[0], recurrence.cdf_bounds(x + shift)[1]
    truth = seen.cdf(x)
    assert (lower <= truth + shift).all() and (truth <= upper + shift).all()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("num_steps", "relative"), [(10, 0.05), (30, 0.02), (60, 0.02), (30, 0.2)])
def test_density_bound(name: str, num_steps: int, relative: float) -> None:
    seen = lanczos(SPECTRA[name], num_steps=num_steps)
    sigma = relative * float(seen.eigenvalues[-1] - seen.eigenvalues[0])
    grid = around(seen.eigenvalues)

    def density(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        z = (grid[:, None] - x[:, None, :]) / sigma
        return ((-0.5 * z**2).exp() * w[:, None, :]).sum(2) / (sigma * math.sqrt(2 * math.pi))

    q = seen.quadrature
    error = density(seen.eigenvalues.expand(3, -1), seen.weights) - density(q.nodes[:, 0], q.weights[:, 0])
    bound = density_bound(q, 0, grid, sigma)
    peak = 1 / (sigma * math.sqrt(2 * math.pi))
    assert (error.mean(0).abs() <= bound + 1e-12 * peak).all()
    assert (bound <= peak).all()


def test_enough_steps_leave_nothing_open() -> None:
    seen = lanczos(SPECTRA["arcsine"], num_steps=100)
    bound = density_bound(seen.quadrature, 0, around(seen.eigenvalues), 0.1)
    assert bound.max() < 1e-9
    assert density_bound(lanczos(SPECTRA["arcsine"], num_steps=5).quadrature, 0, float64([0.0]), 0.1).item() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exhausted_recurrences_are_exact(dtype: torch.dtype) -> None:
    few = torch.tensor([0.0, 1.0, 5.0]).repeat(40)
    for q in (
        lanczos(few, num_steps=20, dtype=dtype, reorthogonalize="none").quadrature,
        lanczos(SPECTRA["uniform"][:15], num_steps=20, dtype=dtype).quadrature,
        lanczos(torch.zeros(10), num_steps=20, dtype=dtype).quadrature,
    ):
        assert exact(q).all() and not wasserstein_bound(Recurrence(q, 0)).any()
        lower, upper = Recurrence(q, 0).cdf_bounds(float64([-1.0, 0.5, 9.0]))
        assert torch.equal(lower, upper)
        assert not density_bound(q, 0, float64([0.0, 1.0]), 0.1).any()
    assert not exact(lanczos(SPECTRA["uniform"], num_steps=20, dtype=dtype).quadrature).any()


def test_one_step_and_no_step() -> None:
    assert wasserstein_bound(Recurrence(lanczos(SPECTRA["uniform"], num_steps=1).quadrature, 0)).isinf().all()
    broken = make_spectra([[[1.0, 2.0]]], [[[0.5, 0.5]]], steps=[[0]], nonfinite=[[True]])
    assert len(wasserstein_bound(Recurrence(broken.quadrature, 0))) == 0


@pytest.mark.parametrize("scale", [1e-100, 1e-10, 1e10, 1e100])  # test_breakdown.py: what lies beyond is refused
def test_any_scale(scale: float) -> None:
    def at(c: float) -> tuple[float, np.ndarray]:
        q = lanczos(c * SPECTRA["bimodal"], num_steps=12).quadrature
        recurrence = Recurrence(q, 0)
        lower, _ = recurrence.cdf_bounds(c * float64([-1.5, 0.0, 2.7]))
        return wasserstein_bound(recurrence)[0].item() / c, lower.numpy()

    expected, got = at(1.0), at(scale)
    assert got[0] == pytest.approx(expected[0], rel=1e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-6)


def test_recurrences_of_different_lengths() -> None:
    q = lanczos(SPECTRA["uniform"], num_probes=2, num_steps=12).quadrature
    q.steps[0, 0] = 7
    for name in ("alpha", "beta", "nodes", "weights"):
        getattr(q, name)[0, 0, 7:] = math.nan
    x = around(SPECTRA["uniform"], 20)
    bounds, bracket = Recurrence(q, 0).cdf_bounds(x), wasserstein_bound(Recurrence(q, 0))
    for row, made in enumerate((7, 12)):
        alone = lanczos(SPECTRA["uniform"], num_probes=2, num_steps=made).quadrature
        for part, expected in zip(bounds, Recurrence(alone, 0).cdf_bounds(x)):
            torch.testing.assert_close(part[row], expected[row], rtol=0, atol=1e-9)
    q.nodes[0, 0, :7] = lanczos(SPECTRA["uniform"], num_probes=2, num_steps=7).quadrature.nodes[0, 0]
    assert bracket[0] > bracket[1]
    assert density_bound(q, 0, x, 0.05).isfinite().all()


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    recurrence = Recurrence(lanczos(SPECTRA["uniform"], num_steps=9).quadrature, 0)
    x = around(SPECTRA["uniform"], 20)
    whole = recurrence.cdf_bounds(x)
    monkeypatch.setattr(steps, "_CHUNK", 1)
    for a, b in zip(whole, recurrence.cdf_bounds(x)):
        assert torch.equal(a, b)


def test_shortened_is_the_quadrature_of_fewer_steps() -> None:
    """The third block has two eigenvalues: its recurrences are exact after two steps and stay."""
    diagonal = torch.cat([torch.linspace(0, 1, 50), torch.arange(50.0), torch.arange(50.0) % 2])
    few, many = (batched_slq(lambda v: v * diagonal, [50] * 3, num_probes=2, num_steps=m) for m in (5, 10))
    half = shortened(many, 0.5)
    assert half.steps[:, :2].eq(5).all() and half.steps[:, 2].eq(many.steps[:, 2]).all()
    torch.testing.assert_close(half.nodes[:, :2, :5], few.nodes[:, :2], rtol=0, atol=1e-4)  # eps * 50 in float32
    torch.testing.assert_close(half.weights[:, :2, :5], few.weights[:, :2], rtol=0, atol=1e-4)
    assert half.nodes[:, 2].equal(many.nodes[:, 2])
