"""Arguments for every op, and a uniform call of each for tests that apply to all of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from blockhess_ext import ops
from blockhess_ext.layout import Layout
from tests.gpu.device import misaligned, on
from tests.helpers.combination_cases import Combination
from tests.helpers.recurrence_cases import STEPS, Case, mid_flight

# One element, ends at every position of a 16-byte pack, exactly one tile, one tile and more, several tiles.
RAGGED = (1, 2, 7, 1, 1000, 3, 32768, 5, 65_539)
SHORT = (1, 3, 4, 1, 6, 130, 1027)
MANY = (9,) * 700
N_PROBES = 3
VECTORS = ("w", "v", "v_prev")


def step_case(dtype: torch.dtype, dims: tuple[int, ...], stored: list[bool] | None = None, steps: int = STEPS) -> Case:
    """Return recurrences after some steps on the CPU: some ended, one with NaN, an eigenvector, scratch of NaN."""
    case = mid_flight(dtype, torch.Generator().manual_seed(0), dims, N_PROBES, steps)
    case.layout = case.layout.with_basis(stored or [False] * len(dims))
    last = len(dims) - 1
    case.w[1, case.layout.columns(last).start] = math.nan
    case.w[0, case.layout.columns(5)] = 3 * case.v[0, case.layout.columns(5)]
    case.recurrences.beta[:steps, 0, 5] = 0.0
    case.partial.fill_(math.nan)
    return case


def state(case: Case) -> list[Tensor]:
    """Return the tensors that a step writes."""
    return [case.v_prev, *vars(case.recurrences).values()]


def shifted(case: Case, by: int) -> Case:
    """Return the case with misaligned vectors."""
    for name in VECTORS:
        setattr(case, name, misaligned(getattr(case, name), by))
    return case


@dataclass
class Projection:
    """The arguments of reorthogonalize."""

    case: Case
    basis: Tensor
    partial: Tensor

    def run(self, backend: ModuleType) -> None:
        c = self.case
        backend.reorthogonalize(c.v_prev, self.basis, c.recurrences, c.layout, self.partial)

    def results(self) -> list[Tensor]:
        return [*state(self.case), self.basis.nan_to_num(7.0)]


def projection(dtype: torch.dtype, dims: tuple[int, ...], count: int, capacity: int) -> Projection:
    """Return residuals of lanczos_step and an orthonormal basis, with NaN in rows that must not be read.

    Most recurrences have filled `count` rows, one just the first.
    """
    rng = torch.Generator().manual_seed(1)
    case = step_case(dtype, dims, [l != 1 for l in range(len(dims))], steps=count - 1)
    ops.lanczos_step(*case.arguments())
    basis = torch.full((capacity, N_PROBES, case.layout.n_basis), math.nan, dtype=dtype)
    for l, dim in enumerate(dims):
        columns = case.layout.basis_columns(l)
        if columns is not None:
            q = torch.randn(N_PROBES, dim, count, generator=rng, dtype=torch.float64)
            basis[:count, :, columns] = (
                torch.linalg.qr(q)[0].permute(2, 0, 1).to(dtype) if dim >= count else torch.zeros((), dtype=dtype)
            )
            for p in range(N_PROBES):
                basis[case.recurrences.steps[p, l] + 1 :, p, columns] = math.nan
    partial = torch.full((N_PROBES, case.layout.n_tiles, capacity + 1), math.nan, dtype=torch.float64)
    return Projection(case, basis, partial)


def tridiagonals(m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return random, clustered, decoupled, graded, huge, tiny and zero matrices, one of few steps and one of none."""
    rng = torch.Generator().manual_seed(2)
    alpha = torch.randn(9, m, generator=rng, dtype=torch.float64)
    beta = torch.rand(9, m, generator=rng, dtype=torch.float64)
    steps = torch.full((9,), m)
    alpha[1], beta[1] = 1.0, 1e-9
    beta[2, ::2] = 0.0
    scale = torch.logspace(0, -24, m, dtype=torch.float64)
    alpha[3], beta[3] = alpha[3] * scale, beta[3] * scale
    alpha[4], beta[4] = alpha[4] * 1e150, beta[4] * 1e150
    alpha[5], beta[5] = alpha[5] * 1e-150, beta[5] * 1e-150
    alpha[6], beta[6] = 0.0, 0.0
    steps[7], steps[8] = m // 2, 0
    alpha[7, m // 2 :], beta[7, max(m // 2 - 1, 0) :] = math.nan, math.nan
    return alpha, beta, steps


def density_arguments() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return rows of unsorted nodes, some of weight zero, each with another sigma, and a grid of odd size."""
    rng = torch.Generator().manual_seed(3)
    nodes = torch.randn(4, 300, generator=rng, dtype=torch.float64)
    weights = torch.rand(4, 300, generator=rng, dtype=torch.float64)
    weights[:, ::7] = 0.0
    grid = torch.linspace(-3, 3, 1201, dtype=torch.float64)
    return nodes, weights, grid, torch.tensor([1e-3, 0.02, 1.0, 1e-6], dtype=torch.float64)


def combinations(dtype: torch.dtype, device: str = "cpu", by: int = 0) -> list[Combination]:
    """Return linear combinations and a sum of one; all tensors start `by` elements after an aligned address."""
    rng = torch.Generator().manual_seed(4)

    def random(*shape: int) -> Tensor:
        return misaligned(torch.randn(*shape, generator=rng, dtype=torch.float64).to(device, dtype), by)

    bases = [random(3, 70, 128), random(2, 70, 1), random(3, 128, 70).mT]
    terms = bases, [random(70, 128), random(1, 128), None], [1.0, -0.3, 2.0], [0, 1, 0]
    aligned = [random(3, 70, 128), random(2, 70, 1)], [random(70, 128), random(1, 128)], [0.5, 0.2], [0, 1]
    sum_, whole = random(3, 70, 1), random(3, 70, 128)
    return [Combination(False, whole, *aligned), Combination(True, sum_, *terms), Combination(False, whole, *terms)]


def probes_of(device: str, distribution: str, dtype: torch.dtype, backend: ModuleType = ops) -> Tensor:
    """Return probes of the ragged layout for large seeds and ids."""
    ids = torch.arange(len(RAGGED), device=device) + 2**40
    layout = Layout.of(RAGGED, device)
    options = {"seed": 2**62 + 5, "first_probe": 3, "distribution": distribution, "dtype": dtype}
    return backend.random_probes(layout, N_PROBES, block_ids=ids, **options)


def call_of(op: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Callable[[], list[Tensor]], Case | None]:
    """Return a non-blocking call of an op that returns its results, and the case that it advances, if any."""
    raw = torch.ops.blockhess_ext
    if op == "lanczos_step":
        case = on(device, step_case(dtype, RAGGED))

        def step() -> list[Tensor]:
            ops.lanczos_step(*case.arguments())
            return state(case)

        return step, case
    if op == "reorthogonalize":
        start = on(device, projection(dtype, RAGGED, 3, 5))

        steps = start.case.recurrences.steps.clone()

        def project() -> list[Tensor]:
            start.case.recurrences.steps.copy_(steps)  # repeat the same step
            start.run(ops)
            return [*state(start.case), start.basis]

        return project, start.case
    if op == "tridiag_quadrature":
        tridiagonal = on(device, tridiagonals(40))
        return lambda: list(raw.tridiag_quadrature(*tridiagonal)), None
    if op == "gaussian_density":
        arguments = on(device, density_arguments())
        return lambda: [raw.gaussian_density(*arguments)], None
    if op.startswith("linear_combination"):
        combination = combinations(dtype, device)[op.endswith("sum")]
        return lambda: [combination.after(ops)], None
    ids, layout = torch.arange(len(RAGGED), device=device), Layout.of(RAGGED, device)
    return lambda: [ops.random_probes(layout, N_PROBES, seed=1, block_ids=ids, dtype=dtype)], None


OPS = (
    "lanczos_step",
    "reorthogonalize",
    "tridiag_quadrature",
    "gaussian_density",
    "random_probes",
    "linear_combination",
    "linear_combination_sum",
)
