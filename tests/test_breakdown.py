"""The cases in which other implementations fail: tiny and huge curvature, few distinct eigenvalues, zero blocks."""

from __future__ import annotations

import pytest
import torch

from blockhess_ext import batched_slq

N, STEPS, PROBES = 400, 60, 5
SCALES = [1e-12, 1e-7, 1e-3, 1.0, 1e12]


def diagonal(scale: float, dtype: torch.dtype) -> torch.Tensor:
    """PSD, 21 distinct eigenvalues in [0, 50 scale], 95 % of the mass at zero."""
    d = torch.zeros(N, dtype=dtype)
    d[:20] = scale * torch.linspace(2.5, 50, 20, dtype=dtype)
    return d


@pytest.fixture(params=["none", "full"])
def reorthogonalize(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("scale", SCALES)
def test_a_psd_matrix_with_few_distinct_eigenvalues(scale, dtype, reorthogonalize):
    d = diagonal(scale, dtype)
    q = batched_slq(
        lambda v: v * d, [N], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize=reorthogonalize
    )
    tolerance = 1000 * torch.finfo(dtype).eps * 50 * scale
    assert q.nodes.min() >= -tolerance  # nothing negative
    assert q.nodes.max() == pytest.approx(50 * scale, abs=tolerance)  # the largest one, not more
    at_zero = (q.weights * (q.nodes.abs() < 0.5 * scale)).sum(-1).mean().item()
    assert at_zero == pytest.approx(0.95, abs=0.02)  # the mass of five random probes
    # every node that carries weight is an eigenvalue
    distance = (q.nodes[..., None] - d.double().unique()).abs().min(-1).values
    assert distance[q.weights > 1e-3].max() <= tolerance


def test_reorthogonalised_it_ends_after_as_many_steps_as_distinct_eigenvalues(dtype):
    """Or one step later: rounding leaves the 21-dimensional invariant subspace by eps |T| / beta_j a step."""
    d = diagonal(1.0, dtype)
    q = batched_slq(lambda v: v * d, [N], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize="full")
    assert ((q.steps == 21) | (q.steps == 22)).all()


@pytest.mark.parametrize("dim", [1, 2, 3, 100])
def test_a_zero_block_is_zero(dim, dtype, reorthogonalize):
    q = batched_slq(torch.zeros_like, [dim], dtype=dtype, reorthogonalize=reorthogonalize)
    assert (q.steps == 1).all() and (q.nodes == 0).all()
    assert q.integrate(torch.square)[0].item() == 0


@pytest.mark.parametrize("dim", [1, 2, 5, 20])
def test_blocks_smaller_than_the_number_of_steps(dim, dtype, reorthogonalize, rng):
    A = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
    A = ((A + A.T) / 2).to(dtype)
    q = batched_slq(lambda v: v @ A, [dim], num_probes=3, dtype=dtype, reorthogonalize=reorthogonalize)
    exact = torch.linalg.eigvalsh(A.double())
    tolerance = 100 * torch.finfo(dtype).eps * exact.abs().max().item()
    assert (q.steps == dim).all()
    if reorthogonalize == "full" or dim <= 5:
        torch.testing.assert_close(q.nodes, exact.expand_as(q.nodes), rtol=0, atol=tolerance)
    else:  # the interior nodes have lost orthogonality, not their bounds
        assert q.nodes.min() >= exact.min() - tolerance and q.nodes.max() <= exact.max() + tolerance


def test_rank_one(dtype, reorthogonalize):
    u = torch.arange(1.0, 101.0, dtype=dtype)
    u /= u.norm()
    q = batched_slq(lambda v: 3 * (v @ u)[:, None] * u, [100], dtype=dtype, reorthogonalize=reorthogonalize)
    assert (q.steps <= 3).all()
    assert q.integrate(torch.square)[0].item() == pytest.approx(9, rel=0.9)
    tolerance = 1000 * torch.finfo(dtype).eps
    assert q.nodes.max() == pytest.approx(3, abs=tolerance)
    assert ((q.nodes.abs() < tolerance) | ((q.nodes - 3).abs() < tolerance) | (q.weights < 1e-6)).all()


def test_one_early_lane_leaves_the_others_finite(dtype, reorthogonalize, rng):
    """A zero block, a one-element block and an ordinary one in a batch."""
    scales = torch.cat([torch.zeros(50), torch.tensor([4.0]), torch.randn(3000, generator=rng)]).to(dtype)
    q = batched_slq(lambda v: v * scales, [50, 1, 3000], dtype=dtype, reorthogonalize=reorthogonalize)
    assert q.nodes.isfinite().all() and q.weights.isfinite().all()
    assert (q.steps == torch.tensor([1, 1, 100])).all()
    extremes = scales[51:].min().item(), scales[51:].max().item()
    assert q.nodes[:, 2].min().item() == pytest.approx(extremes[0], abs=0.05)
    assert q.nodes[:, 2].max().item() == pytest.approx(extremes[1], abs=0.05)


def test_spectrum_over_24_orders_of_magnitude(dtype):
    """Absolute accuracy relative to the largest eigenvalue is what Lanczos gives; nothing breaks."""
    d = torch.logspace(-12, 12, 200, dtype=torch.float64).to(dtype)
    q = batched_slq(lambda v: v * d, [200], num_steps=100, dtype=dtype)
    assert q.nodes.isfinite().all()
    tolerance = 1000 * torch.finfo(dtype).eps * 1e12
    assert q.nodes.max().item() == pytest.approx(1e12, abs=tolerance)
    assert q.nodes.min() >= -tolerance
