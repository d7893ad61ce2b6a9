"""The rows of the GPU's speed table: work, check, rivals and targets of each.

Every row checks its results against the reference in PyTorch or the CPU implementation, and raises `WrongResult` before
anything is timed. Traffic is counted as the vector elements that the kernels move through GPU memory.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from bench.harness.machine import Machine
from bench.harness.rows import Row, Rows, Target
from bench.harness.timing import Times, check, difference, measure, replayed
from bench.ops.gpu_loops import STEP_ELEMENTS, gpt2_step, replayed_loop, small_blocks
from bench.ops.step import (
    ROUNDING,
    Projection,
    Step,
    density_error,
    quadrature_error,
    random_measures,
    random_tridiagonals,
)
from bench.ops.torch_rivals import density_in_chunks, quadrature_by_eigh, step_by_block, step_by_foreach
from blockhess_ext import ops

# Numbers of problems per CTA of tridiag_quadrature that are compared.
LANES = (8, 16, 32)


def timed_row(error: float, times: dict[str, Times]) -> Row:
    """Return a row with these times, ours first, and how many times faster ours is than each of the others."""
    (_, ours), *others = times.items()
    measured = {f"times faster than {name}": rival.median / ours.median for name, rival in others}
    return Row(error, measured, {name: t.summary() for name, t in times.items()})


def large_step(machine: Machine) -> Row:
    """Measure lanczos_step on large blocks, where bandwidth limits it."""
    step = Step.of(machine, [machine.pick(25_000_000, 2_500_000, 5000)] * 4, n_probes=10)
    error, times = step.checked(), measure(step.run, machine.device)
    step.check_running()
    row, moved = timed_row(error, {"lanczos_step": times}), STEP_ELEMENTS * step.w.nbytes
    row.measured = {
        "share of copy bandwidth": machine.share(moved, times.median),
        "elements moved": STEP_ELEMENTS,
        "GB/s": moved / times.median / 1e9,
    }
    return row


def many_small_blocks(machine: Machine) -> Row:
    """Measure lanczos_step on many small blocks, where launches and partial tiles limit it."""
    dims = small_blocks(machine)
    step = Step.of(machine, dims, n_probes=10)
    arguments = (step.w, step.v, step.v_prev.clone(), step.recurrences.beta[0].clone(), step.layout)
    error = step.checked()
    by_block, by_foreach = step_by_block(*arguments), step_by_foreach(*arguments)
    ours = torch.cat([s for row_ in step.v_prev for s in row_.split(dims)])
    flat = torch.cat([x[p] for p in range(10) for x in by_block()])
    check("PyTorch by block", difference(flat[None], ours[None]), 1e-4)
    check("torch._foreach", difference(torch.cat(by_foreach())[None], ours[None]), 1e-4)

    device, calls = machine.device, machine.pick(20, 20, 1)
    times = measure(step.run, device, calls=calls)
    rivals = {"PyTorch by block": measure(by_block, device), "torch._foreach": measure(by_foreach, device)}
    graph = replayed(step.run, device, calls)
    step.check_running()
    row = timed_row(error, {"lanczos_step": times, **rivals})
    row.measured["share of copy bandwidth"] = machine.share(STEP_ELEMENTS * step.w.nbytes, times.median)
    if graph is not None:
        row.times["lanczos_step, replayed from a graph"] = graph.summary()
        row.measured["time over that of a graph's replay"] = times.median / graph.median
    return row


def projection(machine: Machine) -> Row:
    """Measure reorthogonalize against a long basis."""
    count = machine.pick(100, 100, 12)
    case = Projection.of(machine, [machine.pick(250_000, 25_000, 500)] * 4, count, n_probes=10)
    expected = case.expected()
    case.run()
    error = check("reorthogonalize", case.error_from(expected), ROUNDING)
    del expected
    times = measure(case.run, machine.device)
    case.check_running()
    row, moved = timed_row(error, {"reorthogonalize": times}), 4 * case.basis.nbytes
    row.measured = {
        "share of copy bandwidth": machine.share(moved, times.median),
        "reads of the basis": 4,
        "GB/s": moved / times.median / 1e9,
    }
    return row


def quadrature(machine: Machine) -> Row:
    """Measure tridiag_quadrature on many problems in float64; the op itself, which does not synchronize."""
    n, m = machine.pick(10_000, 1000, 20), machine.pick(100, 100, 12)
    alpha, beta, steps = random_tridiagonals(machine, n, m)

    def run() -> tuple[Tensor, Tensor]:
        return torch.ops.blockhess_ext.tridiag_quadrature(alpha, beta, steps)

    nodes, weights = (x.cpu() for x in run())
    true_nodes, true_weights = ops.tridiag_quadrature(alpha.cpu(), beta.cpu(), steps.cpu())
    error = quadrature_error((nodes, weights), (true_nodes, true_weights))
    check("tridiag_quadrature", error, 16 * m * torch.finfo(torch.float64).eps)
    # All problems can take torch minutes: the time of some is scaled.
    few = min(n, 200)
    some = alpha[:few].contiguous(), beta[:few].contiguous()
    check("torch.linalg.eigh", difference(quadrature_by_eigh(*some)[0].cpu(), true_nodes[:few]), 1e-10)
    dense = measure(lambda: quadrature_by_eigh(*some), machine.device, repeats=3, seconds=1.0)
    times = {
        "tridiag_quadrature": measure(run, machine.device),
        "torch.linalg.eigh": Times([n / few * seconds for seconds in dense.seconds]),
    }
    row = timed_row(error, times)
    row.notes.append(f"torch.linalg.eigh: the time of {few} problems, scaled")
    row.measured["ms"] = 1e3 * times["tridiag_quadrature"].median
    for lanes in LANES:
        os.environ["BLOCKHESS_QUADRATURE_LANES"] = str(lanes)
        row.measured[f"ms, {lanes} problems per CTA"] = 1e3 * measure(run, machine.device).median
    del os.environ["BLOCKHESS_QUADRATURE_LANES"]
    return row


def density(machine: Machine) -> Row:
    """Measure gaussian_density with a sigma much smaller than the range of the grid."""
    rows, n_nodes, points = machine.pick(300, 20, 3), machine.pick(1000, 1000, 50), machine.pick(50_000, 50_000, 501)
    arguments = random_measures(machine, rows, n_nodes, points)
    error = density_error(ops.gaussian_density(*arguments), density_in_chunks(*arguments))
    check("gaussian_density", error, 1e-10)
    times = {
        "gaussian_density": measure(lambda: ops.gaussian_density(*arguments), machine.device),
        "broadcast in chunks": measure(lambda: density_in_chunks(*arguments), machine.device, repeats=3),
    }
    row = timed_row(error, times)
    row.measured |= {"ms": 1e3 * times["gaussian_density"].median, "error": error}
    return row


ROWS: Rows = {
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
