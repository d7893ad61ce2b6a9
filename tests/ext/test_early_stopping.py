"""Early stopping: each recurrence stops independently, with the requested error and not much later."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from blockhess_ext import batched_slq, completion, early_stopping
from blockhess_ext.early_stopping import change, checkpoint_interval, cumulative, ends_converged, wasserstein
from tests.ext.test_completion import Late

N = 20_000


def semicircle(n: int) -> Tensor:
    x = np.linspace(-1, 1, 100_001)
    cdf = 0.5 + (x * np.sqrt(1 - x**2) + np.arcsin(x)) / np.pi
    return torch.from_numpy(np.interp((np.arange(n) + 0.5) / n, cdf, x))


def rule(nodes: Tensor) -> tuple[Tensor, Tensor]:
    return nodes[None], torch.full_like(nodes, 1 / len(nodes))[None]


def test_wasserstein_is_scipys(rng):
    a, b = ((torch.randn(6, m, generator=rng).double(), torch.rand(6, m, generator=rng).double()) for m in (7, 11))
    a, b = ((x, w / w.sum(-1, keepdim=True)) for x, w in (a, b))
    expected = [scipy.stats.wasserstein_distance(*(t[i].numpy() for t in (a[0], b[0], a[1], b[1]))) for i in range(6)]
    torch.testing.assert_close(wasserstein(a, b), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_change_is_a_fraction_of_the_range(scale):
    a, b = rule(scale * torch.tensor([0.0, 4.0]).double()), rule(scale * torch.tensor([1.0, 4.0]).double())
    assert change(a, b).item() == pytest.approx(1 / 8)
    # Half of the mass moves by a quarter of the range, 10 sigma: the densities do not overlap there.
    assert change(a, b, sigma=0.025).item() == pytest.approx(1.0, abs=1e-5)
    # It moves by one sigma: L1 distance 2 (2 Phi(1/2) - 1), times half of the mass.
    assert change(a, b, sigma=0.25).item() == pytest.approx(2 * math.erf(0.5 / math.sqrt(2)) / 2, abs=5e-3)
    same = rule(torch.full((3,), scale).double())
    assert change(same, same).item() == change(same, same, sigma=0.1).item() == 0


@pytest.mark.parametrize(("tol", "sigma"), [(0.02, None), (0.005, None), (0.01, 0.05), (0.05, 0.02)])
def test_it_stops_with_the_requested_error_and_not_much_later(tol, sigma):
    d = semicircle(N)
    q = batched_slq(lambda v: v * d, [N], num_probes=1, num_steps=400, dtype=torch.float64, tol=tol, sigma=sigma)
    m = int(q.steps)
    # The exact measure of this probe: 400 steps resolve it far below tol.
    fine = batched_slq(lambda v: v * d, [N], num_probes=1, num_steps=400, dtype=torch.float64)
    error = [
        float(change((part.nodes[0], part.weights[0]), (fine.nodes[0], fine.weights[0]), sigma))
        for part in (q, batched_slq(lambda v: v * d, [N], num_probes=1, num_steps=m // 2, dtype=torch.float64))
    ]
    assert error[0] <= tol < 1.5 * error[1]  # half of the steps do not suffice, or barely


def test_steps_are_those_of_a_run_of_that_length():
    d = semicircle(N).float()
    q = batched_slq(lambda v: v * d, [N], num_probes=2, num_steps=200, tol=0.01)
    m = int(q.steps[0, 0])
    plain = batched_slq(lambda v: v * d, [N], num_probes=2, num_steps=m)
    assert m < 200 and torch.equal(q.alpha[..., :m], plain.alpha) and torch.equal(q.nodes[..., :m], plain.nodes)


def test_each_recurrence_stops_independently():
    """Blocks with spikes, a smooth spectrum, few elements, and zero: bitwise the same alone and in a batch."""
    spikes = torch.tensor([0.0] * 4990 + [1.0] * 10)
    parts = [spikes, semicircle(N).float(), torch.linspace(0, 1, 7), torch.zeros(30)]
    dims = [len(part) for part in parts]
    d = torch.cat(parts)
    masks = []

    class Operator:
        def __call__(self, v: Tensor) -> Tensor:
            return v * d

        def mark_finished(self, mask: Tensor) -> None:
            masks.append(mask[0].tolist())

    q = batched_slq(Operator(), dims, num_probes=2, num_steps=150, tol=0.01, reorthogonalize="none")
    for l, part in enumerate(parts):
        alone = batched_slq(
            lambda v, part=part: v * part, [dims[l]], block_ids=[l], num_probes=2, num_steps=150, tol=0.01,
            reorthogonalize="none",
        )  # fmt: skip
        assert torch.equal(alone.steps[:, 0], q.steps[:, l])
        m = alone.nodes.shape[-1]
        assert torch.equal(alone.nodes[:, 0], q.nodes[:, l, :m])
    assert q.steps[0, 0] < 20 and 40 < q.steps[0, 1] < 100 and q.steps[0, 2] == 7 and q.steps[0, 3] == 1
    assert masks[-1] == [True] * 4 and len(masks) > 1


def test_two_small_changes_are_needed():
    """However large tol is: three checkpoints give two changes."""
    d = torch.linspace(0, 1, 1000)
    q = batched_slq(lambda v: v * d, [1000], num_steps=50, tol=1.0)
    assert (q.steps == 15).all()
    assert [checkpoint_interval(step) for step in (0, 40, 56, 100)] == [5, 5, 7, 13]


def test_the_bounds_of_the_ends_are_those_of_dense_eigenvectors(rng):
    alpha, beta = torch.randn(6, 9, generator=rng).double(), torch.rand(6, 9, generator=rng).double()
    matrices = torch.diag_embed(alpha) + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
    nodes, vectors = torch.linalg.eigh(matrices)
    bounds = beta[:, -1] * vectors[:, -1, [0, -1]].abs().amax(-1) / nodes.abs().amax(-1)
    everything = torch.ones(6, dtype=torch.bool)
    for i, bound in enumerate(bounds.tolist()):
        assert ends_converged(alpha, beta, bound * (1 + 1e-9), everything)[i]
        assert not ends_converged(alpha, beta, bound * (1 - 1e-9), everything)[i]
    assert not ends_converged(alpha, beta, 1.0, ~everything).any()


@pytest.mark.parametrize("sigma", [None, 0.05])
def test_the_ends_converge_where_they_are_no_part_of_the_density(sigma, monkeypatch):
    """Of 50,000 eigenvalues 100 are not zero: the density has converged long before the ends."""
    d, tol = torch.cat([torch.zeros(49_900), torch.linspace(-1, 1, 100)]), 0.01

    def error() -> float:
        q = batched_slq(lambda v: v * d, [len(d)], num_probes=3, num_steps=200, tol=tol, sigma=sigma)
        return float((q.nodes[:, 0].aminmax(dim=-1).max - 1).abs().max() + (q.nodes[:, 0].amin(-1) + 1).abs().max())

    with_bounds = error()
    monkeypatch.setattr(early_stopping, "ends_converged", lambda alpha, beta, tol, rows: rows)
    without = error()
    assert without > tol and (with_bounds < tol if sigma is None else with_bounds == without)


def test_a_late_host_does_not_change_results(monkeypatch):
    d = semicircle(3000)

    def run() -> list[Tensor]:
        q = batched_slq(lambda v: v * d, [1000, 2000], num_probes=2, dtype=torch.float64, tol=0.01)
        return [q.nodes, q.alpha, q.steps]

    at_once = run()
    monkeypatch.setattr(completion, "track", Late)
    for a, b in zip(at_once, run(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 201])
def test_cumulative_sums(n, rng):
    x = torch.randn(3, n, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(cumulative(x), x.cumsum(-1), rtol=0, atol=4 * max(n, 1) * torch.finfo(x.dtype).eps)


def test_no_operation_that_is_not_deterministic_on_cuda():
    """As listed by torch.use_deterministic_algorithms, of those that take floating-point numbers."""
    listed = {"cumsum", "bincount", "histc", "scatter_add_", "index_add_", "index_put_", "put_", "kthvalue", "median"}
    called = set()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if any(isinstance(x, Tensor) and x.is_floating_point() for x in args):
                called.add(op.overloadpacket.__name__)
            return op(*args, **(kwargs or {}))

    with Operations():
        q = batched_slq(lambda v: v * torch.linspace(0, 1, 500), [500], num_probes=2, num_steps=60, tol=0.01)
    assert (q.steps < 60).all() and "tridiag_quadrature" in called and not called & listed
    with Operations():
        torch.ones(2).cumsum(0)  # is noticed
    assert called & listed == {"cumsum"}


def test_densities_are_compared_in_pieces(monkeypatch, rng):
    sizes = []
    original = early_stopping.ops.gaussian_density

    def density(nodes, weights, grid, sigma):
        sizes.append(len(nodes) * len(grid))
        return original(nodes, weights, grid, sigma)

    def rule(m):
        nodes = torch.randn(300, m, generator=rng, dtype=torch.float64).sort(-1).values
        return nodes, torch.full_like(nodes, 1 / m)

    monkeypatch.setattr(early_stopping.ops, "gaussian_density", density)
    a, b = rule(5), rule(10)
    found = early_stopping.change(a, b, 1e-4)
    assert max(sizes) <= early_stopping.GRID_PIECE * early_stopping.ROWS_PIECE and len(sizes) == 2 * 2 * 3
    # Narrow Gaussians of distinct nodes do not overlap, so nearly all of the mass differs.
    assert found.min() > 1.5 and found.mean() > 1.95 and found.max() < 2.01
    alone = early_stopping.change(*((x[7:8], w[7:8]) for x, w in (a, b)), 1e-4)
    assert torch.equal(alone, found[7:8])


class Largest(TorchDispatchMode):
    """Records the largest number of elements that an op returns."""

    elements = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        views = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in views:
                self.elements = max(self.elements, x.numel())
        return result


@pytest.mark.parametrize(("reorthogonalize", "tol"), [("partial", None), ("full", 1e-9)])
def test_work_of_a_late_step_follows_the_running_recurrences(reorthogonalize, tol):
    dims, steps = [2] * 1000 + [40, 41], 40
    mode = Largest()

    def enter(step, running):
        if step == steps // 2:
            assert running == 2
            mode.__enter__()
        if step == steps - 1:
            mode.__exit__(None, None, None)

    scales = torch.linspace(-1, 2, sum(dims), dtype=torch.float64)
    batched_slq(
        lambda v: v * scales,
        dims,
        num_probes=1,
        num_steps=steps,
        reorthogonalize=reorthogonalize,
        tol=tol,
        dtype=torch.float64,
        on_step=enter,
        check=False,
    )
    # Vectors, and one number per recurrence, but no table with a row per step.
    assert 0 < mode.elements <= sum(dims)
