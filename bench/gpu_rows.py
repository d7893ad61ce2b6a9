"""The rows of the speed table: the work of each, its check, its rivals and what must be reached.

Every row first checks its results, against the reference in PyTorch or the CPU twin, and raises `WrongResult` before
anything is timed. Vector elements are counted as the kernels move them through device memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from device_timing import measure, replayed
from gpu_loops import gpt2_step, replayed_loop
from gpu_machine import STEP_ELEMENTS, Machine, Row, Target, check, difference, small_blocks
from gpu_rivals import density_in_chunks, quadrature_by_eigh, step_by_block, step_by_foreach
from torch import Tensor

from blockhess_ext import ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import RUNNING, Recurrences

ROWS_OF_STEPS = 1000  # more than one row of the table calls the op


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
        layout, rng = Layout.of(dims, machine.device), machine.generator()
        vectors = []
        for _ in range(3):
            x = torch.randn(n_probes, layout.n, device=machine.device, generator=rng)
            for l in range(layout.n_blocks):
                segment = x[:, layout.columns(l)]
                segment /= segment.norm(dim=1, keepdim=True)
            vectors.append(x)
        recurrences = Recurrences.start(n_probes, torch.full((len(dims),), ROWS_OF_STEPS, device=machine.device))
        recurrences.beta[0].uniform_(generator=rng)
        recurrences.steps.fill_(1)
        partial = recurrences.norm.new_empty(n_probes, layout.n_tiles)
        return Step(*vectors, recurrences, layout, partial)

    def run(self) -> None:
        ops.lanczos_step(*vars(self).values())

    def checked(self) -> float:
        """The error of a step beside the reference in float64 on the same device, relative to the largest entry."""
        state = Recurrences(*(x.clone() for x in vars(self.recurrences).values()))
        expected = Step(**{**vars(self), "v_prev": self.v_prev.clone(), "recurrences": state})
        reference.lanczos_step(*vars(expected).values())
        self.run()
        errors = [difference(self.v_prev, expected.v_prev)]
        errors += [difference(getattr(self.recurrences, x)[1], getattr(state, x)[1]) for x in ("alpha", "beta")]
        return check("lanczos_step", max(errors), 64 * torch.finfo(torch.float32).eps)

    def still_running(self) -> None:
        """Nothing was skipped while it was timed."""
        ended = int((self.recurrences.status != RUNNING).sum())
        check("lanczos_step: number of recurrences that ended", ended, 0)


def large_step(machine: Machine) -> Row:
    """lanczos_step where bandwidth is all that counts."""
    step = Step.of(machine, [machine.pick(25_000_000, 2_500_000, 5000)] * 4, n_probes=10)
    row = Row(step.checked())
    times = measure(step.run, machine.device)
    step.still_running()
    moved = STEP_ELEMENTS * step.w.nbytes
    row.times["lanczos_step"] = times.summary()
    row.measured = {
        "share of copy bandwidth": machine.share_of_bandwidth(moved, times),
        "elements moved": STEP_ELEMENTS,
        "GB/s": moved / times.median / 1e9,
    }
    return row


def many_small_blocks(machine: Machine) -> Row:
    """lanczos_step where launches and ragged edges count."""
    dims = small_blocks(machine)
    step = Step.of(machine, dims, n_probes=10)
    arguments = (step.w, step.v, step.v_prev.clone(), step.recurrences.beta[0].clone(), step.layout)
    row = Row(step.checked())
    by_block, by_foreach = step_by_block(*arguments), step_by_foreach(*arguments)
    ours = torch.cat([s for row_ in step.v_prev for s in row_.split(dims)])
    flat = torch.cat([x[p] for p in range(10) for x in by_block()])
    check("PyTorch by block", difference(flat[None], ours[None]), 1e-4)
    check("torch._foreach", difference(torch.cat(by_foreach())[None], ours[None]), 1e-4)

    device, calls = machine.device, machine.pick(20, 20, 1)
    times = {
        "lanczos_step": measure(step.run, device, calls=calls),
        "PyTorch by block": measure(by_block, device),
        "torch._foreach": measure(by_foreach, device),
    }
    graph = replayed(step.run, device, calls)
    step.still_running()
    row.measured = {
        "times faster than PyTorch by block": times["PyTorch by block"].median / times["lanczos_step"].median,
        "times faster than torch._foreach": times["torch._foreach"].median / times["lanczos_step"].median,
        "share of copy bandwidth": machine.share_of_bandwidth(STEP_ELEMENTS * step.w.nbytes, times["lanczos_step"]),
    }
    if graph is not None:
        times["lanczos_step, replayed from a graph"] = graph
        row.measured["time over that of a graph's replay"] = times["lanczos_step"].median / graph.median
    row.times = {name: t.summary() for name, t in times.items()}
    return row


def projection(machine: Machine) -> Row:
    """reorthogonalize against a long basis."""
    count, n_probes = machine.pick(100, 100, 12), 10
    step = Step.of(machine, [machine.pick(250_000, 25_000, 500)] * 4, n_probes)
    layout = step.layout.with_basis([True] * 4)
    basis = torch.randn(count, n_probes, layout.n_basis, device=machine.device, generator=machine.generator())
    basis /= math.sqrt(layout.dims[0])  # rows nearly orthonormal
    partial = step.partial.new_empty(n_probes, layout.n_tiles, count + 1)
    r, expected = step.v, step.v.clone()
    step.recurrences.steps.fill_(count - 1)  # the basis is full, and stays so
    state = Recurrences(*(x.clone() for x in vars(step.recurrences).values()))

    def run() -> None:
        ops.reorthogonalize(r, basis, step.recurrences, layout, partial)

    reference.reorthogonalize(expected, basis, state, layout, partial)
    run()
    error = max(difference(r, expected), difference(step.recurrences.beta[count - 1], state.beta[count - 1]))
    row = Row(check("reorthogonalize", error, 64 * torch.finfo(torch.float32).eps))
    times = measure(run, machine.device)
    step.still_running()
    row.times["reorthogonalize"] = times.summary()
    row.measured = {
        "share of copy bandwidth": machine.share_of_bandwidth(4 * basis.nbytes, times),
        "reads of the basis": 4,
        "GB/s": 4 * basis.nbytes / times.median / 1e9,
    }
    return row


def quadrature(machine: Machine) -> Row:
    """tridiag_quadrature of many problems, float64; the op itself, which does not wait for the device."""
    n, m = machine.pick(10_000, 1000, 20), machine.pick(100, 100, 12)
    options = {"dtype": torch.float64, "device": machine.device, "generator": machine.generator()}
    alpha, beta = torch.randn(n, m, **options), torch.rand(n, m, **options) + 0.1
    steps = torch.full((n,), m, device=machine.device)

    def run() -> tuple[Tensor, Tensor]:
        return torch.ops.blockhess_ext.tridiag_quadrature(alpha, beta, steps)

    nodes, weights = (x.cpu() for x in run())
    true_nodes, true_weights = ops.tridiag_quadrature(alpha.cpu(), beta.cpu(), steps.cpu())
    error = difference(nodes, true_nodes)
    for power in (0, 1, 2):  # moments: a single weight is as ill-conditioned as its gap is small
        got, expected = ((w * x**power).sum(1) for x, w in [(nodes, weights), (true_nodes, true_weights)])
        error = max(error, difference(got[None], expected[None]))
    row = Row(check("tridiag_quadrature", error, 16 * m * torch.finfo(torch.float64).eps))
    dense_nodes, _ = quadrature_by_eigh(alpha, beta)
    check("torch.linalg.eigh", difference(dense_nodes.cpu(), true_nodes), 1e-10)
    del dense_nodes
    times = {
        "tridiag_quadrature": measure(run, machine.device),
        "torch.linalg.eigh": measure(lambda: quadrature_by_eigh(alpha, beta), machine.device, repeats=3),
    }
    row.times = {name: t.summary() for name, t in times.items()}
    row.measured = {
        "ms": 1e3 * times["tridiag_quadrature"].median,
        "times faster than torch.linalg.eigh": times["torch.linalg.eigh"].median / times["tridiag_quadrature"].median,
    }
    return row


def density(machine: Machine) -> Row:
    """gaussian_density, narrow beside the range of the grid; errors are parts of a row's highest density."""
    rows, n_nodes, points = machine.pick(300, 20, 3), machine.pick(1000, 1000, 50), machine.pick(50_000, 50_000, 501)
    options = {"dtype": torch.float64, "device": machine.device, "generator": machine.generator()}
    nodes = 2 * torch.rand(rows, n_nodes, **options) - 1
    weights = torch.rand(rows, n_nodes, **options)
    weights /= weights.sum(1, keepdim=True)
    grid = torch.linspace(-1.01, 1.01, points, dtype=torch.float64, device=machine.device)
    sigma = torch.full((rows,), 2e-3, dtype=torch.float64, device=machine.device)  # 1e-3 of the nodes' range
    arguments = (nodes, weights, grid, sigma)
    got, expected = ops.gaussian_density(*arguments), density_in_chunks(*arguments)
    error = float(((got - expected).abs().amax(1) / expected.amax(1)).max())
    row = Row(check("gaussian_density", error, 1e-10))
    del got, expected
    times = {
        "gaussian_density": measure(lambda: ops.gaussian_density(*arguments), machine.device),
        "broadcast in chunks": measure(lambda: density_in_chunks(*arguments), machine.device, repeats=3),
    }
    row.times = {name: t.summary() for name, t in times.items()}
    row.measured = {
        "ms": 1e3 * times["gaussian_density"].median,
        "times faster than broadcast in chunks": times["broadcast in chunks"].median / times["gaussian_density"].median,
        "error": error,
    }
    return row


ROWS: dict[str, tuple[Callable[[Machine], Row], list[Target]]] = {
    "`lanczos_step`, 1e9 elements in all, float32": (
        large_step,
        [
            Target("at least 90 % of the copy bandwidth", "share of copy bandwidth", 0.90, True),
            Target("at most 8 elements moved a step", "elements moved", 8, False),
        ],
    ),
    "`lanczos_step`, 300 blocks of 64 ... 65,536 elements x 10 probes": (
        many_small_blocks,
        [
            Target("at least 15 x PyTorch by block", "times faster than PyTorch by block", 15, True),
            Target("at least 5 x `torch._foreach`", "times faster than torch._foreach", 5, True),
            Target(
                "not launch-bound: at most 1.25 x a graph's replay", "time over that of a graph's replay", 1.25, False
            ),
        ],
    ),
    "`reorthogonalize`, basis of 100, 1e7 elements": (
        projection,
        [Target("at least 85 % of the copy bandwidth, 4 reads of the basis", "share of copy bandwidth", 0.85, True)],
    ),
    "`tridiag_quadrature`, 10,000 problems, m = 100, float64": (
        quadrature,
        [
            Target("at most 3 ms", "ms", 3, False),
            Target("at least 100 x `torch.linalg.eigh`", "times faster than torch.linalg.eigh", 100, True),
        ],
    ),
    "`gaussian_density`, 300 blocks x 1,000 nodes x 50,000 points, sigma 1e-3 of the range": (
        density,
        [Target("at most 5 ms", "ms", 5, False), Target("error at most 1e-10", "error", 1e-10, False)],
    ),
    "GPT-2 124M layout, 25 blocks x 10 probes: one step of `batched_slq` without the product": (
        gpt2_step,
        [
            Target("at most 15 ms", "ms", 15, False),
            Target("at most three vector sets and 64 MiB", "MiB beyond three vector sets", 64, False),
        ],
    ),
    "`batched_slq`, 300 blocks x 10 probes: a step with a diagonal product, replayed from CUDA graphs": (
        replayed_loop,
        [Target("the same bits as the plain loop", "largest difference from the plain loop", 0, False)],
    ),
}
