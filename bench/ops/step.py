"""The arguments of the ops that advance Lanczos recurrences, and their checks against the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness.machine import Machine
from bench.harness.timing import check, difference
from blockhess_ext import huge_pages, ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import RUNNING, Recurrences

ROWS_OF_STEPS = 1000  # more than one row of the table calls the op
ROUNDING = 64 * torch.finfo(torch.float32).eps


@dataclass
class Step:
    """The arguments of lanczos_step; repeated calls keep every recurrence running."""

    w: Tensor
    v: Tensor
    v_prev: Tensor
    recurrences: Recurrences
    layout: Layout
    partial: Tensor

    @staticmethod
    def of(machine: Machine, dims: list[int], n_probes: int) -> Step:
        layout, ids = Layout.of(dims, machine.device), torch.arange(len(dims), device=machine.device)
        vectors = [huge_pages.zeros(n_probes, layout.n, dtype=torch.float32, device=machine.device) for _ in range(3)]
        for seed, x in enumerate(vectors):  # in the memory in which `spectrum` has them
            x.copy_(ops.random_probes(layout, n_probes, seed=seed, block_ids=ids))
        recurrences = Recurrences.start(n_probes, torch.full((len(dims),), ROWS_OF_STEPS, device=machine.device))
        recurrences.beta[0].uniform_(generator=machine.generator())
        recurrences.steps.fill_(1)
        partial = recurrences.norm.new_empty(n_probes, layout.n_tiles)
        return Step(*vectors, recurrences, layout, partial)

    def run(self) -> Tensor:
        """A step; returns v_next."""
        ops.lanczos_step(*vars(self).values())
        return self.v_prev

    def expected(self) -> Step:
        """What a step will give, by the reference in float64 on the same device."""
        state = Recurrences(*(x.clone() for x in vars(self.recurrences).values()))
        after = Step(**{**vars(self), "v_prev": self.v_prev.clone(), "recurrences": state})
        reference.lanczos_step(*vars(after).values())
        return after

    def error_from(self, expected: Step) -> float:
        """Of a step made, relative to the largest entry."""
        pairs = [(getattr(self.recurrences, x)[1], getattr(expected.recurrences, x)[1]) for x in ("alpha", "beta")]
        return max(difference(a, b) for a, b in [(self.v_prev, expected.v_prev), *pairs])

    def checked(self) -> float:
        """Make a step and compare it; the error."""
        expected = self.expected()
        self.run()
        return check("lanczos_step", self.error_from(expected), ROUNDING)

    def still_running(self) -> None:
        """Nothing was skipped while it was timed."""
        ended = int((self.recurrences.status != RUNNING).sum())
        check("number of recurrences that ended", ended, 0)


@dataclass
class Projection:
    """The arguments of reorthogonalize with a full basis, which stays so."""

    r: Tensor
    basis: Tensor
    recurrences: Recurrences
    layout: Layout
    partial: Tensor

    @staticmethod
    def of(machine: Machine, dims: list[int], count: int, n_probes: int) -> Projection:
        step = Step.of(machine, dims, n_probes)
        layout = step.layout.with_basis([True] * len(dims))
        shape = (count, n_probes, layout.n_basis)
        basis = huge_pages.zeros(*shape, dtype=torch.float32, device=machine.device)
        basis.normal_(generator=machine.generator())
        for l in range(layout.n_blocks):  # rows nearly orthonormal
            basis[:, :, layout.basis_columns(l)] /= math.sqrt(layout.dims[l])
        partial = step.partial.new_empty(n_probes, layout.n_tiles, count + 1)
        step.recurrences.steps.fill_(count - 1)
        return Projection(step.v, basis, step.recurrences, layout, partial)

    def run(self) -> Tensor:
        """A projection; returns v_next."""
        ops.reorthogonalize(*vars(self).values())
        return self.r

    def expected(self) -> Projection:
        """What a projection will give, by the reference in float64 on the same device."""
        state = Recurrences(*(x.clone() for x in vars(self.recurrences).values()))
        after = Projection(**{**vars(self), "r": self.r.clone(), "recurrences": state})
        reference.reorthogonalize(*vars(after).values())
        return after

    def error_from(self, expected: Projection) -> float:
        """Of a projection made, relative to the largest entry."""
        beta, other = (x.recurrences.beta[len(self.basis) - 1] for x in (self, expected))
        return max(difference(self.r, expected.r), difference(beta, other))


def quadrature_error(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """Of nodes and of moments: a single weight is as ill-conditioned as its gap is small."""
    error = difference(found[0], expected[0])
    for power in (0, 1, 2):
        got, wanted = ((w * x**power).sum(1) for x, w in (found, expected))
        error = max(error, difference(got[None], wanted[None]))
    return error


def random_tridiagonals(machine: Machine, n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """alpha, beta (n, m) and steps (n,) of full problems, float64."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": machine.device, "generator": machine.generator()}
    alpha, beta = torch.randn(n, m, **options), torch.rand(n, m, **options) + 0.1
    return alpha, beta, torch.full((n,), m, device=machine.device)


def random_measures(machine: Machine, rows: int, n_nodes: int, points: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """nodes in -1 ... 1, weights, a grid, and a sigma of 1e-3 of the range, float64."""
    options: dict[str, Any] = {"dtype": torch.float64, "device": machine.device, "generator": machine.generator()}
    nodes = 2 * torch.rand(rows, n_nodes, **options) - 1
    weights = torch.rand(rows, n_nodes, **options)
    weights /= weights.sum(1, keepdim=True)
    grid = torch.linspace(-1.01, 1.01, points, dtype=torch.float64, device=machine.device)
    return nodes, weights, grid, torch.full((rows,), 2e-3, dtype=torch.float64, device=machine.device)


def density_error(found: Tensor, expected: Tensor) -> float:
    """In parts of a row's highest density."""
    return float(((found - expected).abs().amax(1) / expected.amax(1)).max())
