"""The rows of the CPU's speed table that run one op: work, check, rivals and targets of each.

All rivals of a Lanczos step read the same vectors in huge pages, except padded ones, which are copies. "At triad
bandwidth" is the ratio that a step would have if it moved its bytes at triad bandwidth: a target above it exceeds what
the memory of the machine allows. Layouts are those of well-known networks with every parameter tensor a block; if 10
probes take more than VECTOR_BYTES, fewer are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor

from bench.harness.machine import Machine
from bench.harness.memory import peak_vector_sets
from bench.harness.rows import AT_TRIAD, Row, Rows, Target, faster
from bench.harness.timing import Rival, compare_and_time, difference
from bench.ops.layouts import LAYOUTS, gpt2, log_spaced
from bench.ops.step import (
    ROUNDING,
    Projection,
    Step,
    density_error,
    quadrature_error,
    random_measures,
    random_tridiagonals,
)
from bench.ops.torch_rivals import STEPS, density_by_point, density_in_chunks, project_by_block, quadrature_by_eigh
from blockhess_ext import ops
from blockhess_ext.layout import Layout

# Relative to the largest entry, for sums in float32.
LARGEST_STEP_ERROR = 1e-4
# The same for a projection: a hundred coefficients, each with an error of about eps sqrt(n) = 5e-5.
LARGEST_PROJECTION_ERROR = 1e-3
# Largest memory of the vectors of a row.
VECTOR_BYTES = 2 * 2**30


def compile_seconds(machine: Machine) -> float:
    """Return the time limit for compiling a rival."""
    return machine.pick(60, 8, 8)


def layout_dims(machine: Machine, name: str) -> list[int]:
    """Return the block sizes of a layout, or those of a small one of the same kind."""
    small = log_spaced(20, 16, 512) if "small" in name else gpt2(65, 32, 32, 2, bias=False)
    return LAYOUTS[name]() if machine.size == "full" else small


# Largest number of tiles of a segment that one thread processes, from csrc/cpu/lanczos_step.cpp.
TILES_IN_CACHE = 32


def moved_elements(layout: Layout) -> float:
    """Return the elements that a step moves between memory and cache per vector element, counted from its passes.

    8 in general: read w, v; read w, v, v_prev, write r; read r, write v_next. 4 if a segment stays in cache: read w, v,
    v_prev, write v_next. A large cache may hold parts of longer segments.
    """
    in_cache = layout.tile_offsets.diff() <= TILES_IN_CACHE
    return sum(dim * (4 if c else 8) for dim, c in zip(layout.dims, in_cache.tolist())) / layout.n


def basis_reads(layout: Layout) -> float:
    """Return how often reorthogonalize reads the basis from memory: three times, once if a segment is one tile."""
    one_tile = layout.tile_offsets.diff() == 1
    return sum(dim * (1 if one else 3) for dim, one in zip(layout.dims, one_tile.tolist())) / layout.n


def step_rivals(step: Step, expected: Step, names: tuple[str, ...], compile_limit: float | None) -> dict[str, Rival]:
    """Return these rivals of torch_rivals.STEPS, with a limit in seconds each also compiled."""
    n_probes, layout = len(step.w), step.layout
    arguments = (step.w, step.v, step.v_prev.clone(), step.recurrences.beta[0].clone(), layout)

    def error(join: Callable[[list[Tensor], Layout, int], Tensor], result: list[Tensor]) -> float:
        return difference(join(result, layout, n_probes), expected.v_prev)

    rivals = {}
    for name in names:
        make, join = STEPS[name]
        for suffix, option in (("", False), (", compiled", True)) if compile_limit else (("", False),):
            rivals[name + suffix] = Rival(
                partial(make, *arguments, compiled=option),
                partial(error, join),
                LARGEST_STEP_ERROR,
                limit=compile_limit if compile_limit and option else math.inf,
            )
    return rivals


def step_row(machine: Machine, layout: str, n_probes: int, names: tuple[str, ...], compiled: bool) -> Row:
    """Measure lanczos_step with as many probes as memory allows, at most n_probes."""
    dims = layout_dims(machine, layout)
    n_probes = min(n_probes, int(VECTOR_BYTES // (3 * 4 * sum(dims))))
    machine.require((3 + 2 * len(names) + 2) * 4 * n_probes * sum(dims))
    step = Step.of(machine, dims, n_probes)
    expected = step.expected()
    ours = Rival(lambda: step.run, lambda _: step.error_from(expected), ROUNDING)
    compile_limit = compile_seconds(machine) if compiled and (machine.size == "full" or "small" in layout) else None
    entries = compare_and_time({"blockhess": ours, **step_rivals(step, expected, names, compile_limit)})
    step.check_running()
    row, seconds = Row.of(entries), entries["blockhess"].median
    moved = moved_elements(step.layout)
    n_bytes = moved * step.w.nbytes
    for rival, entry in entries.items():
        if rival != "blockhess" and not entry.failure:
            most = entry.median / (n_bytes / machine.limits["triad"])
            row.measured[f"times faster than {rival}{AT_TRIAD}"] = most
    row.measured |= {
        "elements moved": moved,
        "GB/s": n_bytes / seconds / 1e9,
        "share of triad bandwidth": machine.share(n_bytes, seconds, "triad"),
        "ns an element": 1e9 * seconds / step.w.numel(),
        "probes": n_probes,
    }
    return row


def projection(machine: Machine) -> Row:
    """Measure reorthogonalize against a long basis."""
    dims, count = layout_dims(machine, "GPT2-nano"), machine.pick(100, 20, 12)
    machine.require(1.3 * 4 * count * sum(dims))
    case = Projection.of(machine, dims, count, 1)
    expected, start = case.expected(), case.r.clone()
    rival = Rival(
        lambda: project_by_block(start, case.basis, case.layout),
        lambda x: difference(x, expected.r),
        LARGEST_PROJECTION_ERROR,
    )

    def run() -> Tensor:
        case.r.copy_(start)  # the rival copies, too
        return case.run()

    entries = compare_and_time(
        {"blockhess": Rival(lambda: run, lambda _: case.error_from(expected), ROUNDING), "PyTorch by block": rival},
        rounds=7,
        seconds=8.0,
    )
    row, seconds = Row.of(entries), entries["blockhess"].median
    reads, nbytes = basis_reads(case.layout), case.basis.nbytes
    row.measured |= {
        "share of read bandwidth, 4 reads": machine.share(4 * nbytes, seconds, "read"),
        "reads of the basis": reads,
        "share of read bandwidth, by reads made": machine.share(reads * nbytes, seconds, "read"),
        "GB/s": reads * nbytes / seconds / 1e9,
    }
    return row


def quadrature(machine: Machine, problems: int, m: int) -> Row:
    """Measure tridiag_quadrature; LAPACK sterf computes eigenvalues only, stemr also eigenvectors."""
    problems, m = machine.pick(problems, 20, 5), machine.pick(m, 40, 12)
    alpha, beta, steps = random_tridiagonals(machine, problems, m)
    pairs = [(a, b[:-1]) for a, b in zip(alpha.numpy(), beta.numpy())]
    expected = quadrature_by_eigh(alpha, beta)

    def sterf() -> Tensor:
        return torch.stack([torch.from_numpy(lapack.dsterf(a, b)[0]) for a, b in pairs])

    def stemr() -> tuple[Tensor, Tensor]:
        found = [lapack.dstemr(a, np.append(b, 0.0), 0, 0, 0, 0, 0) for a, b in pairs]
        vectors = torch.from_numpy(np.stack([x[2][0] for x in found]))
        return torch.from_numpy(np.stack([x[1] for x in found])), vectors**2

    def error(found: tuple[Tensor, Tensor]) -> float:
        return quadrature_error(found, expected)

    most = 64 * m * torch.finfo(torch.float64).eps
    entries = compare_and_time(
        {
            "blockhess": Rival(lambda: partial(ops.tridiag_quadrature, alpha, beta, steps), error, most),
            "torch.linalg.eigh": Rival(lambda: partial(quadrature_by_eigh, alpha, beta), error, most),
            "LAPACK sterf": Rival(lambda: sterf, lambda nodes: difference(nodes, expected[0]), most),
            "LAPACK stemr": Rival(lambda: stemr, error, most),
        }
    )
    row = Row.of(entries)
    row.measured["microseconds a problem"] = 1e6 * entries["blockhess"].median / problems
    return row


PROBES_OF_NODES = 10  # the paper's loop processes the nodes of each probe separately


def density(machine: Machine) -> Row:
    """Measure gaussian_density; rivals on one of the blocks, since all blocks take minutes."""
    rows, n_nodes, points = machine.pick(38, 3, 2), machine.pick(1000, 100, 50), machine.pick(50_000, 600, 500)
    arguments = random_measures(machine, rows, n_nodes, points)
    slice_of = tuple(x[:1] if i != 2 else x for i, x in enumerate(arguments))
    expected = density_in_chunks(*slice_of)
    broadcast = torch.compile(density_in_chunks, fullgraph=True)
    scale = float(rows)

    def error(found: Tensor) -> float:
        return density_error(found[:1], expected)

    entries = compare_and_time(
        {
            "blockhess": Rival(lambda: partial(ops.gaussian_density, *arguments), error, 1e-10),
            "the paper's loop": Rival(
                lambda: partial(density_by_point, *slice_of, PROBES_OF_NODES), error, 1e-10, scale
            ),
            "broadcast PyTorch": Rival(lambda: partial(density_in_chunks, *slice_of), error, 1e-10, scale),
            "broadcast PyTorch, compiled": Rival(
                lambda: partial(broadcast, *slice_of), error, 1e-10, scale, limit=compile_seconds(machine)
            ),
        },
        rounds=5,
        seconds=8.0,
    )
    row = Row.of(entries)
    row.notes.append(f"rivals on 1 of {rows} blocks, times {rows}")
    row.measured |= {
        "error": row.error,
        "memory beside the result, in results": (entries["blockhess"].peak_bytes or 0) / (8 * rows * points) - 1,
    }
    return row


def memory(machine: Machine) -> Row:
    """Measure the peak memory of batched_slq without reorthogonalization, including the operator's result."""
    # A set of vectors is 170 MB, or 42 MB at smaller sizes.
    dims = [2**k for k in range(10, machine.pick(23, 21, 21))]
    return Row(0.0, {"vector sets": peak_vector_sets(5, dims, num_steps=5)})


_ALL_RIVALS = ("PyTorch by vector", "PyTorch by block", "torch._foreach", "padded PyTorch")


def _by_block(layout: str) -> tuple[str, ...]:
    """Return the rivals of a layout; sums of 1e8 float32 need float64."""
    return ("PyTorch by block", *(["PyTorch by block, sums in float64"] if "huge" in layout else []))


_SHARE = Target(">= 80 % of triad bandwidth, counting the bytes it moves", "share of triad bandwidth", 0.80, True)

ROWS: Rows = {
    "`lanczos_step`, GPT2-nano layout, 10 probes, float32": (
        partial(step_row, layout="GPT2-nano", n_probes=10, names=_ALL_RIVALS, compiled=True),
        [
            faster("PyTorch by block", 3.5),
            _SHARE,
            Target("at most 8 elements moved a step", "elements moved", 8, False),
        ],
    ),
    "`lanczos_step`, 150 blocks of 64 ... 65,536 elements, 10 probes": (
        partial(step_row, layout="150 small blocks", n_probes=10, names=_ALL_RIVALS, compiled=True),
        [faster("PyTorch by block", 6), faster("torch._foreach", 3)],
    ),
    "`reorthogonalize`, basis of 100, GPT2-nano layout, 1 probe": (
        projection,
        [Target(">= 80 % of read bandwidth, 4 reads of the basis", "share of read bandwidth, 4 reads", 0.80, True)],
    ),
    **{
        f"`tridiag_quadrature`, {problems:,} problems, m = {m}": (
            partial(quadrature, problems=problems, m=m),
            [faster("torch.linalg.eigh", 10), faster("LAPACK sterf", 5)],
        )
        for problems, m in ((260, 100), (1500, 100), (260, 300))
    },
    "`gaussian_density`, 38 blocks x 1,000 nodes x 50,000 points, sigma 1e-3 of the range": (
        density,
        [
            faster("the paper's loop", 500),
            faster("broadcast PyTorch", 30),
            Target("error <= 1e-10", "error", 1e-10, False),
            Target("no temporary larger than the result", "memory beside the result, in results", 1.0, False),
        ],
    ),
    "peak memory of `batched_slq` without reorthogonalization": (
        memory,
        [Target("at most 3 vector sets of n_probes x n (within 1 %)", "vector sets", 3.03, False)],
    ),
    **{
        f"`lanczos_step`, {name} layout": (
            partial(step_row, layout=name, n_probes=10, names=_by_block(name), compiled=False),
            [],
        )
        for name in list(LAYOUTS)[2:]
    },
}
