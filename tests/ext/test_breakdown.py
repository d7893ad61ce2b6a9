"""Breakdown cases: tiny and huge curvature, few distinct eigenvalues, zero blocks, small blocks, NaN."""

from __future__ import annotations

import pytest
import torch

from blockhess_ext import NonFiniteError, batched_slq

N, STEPS, PROBES = 400, 60, 5
SCALES = [1e-12, 1e-7, 1e-3, 1.0, 1e12]


def diagonal(scale: float, dtype: torch.dtype) -> torch.Tensor:
    """PSD, 21 distinct eigenvalues in [0, 50 scale], 95 % of the mass at zero."""
    d = torch.zeros(N, dtype=dtype)
    d[:20] = scale * torch.linspace(2.5, 50, 20, dtype=dtype)
    return d


@pytest.fixture(params=["none", "full", "partial"])
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
    # every node of positive weight is an eigenvalue
    distance = (q.nodes[..., None] - d.double().unique()).abs().min(-1).values
    assert distance[q.weights > 1e-3].max() <= tolerance


def test_reorthogonalized_it_ends_after_one_step_per_distinct_eigenvalue(dtype):
    """Or one step later: rounding leaves the 21-dimensional invariant subspace by eps |T| / beta_j a step."""
    d = diagonal(1.0, dtype)
    q = batched_slq(lambda v: v * d, [N], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize="full")
    assert ((q.steps == 21) | (q.steps == 22)).all()


@pytest.mark.parametrize("power", [-390, 390])
def test_float64_results_scale_bitwise_within_the_range(power, reorthogonalize, rng):
    A = torch.randn(60, 60, generator=rng, dtype=torch.float64)
    A, scale = A + A.T, 2.0**power
    options = {"num_steps": 20, "dtype": torch.float64, "reorthogonalize": reorthogonalize}
    q, scaled = (batched_slq(lambda v, s=s: (v @ A) * s, [60], **options) for s in (1.0, scale))
    assert torch.equal(scaled.nodes, scale * q.nodes) and torch.equal(scaled.weights, q.weights)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1e-125, 1e125, 1e200, 1e300])
def test_float64_beyond_the_range_is_rejected(scale, reorthogonalize, rng):
    A = torch.randn(60, 60, generator=rng, dtype=torch.float64)
    A, sizes = A + A.T, torch.tensor([scale] * 60 + [1.0] * 60, dtype=torch.float64)
    with pytest.raises(NonFiniteError, match=r"magnitudes outside 1e-120 ... 1e120 in block 0 at step 1") as error:
        batched_slq(
            lambda v: torch.hstack([v[:, :60] @ A, v[:, 60:] @ A]) * sizes, [60, 60], num_steps=20,
            dtype=torch.float64, reorthogonalize=reorthogonalize,
        )  # fmt: skip
    q = error.value.partial
    assert q.nonfinite[:, 0].all() and (q.steps[:, 0] == 0).all() and (q.steps[:, 1] == 20).all()
    assert not q.nonfinite[:, 1].any() and q.nodes.isfinite().all()


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
    if reorthogonalize != "none" or dim <= 5:
        torch.testing.assert_close(q.nodes, exact.expand_as(q.nodes), rtol=0, atol=tolerance)
    else:  # loss of orthogonality affects interior nodes, not their range
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


def test_an_early_end_does_not_affect_the_others(dtype, reorthogonalize, rng):
    """A zero block, a one-element block and an ordinary one in a batch."""
    scales = torch.cat([torch.zeros(50), torch.tensor([4.0]), torch.randn(3000, generator=rng)]).to(dtype)
    q = batched_slq(lambda v: v * scales, [50, 1, 3000], dtype=dtype, reorthogonalize=reorthogonalize)
    assert q.nodes.isfinite().all() and q.weights.isfinite().all()
    assert (q.steps == torch.tensor([1, 1, 100])).all()
    extremes = scales[51:].min().item(), scales[51:].max().item()
    assert q.nodes[:, 2].min().item() == pytest.approx(extremes[0], abs=0.05)
    assert q.nodes[:, 2].max().item() == pytest.approx(extremes[1], abs=0.05)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_spectrum_over_24_orders_of_magnitude(sign, dtype, reorthogonalize):
    """Lanczos is accurate relative to the largest eigenvalue."""
    d = sign * torch.logspace(-12, 12, 200, dtype=torch.float64).to(dtype)
    q = batched_slq(lambda v: v * d, [200], num_steps=100, dtype=dtype, reorthogonalize=reorthogonalize)
    assert q.nodes.isfinite().all()
    tolerance = 1000 * torch.finfo(dtype).eps * 1e12
    assert (sign * q.nodes).max().item() == pytest.approx(1e12, abs=tolerance)
    assert (sign * q.nodes).min() >= -tolerance


def assert_measures_of(q, eigenvalues: torch.Tensor, mass: float, width: float, probes: int) -> None:
    """Assert that nodes of positive weight are eigenvalues, and that the weight at the largest is right.

    Eigenvalues closer than `width` count as one; `mass` is the fraction of eigenvalues at the largest, which the weight
    there estimates within four standard errors.
    """
    near = (q.nodes[..., None] - eigenvalues.double().unique()).abs().min(-1).values
    assert (near * (q.weights > 1e-6)).max() <= width
    found = (q.weights * (q.nodes >= eigenvalues.max().double() - width)).sum(-1).mean().item()
    stderr = (2 * mass * (1 - mass) / (len(eigenvalues) + 2) / probes) ** 0.5
    assert abs(found - mass) <= 4 * stderr + 1e-6
    torch.testing.assert_close(q.weights.sum(-1), torch.ones_like(q.weights[..., 0]), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", SCALES)
def test_repeated_eigenvalues(scale, dtype, reorthogonalize):
    """Three distinct eigenvalues: three steps, or one more where rounding leaves the invariant subspace."""
    d = scale * torch.tensor([-2.0] * 100 + [1.0] * 150 + [3.0] * 50, dtype=dtype)
    q = batched_slq(
        lambda v: v * d, [300], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize=reorthogonalize
    )
    assert_measures_of(q, d, 50 / 300, 1000 * torch.finfo(dtype).eps * 3 * scale, PROBES)
    if reorthogonalize != "none":
        assert (q.steps <= 4).all()


@pytest.mark.parametrize("scale", SCALES)
def test_clustered_eigenvalues(scale, dtype, reorthogonalize):
    """Clusters 1e-5 wide: no node of positive weight between two of them."""
    centers = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64).repeat_interleave(100)
    d = scale * (centers + 1e-5 * torch.linspace(-1, 1, 300, dtype=torch.float64))
    q = batched_slq(
        lambda v: v * d.to(dtype), [300], num_probes=PROBES, num_steps=STEPS, dtype=dtype,
        reorthogonalize=reorthogonalize,
    )  # fmt: skip
    assert_measures_of(q, scale * centers, 100 / 300, 1e-3 * scale, PROBES)


@pytest.mark.parametrize("scale", SCALES)
def test_a_diagonal_plus_noise(scale, dtype, reorthogonalize, rng):
    """Half of the eigenvalues near 0 and half near 1, perturbed by a dense matrix of norm 0.01."""
    noise = torch.randn(200, 200, generator=rng, dtype=torch.float64)
    noise = 0.01 * (noise + noise.T) / torch.linalg.matrix_norm(noise + noise.T, 2)
    d = torch.tensor([0.0, 1.0], dtype=torch.float64).repeat_interleave(100)
    A = (scale * (d.diag() + noise)).to(dtype)
    q = batched_slq(
        lambda v: v @ A, [200], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize=reorthogonalize
    )
    assert_measures_of(q, scale * d, 0.5, 0.011 * scale, PROBES)
    exact = torch.linalg.eigvalsh(A.double())
    assert q.nodes.max().item() == pytest.approx(exact[-1].item(), abs=1e-3 * scale)


@pytest.mark.parametrize(
    "entries", [(1.0, 1.0, 0.0), (2.0, 2.0, 2.0), (0.0, 0.0, 1.0), (1e-12, 1e12, 0.0), (1.0, -1.0, 1e-9)]
)
def test_dimension_two(entries, dtype, reorthogonalize):
    """[[a, c], [c, b]]: multiple of I, singular, antidiagonal, 24 orders of magnitude, nearly diagonal."""
    a, b, c = entries
    A = torch.tensor([[a, c], [c, b]], dtype=dtype)
    q = batched_slq(lambda v: v @ A, [2], num_probes=PROBES, dtype=dtype, reorthogonalize=reorthogonalize)
    exact = torch.linalg.eigvalsh(A.double())
    tolerance = 100 * torch.finfo(dtype).eps * float(exact.abs().max())
    distance = (q.nodes[..., None] - exact).abs().min(-1).values
    assert (distance * (q.weights > 1e-6)).max() <= tolerance and (q.steps <= 2).all()
    distinct = float(exact[1] - exact[0]) > 1e3 * tolerance
    assert (q.steps == (2 if distinct else 1)).all()


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-30, 1e30])
def test_dimension_one(value, dtype, reorthogonalize):
    q = batched_slq(lambda v: v * value, [1], num_probes=PROBES, dtype=dtype, reorthogonalize=reorthogonalize)
    assert (q.steps == 1).all() and (q.weights == 1).all()
    torch.testing.assert_close(q.nodes, torch.full_like(q.nodes, value), rtol=4 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("tol", [None, 0.02])
@pytest.mark.parametrize("step", [1, 3, 11])
def test_nan_in_one_recurrence_does_not_affect_the_others(step, tol, dtype, reorthogonalize, rng):
    """At any step: that recurrence keeps its earlier steps, and all others equal a clean run bitwise."""
    dims = [40, 300, 3]
    d = torch.randn(sum(dims), generator=rng, dtype=torch.float64).to(dtype)
    calls = []

    def failing(v: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        w = v * d
        w[1, 50] = torch.nan if len(calls) == step else w[1, 50]
        return w

    options = {"num_probes": 2, "num_steps": 30, "dtype": dtype, "reorthogonalize": reorthogonalize, "tol": tol}
    clean = batched_slq(lambda v: v * d, dims, **options)
    q = batched_slq(failing, dims, on_nonfinite="mark", **options)
    assert q.nonfinite.nonzero().tolist() == [[1, 1]] and q.steps[1, 1] == step - 1
    others = ~q.nonfinite
    for name in ("nodes", "weights", "alpha", "beta", "steps"):
        assert getattr(q, name).isfinite().all()
        assert torch.equal(getattr(q, name)[others], getattr(clean, name)[others])


@pytest.mark.parametrize("tol", [1e-6, 0.1])
@pytest.mark.parametrize("scale", [0.0, *SCALES])
def test_early_stopping_is_safe(scale, tol, dtype, reorthogonalize):
    d = diagonal(scale, dtype)
    q = batched_slq(
        lambda v: v * d, [N], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize=reorthogonalize, tol=tol
    )
    assert q.nodes.isfinite().all() and q.nodes.min() >= -1000 * torch.finfo(dtype).eps * 50 * scale
    at_zero = (q.weights * (q.nodes.abs() <= 0.5 * scale)).sum(-1).mean().item()
    assert at_zero == pytest.approx(1.0 if scale == 0 else 0.95, abs=0.02)
