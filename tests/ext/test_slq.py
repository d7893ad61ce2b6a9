"""batched_slq: Lanczos identities, exactness against dense eigendecompositions, and what a user may get wrong."""

from __future__ import annotations

import dataclasses
import gc
import math

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from blockhess_ext import NonFiniteError, Quadrature, batched_slq
from blockhess_ext.layout import Layout

DIMS = (1, 2, 30, 7)


def symmetric(n: int, rng: torch.Generator) -> torch.Tensor:
    A = torch.randn(n, n, generator=rng, dtype=torch.float64)
    return (A + A.T) / 2


class BlockDiagonal:
    """A dense block-diagonal operator that keeps every vector it was given and what it was told."""

    def __init__(self, blocks: list[torch.Tensor]) -> None:
        self.blocks, self.dims = blocks, [len(block) for block in blocks]
        self.inputs: list[torch.Tensor] = []
        self.finished: list[torch.Tensor] = []

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        self.inputs.append(v.clone())
        parts = [x @ block.to(v.dtype) for x, block in zip(v.split(self.dims, dim=1), self.blocks)]
        return torch.cat(parts, dim=1)

    def mark_finished(self, finished: torch.Tensor) -> None:
        self.finished.append(finished.clone())


@pytest.fixture
def operator(rng: torch.Generator) -> BlockDiagonal:
    return BlockDiagonal([symmetric(n, rng) for n in DIMS])


@pytest.mark.parametrize("reorthogonalize", ["none", "full", "auto"])
def test_full_depth_is_exact(operator, reorthogonalize):
    q = batched_slq(operator, DIMS, num_probes=3, dtype=torch.float64, reorthogonalize=reorthogonalize)
    for l, block in enumerate(operator.blocks):
        eigenvalues, vectors = torch.linalg.eigh(block)
        for p in range(3):
            v = operator.inputs[0][p].split(DIMS)[l]
            tolerance = 1e-11 if reorthogonalize != "none" or DIMS[l] < 30 else 1e-4  # ghosts without
            assert q.steps[p, l] == DIMS[l]
            torch.testing.assert_close(q.nodes[p, l, : DIMS[l]], eigenvalues, rtol=0, atol=tolerance)
            expected = (vectors.T @ v) ** 2
            torch.testing.assert_close(q.weights[p, l, : DIMS[l]], expected, rtol=0, atol=10 * tolerance)


def test_the_basis_tridiagonalises(operator, rng):
    """V^T V = I and V^T H V = T, from the vectors the operator saw."""
    q = batched_slq(operator, DIMS, num_probes=2, num_steps=20, dtype=torch.float64, reorthogonalize="full")
    for p in range(2):
        V = torch.stack([v[p, 3:33] for v in operator.inputs])  # block 2
        torch.testing.assert_close(V @ V.T, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-14)
        alpha, beta = q.alpha[p, 2], q.beta[p, 2, :-1]
        T = alpha.diag() + beta.diag(1) + beta.diag(-1)
        torch.testing.assert_close(V @ operator.blocks[2] @ V.T, T, rtol=0, atol=1e-13)


def test_moments_are_reproduced_below_degree_2m(operator):
    """sum_i w_i x_i^k = v^T H^k v for k < 2m, and not for k = 2m (degree of exactness of Gauss quadrature)."""
    m = 4
    q = batched_slq(operator, DIMS, num_probes=1, num_steps=m, dtype=torch.float64)
    v = operator.inputs[0][0, 3:33]
    H = operator.blocks[2] / torch.linalg.matrix_norm(operator.blocks[2], 2)
    nodes = q.nodes[0, 2] / torch.linalg.matrix_norm(operator.blocks[2], 2)
    for k in range(2 * m + 1):
        error = abs((q.weights[0, 2] * nodes**k).sum() - v @ torch.linalg.matrix_power(H, k) @ v)
        assert error < 1e-14 if k < 2 * m else error > 1e-6


def test_float32_agrees_with_float64(operator):
    a = batched_slq(operator, DIMS, num_steps=10)
    b = batched_slq(operator, DIMS, num_steps=10, dtype=torch.float64)
    assert (a.dtype, b.dtype) == ("float32", "float64")
    torch.testing.assert_close(a.integrate(torch.square)[0], b.integrate(torch.square)[0], rtol=1e-5, atol=1e-5)


def test_same_seed_same_bits_for_one_and_two_threads(rng):
    scales = torch.randn(200_000, generator=rng)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(batched_slq(lambda v: v * scales, (150_000, 50_000), num_probes=2, num_steps=8, seed=3))
    torch.set_num_threads(before)
    assert torch.equal(results[0].alpha, results[1].alpha) and torch.equal(results[0].beta, results[1].beta)
    assert torch.equal(results[0].nodes, results[1].nodes) and torch.equal(results[0].weights, results[1].weights)
    other = batched_slq(lambda v: v * scales, (150_000, 50_000), num_probes=2, num_steps=8, seed=4)
    assert not torch.equal(other.alpha, results[0].alpha)


def test_the_operator_sees_unit_vectors_or_zero(operator):
    batched_slq(operator, DIMS, num_probes=2, num_steps=12)
    for j, v in enumerate(operator.inputs):
        for l, segment in enumerate(v.split(DIMS, dim=1)):
            expected = 1.0 if j < DIMS[l] else 0.0
            assert segment.norm(dim=1).tolist() == pytest.approx([expected, expected], abs=1e-6)


def test_the_operator_is_told_what_is_finished(operator):
    batched_slq(operator, DIMS, num_probes=2, num_steps=12)
    assert [f[0].tolist() for f in operator.finished] == [
        [True, False, False, False],
        [True, True, False, False],
        [True, True, False, True],  # the block of 30 elements could go on
    ]


def test_it_stops_when_all_are_finished(operator):
    seen = []
    q = batched_slq(operator, DIMS, num_steps=1000, on_step=lambda step, running: seen.append((step, running)))
    assert len(operator.inputs) == 30 == seen[-1][0]
    assert seen[-1][1] == 0 and seen[0][1] == 30
    assert q.nodes.shape == (10, 4, 30)


def test_an_operator_may_return_its_argument():
    q = batched_slq(lambda v: v, [5, 3])
    assert (q.steps == 1).all()
    torch.testing.assert_close(q.nodes, torch.ones_like(q.nodes), rtol=0, atol=1e-6)


def test_three_vector_sets_at_most():
    """Alive at any call of the operator: its argument, the previous vectors, and (from inside) its result."""
    n, live = 100_000, []

    def hvp(v: torch.Tensor) -> torch.Tensor:
        live.append(sum(type(x) is torch.Tensor and x.numel() == v.numel() for x in gc.get_objects()))
        return 2 * v + v.roll(1, 1) + v.roll(-1, 1)

    batched_slq(hvp, [n], num_probes=2, num_steps=4, reorthogonalize="none")
    assert max(live) == 2  # v and v_prev; the result is the third


def test_given_probes_are_used_and_normalized(operator):
    probes = torch.randn(2, sum(DIMS), dtype=torch.float64)
    kept = probes.clone()
    q = batched_slq(operator, DIMS, probes=probes, num_steps=3)
    assert (q.distribution, q.seed, q.dtype, q.num_probes) == ("given", None, "float64", 2)
    assert torch.equal(probes, kept)
    for l, columns in enumerate(Layout.of(DIMS).columns(l) for l in range(4)):
        segment = kept[:, columns] / kept[:, columns].norm(dim=1, keepdim=True)
        torch.testing.assert_close(operator.inputs[0][:, columns], segment, rtol=1e-14, atol=0), l


def test_block_ids_key_the_probes(operator):
    a = batched_slq(operator, DIMS, num_steps=3, block_ids=[5, 6, 7, 8])
    reversed_operator = BlockDiagonal(operator.blocks[::-1])
    b = batched_slq(reversed_operator, DIMS[::-1], num_steps=3, block_ids=[8, 7, 6, 5])
    assert torch.equal(a.nodes, b.nodes.flip(1))


def test_seed_none_is_fresh_and_recorded(operator):
    a, b = (batched_slq(operator, DIMS, num_steps=3, seed=None) for _ in range(2))
    assert a.seed != b.seed and not torch.equal(a.nodes, b.nodes)
    assert torch.equal(batched_slq(operator, DIMS, num_steps=3, seed=a.seed).nodes, a.nodes)


def test_a_scipy_linear_operator():
    """Laplacian of a path, matrix-free: eigenvalues 2 - 2 cos(k pi / (n + 1))."""
    n = 64
    lap = scipy.sparse.linalg.LinearOperator(
        (n, n), matvec=lambda x: 2 * x - np.pad(x[1:], (0, 1)) - np.pad(x[:-1], (1, 0)), dtype=np.float64
    )

    def hvp(v: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([lap.matvec(x) for x in v.numpy()]))

    q = batched_slq(hvp, [n], dtype=torch.float64, num_probes=2, num_steps=n)
    expected = 2 - 2 * torch.cos(torch.arange(1, n + 1, dtype=torch.float64) * math.pi / (n + 1))
    torch.testing.assert_close(q.nodes[0, 0], expected, rtol=0, atol=1e-12)


def test_integrate_gives_traces_with_honest_errors(rng):
    A = symmetric(400, rng)
    A = A @ A / 400 + torch.eye(400, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(A).log().sum()
    deviations = []
    for seed in range(40):
        q = batched_slq(lambda v: v @ A, [400], num_probes=10, num_steps=40, dtype=torch.float64, seed=seed)
        value, stderr = q.integrate(torch.log)
        deviations.append(((value - exact) / stderr).item())
    within = sum(abs(d) < 2.26 for d in deviations)  # 95 % of Student's t with 9 degrees of freedom
    assert 34 <= within <= 40
    assert abs(sum(deviations)) / 40 < 0.6  # unbiased


def test_the_error_is_that_of_the_mean(operator):
    q = batched_slq(operator, DIMS, num_probes=5, num_steps=6)
    each = (q.weights * q.nodes**2).sum(-1)
    by_hand = torch.tensor(DIMS) * each.std(0) / math.sqrt(5)
    torch.testing.assert_close(q.integrate(torch.square)[1][1:], by_hand[1:])


def test_integrate_leaves_out_what_was_frozen_at_once():
    def hvp(v: torch.Tensor) -> torch.Tensor:
        w = 2 * v
        w[0, 0] = math.nan
        w[:, 3] = math.nan
        return w

    q = batched_slq(hvp, [3, 4], num_probes=4, on_nonfinite="mark")
    values, stderr = q.integrate(lambda x: x)
    assert values[0].item() == pytest.approx(6) and stderr[0] < 1e-6
    assert values[1].isnan() and stderr[1] == math.inf


def test_integrate_with_one_probe_and_one_element():
    q = batched_slq(lambda v: 3 * v, [1, 2], num_probes=1)
    values, stderr = q.integrate(torch.sqrt)
    assert values.tolist() == pytest.approx([math.sqrt(3), 2 * math.sqrt(3)])
    assert stderr.tolist() == [0.0, math.inf]


def test_integrate_refuses_what_is_not_finite(operator):
    q = batched_slq(operator, DIMS)
    with pytest.raises(ValueError, match=r"integrate: f must be finite at every node, got nan at node -.* of block"):
        q.integrate(torch.log)
    with pytest.raises(ValueError, match=r"integrate: f must return shape \(10, 4, 30\), got \(\)"):
        q.integrate(torch.sum)


def test_nan_in_one_lane_leaves_the_others(operator, rng):
    clean = batched_slq(operator, DIMS, num_probes=2, num_steps=12)

    class Failing(BlockDiagonal):
        def __call__(self, v: torch.Tensor) -> torch.Tensor:
            w = super().__call__(v)
            if len(self.inputs) == 5:
                w[1, 10] = math.nan
            return w

    with pytest.raises(NonFiniteError, match=r"got NaN, inf or .* in block 2 at step 5 of probe 1; ") as error:
        batched_slq(Failing(operator.blocks), DIMS, num_probes=2, num_steps=12)
    partial = error.value.partial
    assert partial.nonfinite.nonzero().tolist() == [[1, 2]]
    assert partial.steps[1, 2] == 4
    for x, y in [(partial.nodes, clean.nodes), (partial.weights, clean.weights)]:
        assert x.isfinite().all()
        others = ~partial.nonfinite
        assert torch.equal(x[others], y[others])
    reported = batched_slq(Failing(operator.blocks), DIMS, num_probes=2, num_steps=12, on_nonfinite="mark")
    assert torch.equal(reported.nodes, partial.nodes)


def test_nan_at_once_gives_no_steps():
    q = batched_slq(lambda v: v * math.nan, [3], on_nonfinite="mark")
    assert q.nonfinite.all() and (q.steps == 0).all() and (q.weights == 0).all() and q.nodes.isfinite().all()


def identity(v: torch.Tensor) -> torch.Tensor:
    return v


class RowByRow(BlockDiagonal):
    """The same operator, whose rounding does not depend on how many vectors it is given."""

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        parts = zip(v.split(self.dims, dim=1), self.blocks)
        return torch.cat([(x[:, None, :] * block).sum(-1) for x, block in parts], dim=1)


def test_parts_of_a_run_join_to_the_whole():
    rng = torch.Generator().manual_seed(0)
    operator = RowByRow([symmetric(n, rng) for n in DIMS])
    options = {"num_steps": 9, "dtype": torch.float64, "seed": 3, "block_ids": [5, 6, 7, 8]}
    each = ["none", "full", "full", "none"]
    whole = batched_slq(operator, DIMS, num_probes=5, reorthogonalize=each, **options)
    assert whole.reorthogonalize == tuple(each)
    probes = [
        batched_slq(operator, DIMS, first_probe=a, num_probes=b - a, reorthogonalize=each, **options)
        for a, b in ((0, 2), (2, 5))
    ]
    same(Quadrature.concatenate(probes, 0), whole)
    assert not torch.equal(probes[0].nodes, probes[1].nodes[:2])

    halves = []
    for blocks in ([0, 1], [2, 3]):
        part = RowByRow([operator.blocks[l] for l in blocks])
        chosen = options | {"block_ids": [options["block_ids"][l] for l in blocks]}
        halves.append(batched_slq(part, part.dims, num_probes=5, reorthogonalize=[each[l] for l in blocks], **chosen))
    assert halves[0].nodes.shape[-1] == 2  # no block of the first half makes more steps
    same(Quadrature.concatenate(halves, 1), whole)
    same(Quadrature.concatenate(halves[::-1], 1).select_blocks([2, 3, 0, 1]), whole)

    other = batched_slq(operator, DIMS, num_probes=1, **(options | {"seed": 4}))
    with pytest.raises(ValueError, match="parts must have the same seed, got 3 and 4"):
        Quadrature.concatenate([whole, other], 0)


def same(a: Quadrature, b: Quadrature) -> None:
    for field in dataclasses.fields(Quadrature):
        one, two = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, field.name


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"dims": []}, ValueError, "dims must have at least one entry, got none"),
        ({"dims": [3, 0]}, ValueError, r"dims\[1\] must be an integer at least 1, got 0"),
        ({"dims": [2.5]}, TypeError, r"dims\[0\] must be an integer at least 1, got 2.5"),
        ({"dims": 7}, TypeError, "dims must be a sequence of integers, got 7"),
        ({"num_steps": 0}, ValueError, "num_steps must be an integer at least 1, got 0"),
        ({"num_steps": True}, ValueError, "num_steps must be an integer at least 1, got True"),
        ({"num_probes": -1}, ValueError, "num_probes must be an integer at least 1, got -1"),
        ({"seed": -1}, ValueError, "seed must be an integer in 0"),
        ({"seed": "x"}, TypeError, "seed must be an integer in 0 ... 9223372036854775807, got 'x'"),
        ({"dtype": torch.float16}, ValueError, "dtype must be one of .*, got torch.float16"),
        ({"distribution": "cauchy"}, ValueError, "distribution must be one of gaussian, rademacher, got 'cauchy'"),
        (
            {"reorthogonalize": "partly"},
            ValueError,
            "reorthogonalize must be one of none, full, partial, auto, got 'partly'",
        ),
        ({"reorthogonalize": ["full"]}, ValueError, "reorthogonalize must have n_blocks = 2 entries, got 1"),
        (
            {"reorthogonalize": ["full", "auto"]},
            ValueError,
            r"reorthogonalize\[1\] must be one of none, full, partial, got",
        ),
        ({"first_probe": -1}, ValueError, "first_probe must be an integer at least 0, got -1"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite must be one of raise, mark, got 'ignore'"),
        ({"hvp": None}, TypeError, "hvp must be a function, got None"),
        ({"device": "foo"}, ValueError, "device must be cpu or cuda, got 'foo'"),
        ({"cuda_graph": "yes"}, ValueError, "cuda_graph must be one of True, False, got 'yes'"),
        (
            {"cuda_graph": True},
            ValueError,
            "cuda_graph must be False unless device is a CUDA device, got device cpu",
        ),
        ({"block_ids": 5}, TypeError, "block_ids must be a sequence of integers, got 5"),
        ({"block_ids": [1]}, ValueError, "block_ids must have n_blocks = 2 entries, got 1"),
        ({"block_ids": [1, -2]}, ValueError, r"block_ids\[1\] must be an integer in 0"),
        ({"device": "meta"}, ValueError, "device must be cpu or cuda, got meta"),
        ({"probes": [1.0]}, TypeError, "probes must be a tensor, got list"),
        ({"probes": torch.ones(2, 4)}, ValueError, r"probes must have shape .* = \(n_probes, 5\), got \(2, 4\)"),
        ({"probes": torch.ones(2, 5).half()}, ValueError, "dtype of probes must be one of"),
        ({"probes": torch.tensor([[1.0, 1, 1, 0, 0]])}, ValueError, "got norm 0.0 in block 1 of probe 0"),
        ({"probes": torch.ones(1, 5), "dtype": torch.float64}, ValueError, "dtype must be that of probes"),
        ({"probes": torch.ones(1, 5).to("meta"), "device": "cpu"}, ValueError, "device must be that of probes, meta"),
        ({"hvp": lambda v: v[:, :-1]}, ValueError, r"must return shape \(n_probes, n\) = \(10, 5\), got \(10, 4\)"),
        ({"hvp": lambda v: v.double()}, ValueError, "must return dtype torch.float32, got torch.float64"),
        ({"hvp": lambda v: v.to("meta")}, ValueError, "must return device cpu, got meta"),
        ({"hvp": lambda v: v.mul_(3)}, ValueError, "hvp must not change its argument in place"),
        ({"hvp": lambda v: None}, TypeError, "must return a tensor, got NoneType"),
    ],
)
def test_bad_input_is_one_clear_error(options, error, text):
    options = {"hvp": identity, "dims": [3, 2], **options}
    with pytest.raises(error, match=text) as caught:
        batched_slq(**options)
    assert str(caught.value).startswith("batched_slq: ") and "\n" not in str(caught.value)
