"""gaussian_density: hand numbers, unit mass, and equality with the broadcast formula."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess_ext import ops, reference


@pytest.mark.parametrize("density", [reference.gaussian_density, ops.gaussian_density])
def test_hand_numbers(density):
    one = torch.ones(1, 1, dtype=torch.float64)
    grid = torch.tensor([1.0, 1.5, 3.0], dtype=torch.float64)
    values = density(one, 2 * one, grid, torch.tensor([0.5], dtype=torch.float64))
    peak = 2 / (0.5 * math.sqrt(2 * math.pi))
    expected = [peak, peak * math.exp(-0.5), peak * math.exp(-8)]
    assert values.tolist()[0] == pytest.approx(expected, rel=1e-14)


def test_equals_reference(rng):
    nodes = torch.randn(5, 37, generator=rng, dtype=torch.float64)  # in no order
    weights = torch.rand(5, 37, generator=rng, dtype=torch.float64)
    grid = torch.linspace(-5, 5, 9001, dtype=torch.float64)
    sigma = torch.tensor([1e-4, 1e-2, 0.1, 1.0, 30.0], dtype=torch.float64)
    got = ops.gaussian_density(nodes, weights, grid, sigma)
    expected = reference.gaussian_density(nodes, weights, grid, sigma)
    peak = weights.sum(1) / (sigma * math.sqrt(2 * math.pi))
    assert ((got - expected).abs() <= 1e-15 * peak[:, None]).all()


def test_mass_is_the_sum_of_the_weights():
    nodes = torch.tensor([[-1.0, 0.0, 2.0]], dtype=torch.float64)
    weights = torch.tensor([[0.2, 0.3, 0.5]], dtype=torch.float64)
    grid = torch.linspace(-3, 4, 2001, dtype=torch.float64)
    density = ops.gaussian_density(nodes, weights, grid, torch.tensor([0.1], dtype=torch.float64))
    assert torch.trapezoid(density, grid).item() == pytest.approx(1.0, abs=1e-13)


def test_same_bits_for_one_and_two_threads(rng):
    nodes = torch.randn(3, 50, generator=rng, dtype=torch.float64)
    grid = torch.linspace(-4, 4, 20_001, dtype=torch.float64)
    sigma = torch.full((3,), 0.05, dtype=torch.float64)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.gaussian_density(nodes, nodes.abs(), grid, sigma))
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_opcheck(rng):
    nodes = torch.randn(2, 4, generator=rng, dtype=torch.float64)
    grid = torch.linspace(-1, 1, 5, dtype=torch.float64)
    arguments = (nodes, nodes.abs(), grid, torch.ones(2, dtype=torch.float64))
    torch.library.opcheck(torch.ops.blockhess_ext.gaussian_density.default, arguments)
