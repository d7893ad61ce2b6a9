"""The CUDA kernels, run on the CPU, equal the CPU kernels and the reference; the order of threads changes no bit."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from blockhess_ext import batched_slq, ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import FINISHED, NON_FINITE, RUNNING, Recurrences
from tests.cuda_on_cpu import emulator
from tests.cuda_on_cpu.emulator import Emulator
from tests.helpers.combination_cases import random_combination

pytestmark = pytest.mark.skipif(emulator.obstacle() is not None, reason=str(emulator.obstacle()))

# One element, ends at every position of a 16-byte pack, exactly one tile, several tiles.
RAGGED = (1, 2, 7, 1, 1000, 3, 32768, 5, 65_539)
SHORT = (1, 3, 4, 1, 6, 130, 1027)
N_PROBES = 2
EMULATORS = [
    Emulator(),
    Emulator(max_grid=3, order="reverse"),
    Emulator(max_grid=1, order="shuffled"),
    Emulator(shift=1),
    Emulator(max_grid=7, order="shuffled", shift=3),
]
if emulator.SANITIZE:  # the sanitizer checks addresses, which do not depend on orders and grids
    EMULATORS = [EMULATORS[0], EMULATORS[-1]]


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Step:
    """Recurrences after some steps: running, finished, non-finite, at the limit, with a NaN, with an eigenvector."""

    def __init__(
        self,
        dtype: torch.dtype,
        rng: torch.Generator,
        dims: tuple[int, ...],
        stored: list[bool] | None = None,
        steps: int = 5,
    ):
        self.layout = Layout.of(dims).with_basis(stored or [False] * len(dims))
        shape = (N_PROBES, len(dims))
        self.w, self.v, self.v_prev = (
            torch.randn(N_PROBES, self.layout.n, generator=rng, dtype=dtype) for _ in range(3)
        )
        for l in range(len(dims)):
            for x in (self.w, self.v, self.v_prev):
                x[:, self.layout.columns(l)] /= x[:, self.layout.columns(l)].norm(dim=1, keepdim=True)
        r = self.recurrences = Recurrences.start(N_PROBES, torch.full((len(dims),), steps + 5))
        r.alpha.fill_(7.0)
        r.beta.fill_(7.0)
        r.beta[:steps] = torch.rand(steps, *shape, generator=rng, dtype=torch.float64)
        r.steps.fill_(steps)
        r.norm.fill_(0.5)
        last = len(dims) - 1
        r.status[1, 4], r.status[0, last] = FINISHED, NON_FINITE
        r.limits[2] = steps + 1
        r.steps[0, 3], r.steps[1, 6] = 0, max(steps - 1, 0)  # behind the others
        r.steps[1, 2] = steps + 4  # the last row
        self.w[1, self.layout.columns(last).start] = math.nan
        self.w[0, self.layout.columns(5)] = 3 * self.v[0, self.layout.columns(5)]
        r.beta[:steps, 0, 5] = 0.0
        self.partial = torch.full((N_PROBES, self.layout.n_tiles), math.nan, dtype=torch.float64)

    def after(self, backend) -> Step:
        step = copy.deepcopy(self)
        backend.lanczos_step(step.w, step.v, step.v_prev, step.recurrences, step.layout, step.partial)
        return step

    def results(self) -> list[Tensor]:
        return [self.v_prev, *vars(self.recurrences).values()]


def assert_near(got: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


def assert_same_bits(results: list[list[Tensor]]) -> None:
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dims", [RAGGED, SHORT, (9,) * 40], ids=["ragged", "short", "many"])
def test_lanczos_step(dims, dtype, rng):
    start = Step(dtype, rng, dims)
    results = [start.after(e).results() for e in EMULATORS]
    rtol = 16 * torch.finfo(dtype).eps
    assert_near(results[0], start.after(ops).results(), rtol)
    assert_near(results[0], start.after(reference).results(), rtol)
    assert_same_bits(results)
    status = results[0][5]
    assert status[0, 5] == status[0, 2] == status[1, 2] == FINISHED and status[1, len(dims) - 1] == NON_FINITE
    assert (status == RUNNING).sum() >= 5


def test_magnitudes_out_of_range_stop_as_on_the_cpu(rng):
    for scale, status in ((1e-130, NON_FINITE), (1e-110, RUNNING), (1e110, RUNNING), (1e130, NON_FINITE)):
        start = Step(torch.float64, rng, RAGGED, steps=0)
        start.w *= scale
        start.recurrences.norm.zero_()
        got, expected = (start.after(backend).recurrences for backend in (EMULATORS[0], ops))
        assert torch.equal(got.status, expected.status) and torch.equal(got.steps, expected.steps)
        assert got.status[0, 1] == status


@pytest.mark.parametrize("steps", [-1, 10, 2**40])
@pytest.mark.parametrize("dims", [RAGGED, SHORT], ids=["ragged", "short"])
def test_steps_out_of_range_write_nothing(steps, dims, dtype, rng):
    start = Step(dtype, rng, dims)
    start.recurrences.steps[1] = steps
    after = start.after(Emulator(order="reverse"))
    assert torch.equal(after.recurrences.alpha[:, 1], start.recurrences.alpha[:, 1])
    assert torch.equal(after.recurrences.beta[:, 1], start.recurrences.beta[:, 1])
    assert (after.recurrences.steps[1] == steps).all() and (after.v_prev[1] == 0).all()


class Projection:
    """Residuals of lanczos_step, and a basis, mostly with `count` filled rows; the others, not to be read, are NaN."""

    def __init__(self, dtype: torch.dtype, rng: torch.Generator, dims: tuple[int, ...], count: int, capacity: int,
                 stored: list[bool] | None = None):  # fmt: skip
        stored = stored or [l != 1 for l in range(len(dims))]
        self.step = Step(dtype, rng, dims, stored, steps=count - 1).after(ops)
        layout = self.step.layout
        self.basis = torch.full((capacity, N_PROBES, layout.n_basis), math.nan, dtype=dtype)
        for p in range(N_PROBES):
            for l in range(len(dims)):
                columns = layout.basis_columns(l)
                if columns is None:
                    continue
                q = torch.randn(layout.dims[l], count, generator=rng, dtype=torch.float64)
                if layout.dims[l] >= count:
                    q = torch.linalg.qr(q)[0]
                self.basis[:count, p, columns] = q.T.to(dtype) if layout.dims[l] >= count else 0.0
                filled = int(self.step.recurrences.steps[p, l]) + 1
                self.basis[count:filled, p, columns] = 0.0
                self.basis[filled:, p, columns] = math.nan
        self.partial = torch.full((N_PROBES, layout.n_tiles, capacity + 1), math.nan, dtype=torch.float64)

    def results(self, backend, project: Tensor | None = None) -> list[Tensor]:
        step, basis = copy.deepcopy(self.step), self.basis.clone()
        backend.reorthogonalize(step.v_prev, basis, step.recurrences, step.layout, self.partial.clone(), project)
        return [*step.results(), basis.nan_to_num(7.0)]


@pytest.mark.parametrize(
    ("dims", "count", "capacity"),
    [
        (SHORT, 1, 1),
        pytest.param(SHORT, 8, 9, marks=pytest.mark.slow),
        (SHORT, 9, 9),
        (SHORT, 17, 18),  # CTAs with two groups of rows
        (RAGGED, 3, 3),
        pytest.param(RAGGED, 9, 10, marks=pytest.mark.slow),
    ],
)
def test_reorthogonalize(dims, count, capacity, dtype, rng):
    start = Projection(dtype, rng, dims, count, capacity)
    emulators = EMULATORS if dims == SHORT else EMULATORS[::3]
    results = [start.results(e) for e in emulators]
    rtol = 32 * torch.finfo(dtype).eps
    assert_near(results[0], start.results(ops), rtol)
    assert_near(results[0], start.results(reference), rtol)
    assert_same_bits(results)


@pytest.mark.parametrize("dims", [SHORT, RAGGED], ids=["short", "ragged"])
def test_partial_reorthogonalization(dims, dtype, rng):
    start = Projection(dtype, rng, dims, 3, 5)
    project = torch.zeros(N_PROBES, len(dims), dtype=torch.int32)
    project[1, ::2], project[0, 1::2] = 1, 1
    results = [start.results(e, project) for e in EMULATORS[::2]]
    rtol = 32 * torch.finfo(dtype).eps
    assert_near(results[0], start.results(ops, project), rtol)
    assert_near(results[0], start.results(reference, project), rtol)
    assert_same_bits(results)
    everywhere = start.results(EMULATORS[0])
    assert not torch.equal(results[0][0], everywhere[0])
    all_of_them = start.results(EMULATORS[0], torch.ones_like(project))
    assert_same_bits([everywhere, all_of_them])


def test_reorthogonalize_of_few_blocks(dtype, rng):
    start = Projection(dtype, rng, RAGGED, 9, 10, stored=[l in (4, 8) for l in range(len(RAGGED))])
    results = [start.results(e) for e in EMULATORS[::3]]
    rtol = 32 * torch.finfo(dtype).eps
    assert_near(results[0], start.results(ops), rtol)
    assert_same_bits(results)


def problems(m: int, rng: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return tridiagonal matrices: random, clustered, decoupled, graded, huge, tiny, zero, of few steps and of none."""
    alpha = torch.randn(11, m, generator=rng, dtype=torch.float64)
    beta = torch.rand(11, m, generator=rng, dtype=torch.float64)
    steps = torch.full((11,), m)
    alpha[1] = 1.0
    beta[1] = 1e-9
    beta[2, ::2] = 0.0
    scale = torch.logspace(0, -24, m, dtype=torch.float64)
    alpha[3] *= scale
    beta[3] *= scale
    alpha[4], beta[4] = alpha[4] * 1e150, beta[4] * 1e150
    alpha[5], beta[5] = alpha[5] * 1e-150, beta[5] * 1e-150
    alpha[6], beta[6] = 0.0, 0.0
    alpha[7] = 0.0
    steps[8], steps[9] = m // 2, 0
    alpha[8, m // 2 :], beta[8, max(m // 2 - 1, 0) :] = math.nan, math.nan
    alpha[10], beta[10] = 0.0, 1e-200
    alpha[10, 0] = 1.0
    return alpha, beta, steps


@pytest.mark.parametrize("m", [1, 2, 3, 40, 100])
@pytest.mark.parametrize("max_shared", [emulator.MAX_SHARED, 24 * 40 * 5, 0], ids=["shared", "little", "none"])
def test_tridiag_quadrature(m, max_shared, rng):
    alpha, beta, steps = problems(m, rng)
    emulators = [Emulator(g, o, max_shared=max_shared) for g, o in [(99, "forward"), (1, "reverse")]]
    results = [list(e.tridiag_quadrature(alpha, beta, steps)) for e in emulators]
    assert_same_bits(results)
    for (nodes, weights), (true_nodes, true_weights) in [
        (results[0], ops.tridiag_quadrature(alpha, beta, steps)),
        (results[0], reference.tridiag_quadrature(alpha, beta, steps)),
    ]:
        scale = true_nodes.abs().amax(1, keepdim=True).clamp(min=1e-300)
        eps = torch.finfo(torch.float64).eps
        assert ((nodes - true_nodes).abs() / scale).max() <= 8 * m * eps
        assert (nodes.diff() >= 0).all()
        torch.testing.assert_close(weights.sum(1), (steps > 0).double(), rtol=4 * m * eps, atol=4 * m * eps)
        for power in (1, 2, 3):  # moments, since the single weights of clustered nodes are ill-conditioned
            got, expected = (
                (w * (n / scale) ** power).sum(1) for n, w in [(nodes, weights), (true_nodes, true_weights)]
            )
            torch.testing.assert_close(got, expected, rtol=16 * m * eps, atol=16 * m * eps)


@pytest.mark.parametrize("lanes", ["8", "32", "5"])
def test_the_number_of_lanes_changes_no_bit(lanes, rng, monkeypatch):
    arguments = [torch.cat([x] * 5) for x in problems(40, rng)]
    expected = Emulator().tridiag_quadrature(*arguments)
    monkeypatch.setenv("BLOCKHESS_QUADRATURE_LANES", lanes)
    assert_same_bits([list(expected), list(Emulator().tridiag_quadrature(*arguments))])


def test_tridiag_quadrature_of_1000_steps(rng):
    alpha, beta = torch.randn(3, 1000, generator=rng).double(), torch.rand(3, 1000, generator=rng).double()
    nodes, weights = Emulator().tridiag_quadrature(alpha, beta, torch.tensor([1000, 999, 1000]))
    expected, _ = ops.tridiag_quadrature(alpha, beta, torch.tensor([1000, 999, 1000]))
    assert_near([nodes, weights.sum(1)], [expected, torch.ones(3).double()], 1000 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("max_shared", [emulator.MAX_SHARED, 0], ids=["shared", "none"])
def test_tridiag_quadrature_marks_what_fails(max_shared):
    alpha, beta = torch.ones(5, 4, dtype=torch.float64), torch.ones(5, 4, dtype=torch.float64)
    alpha[1, 2], beta[2, 0] = math.nan, math.inf
    nodes, weights = Emulator(max_shared=max_shared).tridiag_quadrature(alpha, beta, torch.tensor([4, 4, 4, 5, -1]))
    assert nodes.isnan().all(1).tolist() == weights.isnan().all(1).tolist() == [False, True, True, True, True]
    assert nodes[0].isfinite().all()


def test_gaussian_density(rng):
    nodes = torch.randn(4, 300, generator=rng, dtype=torch.float64)
    weights = torch.rand(4, 300, generator=rng, dtype=torch.float64)
    weights[:, ::7] = 0.0
    sigma = torch.tensor([1e-3, 0.02, 1.0, 1e-6], dtype=torch.float64)
    grid = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    results = [[e.gaussian_density(nodes, weights, grid, sigma)] for e in EMULATORS]
    assert_same_bits(results)
    for expected in (
        ops.gaussian_density(nodes, weights, grid, sigma),
        reference.gaussian_density(nodes, weights, grid, sigma),
    ):
        error = (results[0][0] - expected).abs().amax(1)
        assert (error <= 1e-12 / sigma).all()


@pytest.mark.parametrize("size", [1, 255, 256, 257])
def test_gaussian_density_of_every_size(size):
    x = torch.linspace(-1, 1, size, dtype=torch.float64)
    weights, sigma = torch.ones(1, size, dtype=torch.float64) / size, torch.tensor([0.1], dtype=torch.float64)
    got = Emulator().gaussian_density(x[None].contiguous(), weights, x, sigma)
    torch.testing.assert_close(got, reference.gaussian_density(x[None], weights, x, sigma), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(60))
def test_linear_combination(seed, dtype):
    case = random_combination(seed, dtype, least_dims=1)
    results = [[case.after(e)] for e in EMULATORS]
    assert_same_bits(results)
    for backend in (ops, reference):
        assert ((results[0][0] - case.after(backend)).abs() <= case.rounding()).all()


@pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)
def test_random_probes(distribution, dtype):
    layout = Layout.of(RAGGED)
    options = {
        "seed": 2**62 + 5,
        "block_ids": torch.arange(len(RAGGED)) + 2**40,
        "first_probe": 3,
        "distribution": distribution,
        "dtype": dtype,
    }
    results = [[e.random_probes(layout, N_PROBES, **options)] for e in EMULATORS]
    assert_same_bits(results)
    expected = ops.random_probes(layout, N_PROBES, **options)
    if distribution == "rademacher":
        assert torch.equal(results[0][0], expected)
    rtol = 64 * torch.finfo(dtype).eps  # norms are sums of up to 65,539 terms, in an order of each backend's own
    torch.testing.assert_close(results[0][0], expected, rtol=rtol, atol=0)
    torch.testing.assert_close(results[0][0], reference.random_probes(layout, N_PROBES, **options), rtol=rtol, atol=0)


@pytest.mark.parametrize("reorthogonalize", ["none", pytest.param("full", marks=pytest.mark.slow), "partial"])
def test_the_whole_loop(reorthogonalize, dtype, rng, monkeypatch):
    dims = (1, 5, 40, 333)
    blocks = []
    for dim in dims:
        matrix = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
        blocks.append((matrix + matrix.T).to(dtype) / dim**0.5)
    blocks[2] = torch.zeros_like(blocks[2])

    def hvp(v: Tensor) -> Tensor:
        return torch.cat([x @ H for x, H in zip(v.split(dims, dim=1), blocks)], dim=1)

    def run() -> list[Tensor]:
        q = batched_slq(hvp, dims, num_probes=2, num_steps=12, reorthogonalize=reorthogonalize, dtype=dtype)
        return [q.nodes, q.weights, q.steps]

    expected = run()
    for name in ("lanczos_step", "reorthogonalize", "tridiag_quadrature", "random_probes"):
        monkeypatch.setattr(ops, name, getattr(Emulator(max_grid=5), name))
    assert_near(run(), expected, 2**13 * torch.finfo(dtype).eps)
