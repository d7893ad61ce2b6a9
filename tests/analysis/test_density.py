"""density.py: grids that carry everything, unit mass, the formula itself."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blockhess.analysis import density
from tests.helpers.spectra_cases import float64

EPS = torch.finfo(torch.float64).eps


def mass(nodes: torch.Tensor, weights: torch.Tensor, sigma: float) -> torch.Tensor:
    grid = density.node_grid(nodes, sigma)
    return torch.trapezoid(density.smooth(nodes, weights, grid, sigma), grid)


def test_one_node_is_a_gaussian() -> None:
    grid = float64([-1.0, 0.0, 2.0, 3.0])
    values = density.smooth(float64([[0.0], [2.0]]), float64([[1.0], [0.25]]), grid, 2.0)
    peak = 1 / (2 * math.sqrt(2 * math.pi))
    expected = [
        [peak * math.exp(-1 / 8), peak, peak * math.exp(-1 / 2), peak * math.exp(-9 / 8)],
        [0.25 * peak * math.exp(-d * d / 8) for d in (3, 2, 0, 1)],
    ]
    torch.testing.assert_close(values, float64(expected), rtol=1e-14, atol=0)


def test_each_block_may_have_its_own_sigma() -> None:
    grid, nodes, weights = float64([0.0, 1.0]), float64([[0.0], [0.0]]), float64([[1.0], [1.0]])
    both = density.smooth(nodes, weights, grid, float64([1.0, 3.0]))
    for row, sigma in enumerate((1.0, 3.0)):
        assert torch.equal(both[row], density.smooth(nodes, weights, grid, sigma)[row])
    assert both[0, 0] > both[1, 0]


@given(
    nodes=st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30),
    sigma=st.floats(1e-5, 1e7),
    data=st.data(),
)
def test_the_density_integrates_to_one_on_its_grid(nodes: list[float], sigma: float, data: st.DataObject) -> None:
    shares = data.draw(st.lists(st.floats(1e-3, 1), min_size=len(nodes), max_size=len(nodes)))
    weights = float64([shares]) / sum(shares)
    assert mass(float64([nodes]), weights, sigma).item() == pytest.approx(1, abs=1e-12)


def test_a_coarse_grid_would_lose_mass() -> None:
    # Control: the grid of the paper's code, 10,000 points over [min - 1, max + 1], with outliers of a wide spectrum.
    nodes, weights = float64([[0.0, 5e4]]), float64([[0.5, 0.5]])
    grid = torch.linspace(-1, 5e4 + 1, 10_000, dtype=torch.float64)
    coarse = torch.trapezoid(density.smooth(nodes, weights, grid, 0.1), grid)
    assert abs(coarse.item() - 1) > 0.1
    assert mass(nodes, weights, 0.1).item() == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1e-10, 1.0, 1e10, 1e200])
def test_any_scale(scale: float) -> None:
    nodes, weights = scale * float64([[-1.0, 0.0, 7.0]]), float64([[0.2, 0.3, 0.5]])
    assert mass(nodes, weights, 0.01 * scale).item() == pytest.approx(1, abs=1e-12)


def test_the_grid_covers_every_node_and_resolves_sigma() -> None:
    nodes = float64([[-3.0, 0.1, 0.15], [0.0, 12.3, 1e9]])
    sigma = 0.05
    grid = density.node_grid(nodes, sigma)
    h = density.grid_spacing(sigma)
    assert h <= sigma / density.POINTS_PER_SIGMA
    assert (grid.diff() >= h).all()
    for node in nodes.flatten():
        near = grid[(grid - node).abs() <= 8.5 * sigma]
        assert near[0] <= node - 8.5 * sigma + h and near[-1] >= node + 8.5 * sigma - h
        assert (near.diff() == h).all()
    assert torch.equal(grid, (grid / h).round() * h)


def test_the_grid_is_bounded_by_the_number_of_nodes() -> None:
    nodes = torch.linspace(0, 1e9, 100, dtype=torch.float64)
    apart, together = density.node_grid(nodes, 1e-2), density.node_grid(nodes * 0, 1e-2)
    assert len(apart) <= 100 * (len(together) + 2)
    assert len(together) <= 4 * density.WINDOW * density.POINTS_PER_SIGMA + 3


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=40), st.floats(1e-3, 50))
def test_patches_are_exactly_the_union_of_the_windows(nodes: list[float], sigma: float) -> None:
    grid = density.node_grid(float64(nodes), sigma)
    h = density.grid_spacing(sigma)
    reach = math.ceil(density.WINDOW * sigma / h)
    wanted = {i for x in nodes for i in range(math.floor(x / h) - reach, math.ceil(x / h) + reach + 1)}
    assert (grid / h).long().tolist() == sorted(wanted)


def test_patches_that_touch_or_share_a_point() -> None:
    reach = math.ceil(density.WINDOW / density.grid_spacing(1.0))
    for gap in range(-3, 4):
        apart = (2 * reach + gap) * density.grid_spacing(1.0)
        steps = density.node_grid(float64([0.0, apart]), 1.0).diff() / density.grid_spacing(1.0)
        assert sorted(set(steps.tolist())) == ([1.0] if gap <= 1 else [1.0, float(gap)])


def test_spacing_is_the_power_of_two_below() -> None:
    assert density.grid_spacing(8.0, 8) == 1.0
    assert density.grid_spacing(7.99, 8) == 0.5
    assert density.grid_spacing(1e-3, 8) == 2.0**-13


def test_default_sigma() -> None:
    assert density.default_sigma(float64([-1.0, 0.5, 3.0])) == pytest.approx(0.04)
    assert density.default_sigma(float64([1e-12, 3e-12])) == pytest.approx(2e-14)
    # A single eigenvalue, exactly or up to rounding: its size instead of its range; nothing but zeros: 1.
    assert density.default_sigma(float64([-5.0, -5.0])) == pytest.approx(0.05)
    assert density.default_sigma(float64([5.0, 5.0 * (1 + 4 * EPS)])) == pytest.approx(0.05)
    assert density.default_sigma(float64([0.0, 0.0])) == pytest.approx(0.01)
    assert density.default_sigma(float64([0.0, 1e-300])) == pytest.approx(0.01)


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=10))
def test_default_sigma_is_always_accepted(nodes: list[float]) -> None:
    sigma = density.default_sigma(float64(nodes))
    assert density.check_sigma("op", sigma, float64(nodes)) == sigma


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf, 1e-20])
def test_refuses_sigma(sigma: float) -> None:
    with pytest.raises(ValueError, match=r"op: sigma must be finite and at least .*, got"):
        density.check_sigma("op", sigma, float64([1.0]))


@pytest.mark.parametrize(
    ("grid", "text"),
    [
        ([], "not empty"),
        ([[0.0, 1.0]], r"shape \(n_points,\).* got \(1, 2\)"),
        ([0.0, math.nan], "finite, got nan"),
        ([0.0, math.inf], "finite, got inf"),
        ([0.0, 1.0, 1.0], "ascend strictly"),
        ([1.0, 0.0], "ascend strictly"),
    ],
)
def test_refuses_grids(grid: list[float], text: str) -> None:
    with pytest.raises(ValueError, match=f"op: grid must .*{text}"):
        density.check_grid("op", grid)


def test_sigma_is_at_most_the_range_unless_there_is_none() -> None:
    nodes = float64([[-1.0, 2.0], [0.0, 0.5]])
    assert density.check_sigma_in_range("op", 3.0, nodes) == 3.0
    with pytest.raises(ValueError, match=r"op: sigma must be at most the range of all nodes, 3, got 3\.1"):
        density.check_sigma_in_range("op", 3.1, nodes)
    for same in ([0.0, 0.0], [5.0, 5.0], [5.0, 5.0 * (1 + 4 * EPS)]):  # nothing that could be blurred away
        assert density.check_sigma_in_range("op", 7.0, float64(same)) == 7.0
