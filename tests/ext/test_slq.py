"""batched_slq: Lanczos identities, exactness against dense eigendecompositions, and its interface."""

from __future__ import annotations

import gc
import math
import weakref

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockhess_ext import NonFiniteError, batched_slq, ops
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import Recurrences

DIMS = (1, 2, 30, 7)


def symmetric(n: int, rng: torch.Generator) -> torch.Tensor:
    A = torch.randn(n, n, generator=rng, dtype=torch.float64)
    return (A + A.T) / 2


class BlockDiagonal:
    """A dense block-diagonal operator that records its arguments and the masks of finished recurrences."""

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


def test_the_basis_tridiagonalizes(operator, rng):
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


def test_mark_finished_is_called_with_the_mask(operator):
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
    """During a call of the operator: its argument, the previous vectors, and its result."""
    n, live = 100_000, []

    def hvp(v: torch.Tensor) -> torch.Tensor:
        live.append(sum(type(x) is torch.Tensor and x.numel() == v.numel() for x in gc.get_objects()))
        return 2 * v + v.roll(1, 1) + v.roll(-1, 1)

    batched_slq(hvp, [n], num_probes=2, num_steps=4, reorthogonalize="none")
    assert max(live) == 2  # v and v_prev; the result is the third


def test_tables_of_the_recurrences_are_released_before_the_quadrature(operator, monkeypatch):
    """They are as large as alpha and beta of the result, which are as large as its nodes and weights."""
    tables, alive = [], []
    start, quadrature = Recurrences.start, ops.tridiag_quadrature

    def tracked(*args, **kwargs):
        made = start(*args, **kwargs)
        tables.extend(map(weakref.ref, (made.alpha, made.beta)))
        return made

    def counted(*args):
        alive.append(sum(table() is not None for table in tables))
        return quadrature(*args)

    monkeypatch.setattr(Recurrences, "start", staticmethod(tracked))
    monkeypatch.setattr(ops, "tridiag_quadrature", counted)
    batched_slq(operator, DIMS, num_steps=3)
    assert len(tables) == 2 and alive == [0]


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_checks_of_many_blocks_have_no_loop_over_them():
    counts = []
    for n_blocks in (10, 1000):
        with Operations() as operations:
            batched_slq(lambda v: 2 * v, [1] * n_blocks, num_probes=1, num_steps=2, check=True)
        counts.append(operations.count)
    assert counts[1] < counts[0] + 100


def test_given_probes_are_used_and_normalized(operator):
    probes = torch.randn(2, sum(DIMS), dtype=torch.float64)
    before = probes.clone()
    q = batched_slq(operator, DIMS, probes=probes, num_steps=3)
    assert (q.distribution, q.seed, q.dtype, q.num_probes) == ("given", None, "float64", 2)
    assert torch.equal(probes, before)
    for l, columns in enumerate(Layout.of(DIMS).columns(l) for l in range(4)):
        segment = before[:, columns] / before[:, columns].norm(dim=1, keepdim=True)
        torch.testing.assert_close(operator.inputs[0][:, columns], segment, rtol=1e-14, atol=0), l


def test_block_ids_key_the_probes(operator):
    a = batched_slq(operator, DIMS, num_steps=3, block_ids=[5, 6, 7, 8])
    reversed_operator = BlockDiagonal(operator.blocks[::-1])
    b = batched_slq(reversed_operator, DIMS[::-1], num_steps=3, block_ids=[8, 7, 6, 5])
    assert torch.equal(a.nodes, b.nodes.flip(1))


def test_seed_none_is_random_and_recorded(operator):
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


def test_nan_in_one_recurrence_does_not_affect_the_others(operator, rng):
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
    marked = batched_slq(Failing(operator.blocks), DIMS, num_probes=2, num_steps=12, on_nonfinite="mark")
    assert torch.equal(marked.nodes, partial.nodes)


def test_nan_at_once_gives_no_steps():
    q = batched_slq(lambda v: v * math.nan, [3], on_nonfinite="mark")
    assert q.nonfinite.all() and (q.steps == 0).all() and (q.weights == 0).all() and q.nodes.isfinite().all()
