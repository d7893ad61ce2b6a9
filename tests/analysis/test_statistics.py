"""Statistics of spectra: moments, distribution functions and ranges against hand numbers."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext import batched_slq
from tests.analysis.errors.test_bands import SPECTRA
from tests.helpers.dense_measures import lanczos
from tests.helpers.spectra_cases import HAND, as_spectra, float64, hand, make_spectra, random_spectra


def test_trace_and_its_error() -> None:
    # Probes of block 0 say 10 x 0.75 and 10 x 1.5.
    value, stderr = hand().trace()
    assert value.tolist() == pytest.approx([11.25, 4.0, 0.0])
    assert stderr.tolist() == pytest.approx([10 * (0.75 / 2), 0.0, 0.0])


def test_frobenius_norm_and_its_error() -> None:
    # Probes of block 0 say 10 x 3.75 and 10 x 5.
    value, stderr = hand().frobenius_norm()
    square = 10 * 4.375
    assert value.tolist() == pytest.approx([math.sqrt(square), 4.0, 0.0])
    assert stderr.tolist() == pytest.approx([10 * (1.25 / 2) / (2 * math.sqrt(square)), 0.0, 0.0])


def test_one_probe_knows_no_error_but_of_a_single_element() -> None:
    one = {key: HAND[key][:1] for key in ("nodes", "weights", "steps")}  # type: ignore[index]
    spectra = make_spectra(**one, dims=[10, 1, 7])
    for _, stderr in (spectra.trace(), spectra.frobenius_norm()):
        assert stderr.tolist() == [math.inf, 0.0, math.inf]


def test_range_and_negative_mass() -> None:
    low, high = hand().eigenvalue_range()
    assert low.tolist() == [-1.0, 4.0, 0.0] and high.tolist() == [3.0, 4.0, 0.0]
    assert hand().negative_mass().tolist() == pytest.approx([0.375, 0.0, 0.0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_negative_mass_ignores_rounding_of_the_vectors(dtype: str) -> None:
    tolerance = 64 * torch.finfo(getattr(torch, dtype)).eps * 100
    nodes = [[[-1.5 * tolerance, -0.5 * tolerance, 100.0]]]
    spectra = make_spectra(nodes, [[[0.25, 0.25, 0.5]]], dtype=dtype)
    assert spectra.negative_mass().item() == pytest.approx(0.25)


def test_cdf_by_hand() -> None:
    x, shares = hand().cdf([-2.0, -1.0, 0.0, 1.0, 2.5, 3.0, 4.0])
    assert x.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.5, 3.0, 4.0]
    expected = [
        [0.0, 0.375, 0.375, 0.5, 0.625, 1.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    ]
    torch.testing.assert_close(shares, float64(expected))
    assert hand().cdf(0.0)[1].shape == (3, 1)


def test_cdf_at_its_own_nodes_ends_at_exactly_one() -> None:
    spectra = random_spectra()
    x, shares = spectra.cdf()
    assert (x.diff() > 0).all() and len(x) == spectra.quadrature.nodes.numel()
    assert (shares[:, -1] == 1).all() and (shares.diff(dim=1) >= 0).all()
    assert torch.equal(spectra.cdf(x.flip(0))[1], shares.flip(1))


def test_cdf_is_the_integral_of_the_density() -> None:
    spectra = random_spectra()
    grid, densities = spectra.density(sigma=1e-4)
    areas = torch.cumulative_trapezoid(densities, grid)
    nodes = spectra.merged[0].flatten()
    far = (grid[1:, None] - nodes).abs().amin(1) > 9e-4
    torch.testing.assert_close(spectra.cdf(grid[1:])[1][:, far], areas[:, far], rtol=0, atol=1e-10)


def test_quantiles_by_hand() -> None:
    # Block 0: cdf steps to 0.375 at -1, 0.5 at 1, 0.625 at 2, 1 at 3.
    got = hand().quantiles([0.0, 0.375, 0.4, 0.5, 0.625, 0.7, 1.0])
    assert got[0].tolist() == [-1.0, -1.0, 1.0, 1.0, 2.0, 3.0, 3.0]
    assert (got[1] == 4).all() and (got[2] == 0).all()
    assert hand().quantiles(0.5).tolist() == [[1.0], [4.0], [0.0]]


def test_quantiles_equal_those_of_numpy_for_equal_weights() -> None:
    nodes = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spectra = make_spectra([[nodes.sort().values.tolist()]], [[[1 / 40] * 40]])
    q = (np.arange(40) + 0.5) / 40
    assert spectra.quantiles(q.tolist())[0].tolist() == np.quantile(nodes.numpy(), q, method="inverted_cdf").tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), q=st.floats(0, 1))
def test_quantiles_invert_the_cdf(seed: int, q: float) -> None:
    spectra = random_spectra(seed=seed)
    x = spectra.quantiles(q)
    for row in range(len(spectra)):
        assert spectra.cdf(x[row])[1][row, 0] >= q - 1e-11
        assert spectra.cdf(x[row] - 1e-9 * abs(x[row]))[1][row, 0] < max(q, 1e-300)


def test_padding_and_unfinished_probes_take_no_part() -> None:
    # Garbage beyond the steps, a probe that made no step: the rest is as without them.
    nodes = [[[1.0, 2.0, math.nan]], [[math.nan, 5.0, 1e300]]]
    weights = [[[0.25, 0.75, 0.5]], [[0.5, 0.5, math.nan]]]
    broken = make_spectra(nodes, weights, steps=[[2], [0]], nonfinite=[[True], [True]], dims=[5])
    clean = make_spectra([[[1.0, 2.0]]], [[[0.25, 0.75]]], dims=[5])
    assert broken.trace()[0].tolist() == clean.trace()[0].tolist() == [8.75]
    assert broken.trace()[1].tolist() == [math.inf]
    assert broken.eigenvalue_range() == clean.eigenvalue_range()
    assert broken.negative_mass().tolist() == [0.0]
    assert broken.quantiles([0.2, 0.3]).tolist() == [[1.0, 2.0]]
    grid, density = broken.density(sigma=0.1)
    torch.testing.assert_close(density, clean.density(sigma=0.1, grid=grid)[1])


def test_moments_of_a_known_operator() -> None:
    # End to end with batched_slq: diagonal blocks of known trace and norm, errors about as large as stated.
    diagonal = torch.linspace(-1, 3, 200, dtype=torch.float64)
    dims = [150, 49, 1]
    quadrature = batched_slq(lambda v: v * diagonal, dims, num_probes=40, num_steps=20, dtype=torch.float64)
    spectra = Spectra([BlockInfo(f"b{d}", (d,), d, (f"b{d}",)) for d in dims], quadrature, {})
    for (value, stderr), exact in (
        (spectra.trace(), [part.sum() for part in diagonal.split(dims)]),
        (spectra.frobenius_norm(), [part.norm() for part in diagonal.split(dims)]),
    ):
        assert ((value - torch.stack(exact)).abs() <= 4 * stderr + 1e-12).all()
        assert (stderr[:2] > 0).all() and stderr[2] == 0
    low, high = spectra.eigenvalue_range()
    assert (low >= torch.stack([part.min() for part in diagonal.split(dims)]) - 1e-12).all()
    assert (high <= torch.stack([part.max() for part in diagonal.split(dims)]) + 1e-12).all()
    value, stderr = quadrature.moment(1)
    exact, error = quadrature.integrate(lambda x: x)
    torch.testing.assert_close((value, stderr), (exact, torch.where(torch.tensor(dims) == 1, 0.0, error)))


def test_density_defaults() -> None:
    spectra = random_spectra()
    nodes = spectra.merged[0]
    assert spectra.default_sigma(axis="linear") == pytest.approx(0.01 * float(nodes.max() - nodes.min()))
    grid, densities = spectra.density()
    assert densities.shape == (4, len(grid))
    torch.testing.assert_close(torch.trapezoid(densities, grid), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert grid[0] <= nodes.min() - 8.5 * spectra.default_sigma(axis="linear")
    assert grid[-1] >= nodes.max() + 8.5 * spectra.default_sigma(axis="linear")


def test_density_is_the_mean_over_probes() -> None:
    spectra = random_spectra(n_probes=2)
    grid = torch.linspace(-3, 3, 50, dtype=torch.float64)
    single = []
    for probe in range(2):
        q = spectra.quadrature
        one = {f: getattr(q, f)[probe : probe + 1] for f in ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")}
        single.append(Spectra(spectra.blocks, dataclasses.replace(q, **one), {}).density(0.1, grid)[1])
    torch.testing.assert_close(spectra.density(0.1, grid)[1], (single[0] + single[1]) / 2)
    assert spectra.density(0.1, [0.0, 1.0])[1].shape == (4, 2)


def test_refuses_bad_density_cdf_and_quantile_arguments() -> None:
    spectra = random_spectra()
    with pytest.raises(ValueError, match="density: sigma must be finite"):
        spectra.density(sigma=-1.0)
    with pytest.raises(ValueError, match="density: grid must ascend"):
        spectra.density(grid=[1.0, 0.0])
    with pytest.raises(ValueError, match="cdf: x must have shape"):
        spectra.cdf([math.nan])
    for q in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"quantiles: q must be in \[0, 1\]"):
            spectra.quantiles(q)


def test_kth_eigenvalue_covers_the_truth() -> None:
    eigenvalues = torch.linspace(0, 1, 200) ** 4
    inside = 0
    for seed in range(40):
        q = lanczos(eigenvalues, num_probes=5, num_steps=40, seed=seed).quadrature
        value, lower, upper = as_spectra(q).kth_eigenvalue(10)
        inside += int(lower <= eigenvalues[-10] + 1e-6 and eigenvalues[-10] - 1e-6 <= upper)
        assert lower <= value <= upper and upper - lower < 0.4
    assert inside >= 34


def test_mass_at_zero_is_the_rank_deficiency() -> None:
    for dtype in (torch.float32, torch.float64):
        q = lanczos(SPECTRA["low rank"] + 0.5 * (SPECTRA["low rank"] > 0), num_probes=20, num_steps=40, dtype=dtype)
        assert as_spectra(q.quadrature).zero_mass().item() == pytest.approx(0.9, abs=0.03)
    assert as_spectra(lanczos(SPECTRA["arcsine"]).quadrature).zero_mass().item() == 0
    hand = make_spectra([[[-0.1, 0.0, 2.0]]], [[[0.25, 0.5, 0.25]]])
    assert hand.zero_mass().item() == 0.5 and hand.zero_mass(0.1).item() == 0.75
    with pytest.raises(ValueError, match="zero_mass: tolerance must not be negative, got -1"):
        hand.zero_mass(-1)


def test_histogram_equals_numpy() -> None:
    result = random_spectra(dims=[40, 30, 20, 15])
    nodes, weights = (part.numpy() for part in result.merged)
    for bins in (7, [-1.0, -0.5, 0.0, 0.01, 2.0]):
        edges, counts = result.histogram(bins)
        for row, dim in enumerate(result.dims):
            expected, _ = np.histogram(nodes[row], edges.numpy(), weights=dim * weights[row])
            np.testing.assert_allclose(counts[row].numpy(), expected, atol=1e-12)
    assert result.histogram()[1].sum(1).tolist() == pytest.approx([40, 30, 20, 15])
    constant = make_spectra([[[3.0]]], [[[1.0]]], dims=[8])
    assert constant.histogram(1)[1].tolist() == [[8.0]]


@pytest.mark.parametrize(("bins", "text"), [(0, "at least 1, got 0"), ([1.0], "two edges"), ([1.0, 0.0], "ascend")])
def test_histogram_refusals(bins: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"histogram: .*{text}"):
        random_spectra().histogram(bins)  # type: ignore[arg-type]


def test_histogram_of_nothing_known_needs_edges() -> None:
    nothing = make_spectra([[[0.0]]], [[[0.0]]], steps=[[0]], nonfinite=[[True]])
    with pytest.raises(ValueError, match="histogram: bins must be edges if no block has a Lanczos step, got 50"):
        nothing.histogram()
    assert bool(nothing.histogram([0.0, 1.0])[1].isnan().all())
