"""Inputs of the ops, and the errors of their results relative to the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from bench.harness.machine import Machine
from bench.harness.timing import check, difference
from blockhess_ext import huge_pages, ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import RUNNING, Recurrences

MAX_STEPS = 1000  # large enough that the recurrences keep running while the op is timed
ROUNDING = 64 * torch.finfo(torch.float32).eps

C = TypeVar("C", bound="_Case")


class _Case:
    """The arguments of an op that advances Lanczos recurrences, in the order of its signature."""

    op: ClassVar[str]
    output: ClassVar[str]  # the vectors that the op overwrites with v_next
    recurrences: Recurrences

    def run(self) -> Tensor:
        """Call the op; return v_next."""
        getattr(ops, self.op)(*vars(self).values())
        return getattr(self, self.output)  # type: ignore[no-any-return]

    def expected(self: C) -> C:
        """Return a copy advanced by the reference in float64 on the same device."""
        state = Recurrences(*(x.clone() for x in vars(self.recurrences).values()))
        copy = {**vars(self), self.output: getattr(self, self.output).clone(), "recurrences": state}
        after = type(self)(**copy)
        getattr(reference, self.op)(*vars(after).values())
        return after

    def check_running(self) -> None:
        """Raise WrongResult if a recurrence ended, since the op skips it then."""
        check(f"{self.op}: number of recurrences that ended", int((self.recurrences.status != RUNNING).sum()), 0)


@dataclass
class Step(_Case):
    """The arguments of lanczos_step; repeated calls keep every recurrence running."""

    op, output = "lanczos_step", "v_prev"

    w: Tensor
    v: Tensor
    v_prev: Tensor
    recurrences: Recurrences
    layout: Layout
    partial: Tensor

    @staticmethod
    def of(machine: Machine, dims: list[int], n_probes: int) -> Step:
        """Return random vectors, in huge pages as `spectrum` allocates them."""
        layout, ids = Layout.of(dims, machine.device), torch.arange(len(dims), device=machine.device)
        vectors = [huge_pages.zeros(n_probes, layout.n, dtype=torch.float32, device=machine.device) for _ in range(3)]
        for seed, x in enumerate(vectors):
            x.copy_(ops.random_probes(layout, n_probes, seed=seed, block_ids=ids))
        recurrences = Recurrences.start(n_probes, torch.full((len(dims),), MAX_STEPS, device=machine.device))
        recurrences.beta[0].uniform_(generator=machine.generator())
        recurrences.steps.fill_(1)
        partial = recurrences.norm.new_empty(n_probes, layout.n_tiles)
        return Step(*vectors, recurrences, layout, partial)

    def error_from(self, expected: Step) -> float:
        """Return the largest relative error of v_next, alpha and beta."""
        pairs = [(getattr(self.recurrences, x)[1], getattr(expected.recurrences, x)[1]) for x in ("alpha", "beta")]
        return max(difference(a, b) for a, b in [(self.v_prev, expected.v_prev), *pairs])

    def checked(self) -> float:
        """Make a step and return its error.

        Raises:
            WrongResult: The error exceeds rounding.
        """
        expected = self.expected()
        self.run()
        return check("lanczos_step", self.error_from(expected), ROUNDING)


@dataclass
class Projection(_Case):
    """The arguments of reorthogonalize with a full basis, which it does not change."""

    op, output = "reorthogonalize", "r"

    r: Tensor
    basis: Tensor
    recurrences: Recurrences
    layout: Layout
    partial: Tensor

    @staticmethod
    def of(machine: Machine, dims: list[int], count: int, n_probes: int) -> Projection:
        """Return a random vector, and a random basis of `count` nearly orthonormal vectors."""
        step = Step.of(machine, dims, n_probes)
        layout = step.layout.with_basis([True] * len(dims))
        shape = (count, n_probes, layout.n_basis)
        basis = huge_pages.zeros(*shape, dtype=torch.float32, device=machine.device)
        basis.normal_(generator=machine.generator())
        for l in range(layout.n_blocks):
            basis[:, :, layout.basis_columns(l)] /= math.sqrt(layout.dims[l])
        partial = step.partial.new_empty(n_probes, layout.n_tiles, count + 1)
        step.recurrences.steps.fill_(count - 1)
        return Projection(step.v, basis, step.recurrences, layout, partial)

    def error_from(self, expected: Projection) -> float:
        """Return the largest relative error of v_next and beta."""
        beta, other = (x.recurrences.beta[len(self.basis) - 1] for x in (self, expected))
        return max(difference(self.r, expected.r), difference(beta, other))


def quadrature_error(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Return the largest relative error of the nodes and of moments 0 to 2.

    Single weights are not compared: they are ill-conditioned where nodes are close.
    """
    error = difference(found[0], expected[0])
    for power in (0, 1, 2):
        got, wanted = ((w * x**power).sum(1) for x, w in (found, expected))
        error = max(error, difference(got[None], wanted[None]))
    return error


def random_tridiagonals(machine: Machine, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return alpha and beta (n, m) float64, and steps (n,), all m."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": machine.device, "generator": machine.generator()}
    alpha, beta = torch.randn(n, m, **options), torch.rand(n, m, **options) + 0.1
    return alpha, beta, torch.full((n,), m, device=machine.device)


def random_measures(machine: Machine, rows: int, n_nodes: int, points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return nodes in [-1, 1], weights, a grid, and sigma = 1e-3 of the range, float64."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": machine.device, "generator": machine.generator()}
    nodes = 2 * torch.rand(rows, n_nodes, **options) - 1
    weights = torch.rand(rows, n_nodes, **options)
    weights /= weights.sum(1, keepdim=True)
    grid = torch.linspace(-1.01, 1.01, points, dtype=torch.float64, device=machine.device)
    return nodes, weights, grid, torch.full((rows,), 2e-3, dtype=torch.float64, device=machine.device)


def density_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest error relative to the highest density of its row."""
    return float(((found - expected).abs().amax(1) / expected.amax(1)).max())
