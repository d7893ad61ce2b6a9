"""tridiag_quadrature: known spectra, identities of Gauss quadrature, and equality with dense eigendecompositions."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess_ext import ops, reference

EPS = torch.finfo(torch.float64).eps


def problems(n_problems: int, m: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    alpha = torch.randn(n_problems, m, generator=rng, dtype=torch.float64)
    beta = torch.rand(n_problems, m, generator=rng, dtype=torch.float64)
    steps = torch.randint(0, m + 1, (n_problems,), generator=rng)
    steps[:3] = torch.tensor([0, 1, m])
    return alpha, beta, steps


@pytest.mark.parametrize("solve", [reference.tridiag_quadrature, ops.tridiag_quadrature])
def test_second_difference_matrix(solve):
    m = 50
    nodes, weights = solve(
        2 * torch.ones(1, m, dtype=torch.float64), torch.ones(1, m, dtype=torch.float64), torch.tensor([m])
    )
    k = torch.arange(1, m + 1, dtype=torch.float64)
    expected = (2 - 2 * torch.cos(k * math.pi / (m + 1)))[None]  # eigenvalues of tridiag(1, 2, 1), ascending
    torch.testing.assert_close(nodes, expected, rtol=0, atol=16 * EPS * 4)
    first = (2 / (m + 1) * torch.sin(k * math.pi / (m + 1)) ** 2)[None]  # squared first components
    torch.testing.assert_close(weights, first, rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("scale", [1e-150, 1e-12, 1.0, 1e12, 1e150])
def test_equals_reference_at_any_scale(scale, rng):
    alpha, beta, steps = problems(40, 60, rng)
    nodes, weights = ops.tridiag_quadrature(scale * alpha, scale * beta, steps)
    expected_nodes, expected_weights = reference.tridiag_quadrature(alpha, beta, steps)
    torch.testing.assert_close(nodes / scale, expected_nodes, rtol=0, atol=60 * 10 * EPS)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-10)  # close nodes may share weight


def test_moments_are_those_of_the_matrix(rng):
    """sum_i w_i x_i^k = (T^k)_11, the identity that makes it a quadrature."""
    alpha, beta, steps = problems(10, 30, rng)
    steps[:] = 30
    nodes, weights = ops.tridiag_quadrature(alpha, beta, steps)
    for b in range(10):
        T = alpha[b].diag() + beta[b, :-1].diag(1) + beta[b, :-1].diag(-1)
        power = torch.eye(30, dtype=torch.float64)
        for k in range(12):
            moment = (weights[b] * nodes[b] ** k).sum()
            assert moment == pytest.approx(power[0, 0].item(), abs=1e-13 * T.norm().item() ** k)
            power = power @ T


def test_padding_repeats_the_last_node_with_weight_zero(rng):
    alpha, beta, steps = problems(20, 12, rng)
    nodes, weights = ops.tridiag_quadrature(alpha, beta, steps)
    assert (nodes.diff(dim=1) >= 0).all()
    for b, k in enumerate(steps.tolist()):
        assert (weights[b, k:] == 0).all()
        assert (nodes[b, k:] == (nodes[b, k - 1] if k else 0)).all()
        assert weights[b].sum() == pytest.approx(1.0 if k else 0.0, abs=1e-13)


@pytest.mark.parametrize("m", [1, 2, 3, 1000])
def test_zero_clustered_and_decoupled(m):
    zero = torch.zeros(1, m, dtype=torch.float64)
    nodes, weights = ops.tridiag_quadrature(zero, zero, torch.tensor([m]))
    assert (nodes == 0).all() and weights.sum() == 1
    tiny = torch.full((1, m), 1e-300, dtype=torch.float64)
    nodes, weights = ops.tridiag_quadrature(torch.ones_like(tiny), tiny, torch.tensor([m]))
    assert (nodes == 1).all() and weights.sum() == pytest.approx(1)
    nodes, weights = ops.tridiag_quadrature(zero, torch.ones_like(zero), torch.tensor([m]))  # zero diagonal
    torch.testing.assert_close(nodes, -nodes.flip(1), rtol=0, atol=100 * EPS)


def test_a_problem_does_not_depend_on_its_neighbors(rng):
    """Problems share SIMD registers; each has the same bits alone and in any batch."""
    alpha, beta, steps = problems(40, 30, rng)
    together = ops.tridiag_quadrature(alpha, beta, steps)
    order = torch.randperm(40, generator=rng)
    shuffled = ops.tridiag_quadrature(alpha[order], beta[order], steps[order])
    for b in range(40):
        alone = ops.tridiag_quadrature(alpha[b : b + 1], beta[b : b + 1], steps[b : b + 1])
        for x, y, z in zip(together, alone, shuffled):
            assert torch.equal(x[b], y[0]) and torch.equal(x[order], z)


def test_same_bits_for_one_and_two_threads(rng):
    alpha, beta, steps = problems(70, 20, rng)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(ops.tridiag_quadrature(alpha, beta, steps))
    torch.set_num_threads(before)
    for x, y in zip(*results):
        assert torch.equal(x, y)


@pytest.mark.parametrize("tiny", [1e-100, 1e-200, 1e-300, 5e-324])
def test_parts_of_very_different_size(tiny):
    """Squares of the small entries underflow; the result is accurate to rounding of the largest."""
    alpha = torch.tensor([[1.0, 2.0, tiny, 2 * tiny, 3 * tiny, 0.0]], dtype=torch.float64)
    beta = torch.tensor([[0.5, tiny, tiny, tiny, tiny, 0.0]], dtype=torch.float64)
    nodes, weights = ops.tridiag_quadrature(alpha, beta, torch.tensor([6]))
    expected, first = reference.tridiag_quadrature(alpha, beta, torch.tensor([6]))
    torch.testing.assert_close(nodes, expected, rtol=0, atol=16 * EPS)
    torch.testing.assert_close(weights, first, rtol=0, atol=16 * EPS)


def test_weights_far_below_rounding_keep_their_size():
    """The first row shrinks by beta / gap from node to node: w_k is about prod (beta_i / (alpha_i - alpha_k))^2."""
    m, small = 8, 1e-3
    alpha = torch.arange(1, m + 1, dtype=torch.float64)[None]
    beta = torch.full((1, m), small, dtype=torch.float64)
    _, weights = ops.tridiag_quadrature(alpha, beta, torch.tensor([m]))
    for k in range(m):
        expected = math.prod((small / (k - i)) ** 2 for i in range(k))
        assert weights[0, k].item() == pytest.approx(expected, rel=1e-4)


def test_entries_that_are_not_finite_are_an_error():
    alpha = torch.zeros(3, 2, dtype=torch.float64)
    alpha[1, 1] = math.nan
    with pytest.raises(RuntimeError, match=r"tridiag_quadrature: alpha and beta must be finite.* problem 1"):
        ops.tridiag_quadrature(alpha, torch.ones_like(alpha), torch.tensor([2, 2, 2]))
    nodes, _ = ops.tridiag_quadrature(alpha, torch.ones_like(alpha), torch.tensor([2, 1, 2]))  # beyond the steps
    assert nodes.isfinite().all()


@pytest.mark.parametrize("n_problems, m", [(0, 0), (0, 5), (3, 0), (17, 0)])
def test_problems_without_entries(n_problems, m):
    empty = torch.zeros(n_problems, m, dtype=torch.float64)
    nodes, weights = ops.tridiag_quadrature(empty, empty, torch.zeros(n_problems, dtype=torch.int64))
    assert nodes.shape == weights.shape == (n_problems, m)


def test_steps_out_of_range_are_an_error():
    alpha = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"steps must be in 0 \.\.\. 2, got 3 in problem 0"):
        ops.tridiag_quadrature(alpha, alpha, torch.tensor([3]))


def test_opcheck(rng):
    torch.library.opcheck(torch.ops.blockhess_ext.tridiag_quadrature.default, problems(5, 6, rng))
