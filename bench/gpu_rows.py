"""The rows of the speed table: the work of each, its check, its rivals and what must be reached.

Every row first checks its results, against the reference in PyTorch or the CPU twin, and raises `WrongResult` before
anything is timed. Vector elements are counted as the kernels move them through device memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from device_timing import Mark, Times, measure, replayed, synchronize
from gpu_machine import Machine, Row, Target, check, difference
from gpu_rivals import density_in_chunks, quadrature_by_eigh, step_by_block, step_by_foreach
from torch import Tensor

from blockhess_ext import batched_slq, ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import RUNNING, Recurrences

NO_LIMIT = 2**40  # steps
STEP_ELEMENTS = 8  # read w, v; read w, v, v_prev, write r; read r, write v_next


def log_spaced(n: int, smallest: int, largest: int) -> list[int]:
    ratio = (largest / smallest) ** (1 / (n - 1))
    return [round(smallest * ratio**i) for i in range(n)]


@dataclass
class Step:
    """The arguments of lanczos_step; repeated calls keep every recurrence running."""

    w: Tensor
    v: Tensor
    v_prev: Tensor
    beta_prev: Tensor
    alpha: Tensor
    beta: Tensor
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
        beta = torch.rand(n_probes, len(dims), dtype=torch.float64, device=machine.device, generator=rng)
        recurrences = Recurrences.start(n_probes, torch.full((len(dims),), NO_LIMIT, device=machine.device))
        partial = beta.new_empty(n_probes, layout.n_tiles)
        return Step(*vectors, beta, torch.empty_like(beta), torch.empty_like(beta), recurrences, layout, partial)

    def run(self) -> None:
        ops.lanczos_step(*vars(self).values())

    def checked(self) -> float:
        """The error of a step beside the reference in float64 on the same device, relative to the largest entry."""
        expected = Step(**{**vars(self), "v_prev": self.v_prev.clone()})
        expected.alpha, expected.beta = torch.empty_like(self.alpha), torch.empty_like(self.beta)
        r = self.recurrences
        expected.recurrences = Recurrences(r.norm.clone(), r.steps.clone(), r.status.clone(), r.limits)
        reference.lanczos_step(*vars(expected).values())
        self.run()
        errors = [difference(getattr(self, x), getattr(expected, x)) for x in ("alpha", "beta", "v_prev")]
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
    dims = log_spaced(machine.pick(300, 300, 12), 64, machine.pick(65_536, 65_536, 2048))
    step = Step.of(machine, dims, n_probes=10)
    arguments = (step.w, step.v, step.v_prev.clone(), step.beta_prev, step.layout)
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
    states = [(step.alpha.zero_(), step.beta.zero_(), step.recurrences)]
    states.append(
        (
            step.alpha.clone(),
            step.beta.clone(),
            Recurrences(*(x.clone() for x in vars(step.recurrences).values())),
        )
    )

    def run() -> None:
        ops.reorthogonalize(r, basis, count, *states[0], layout, partial)

    reference.reorthogonalize(expected, basis, count, *states[1], layout, partial)
    run()
    error = max(difference(r, expected), difference(states[0][1], states[1][1]))
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


def gpt2_dims(machine: Machine) -> list[int]:
    """GPT-2 124M in 25 blocks: all embeddings with the last LayerNorm, and attention and MLP of each of 12 layers."""
    width, words, context = machine.pick(768, 192, 16), machine.pick(50_257, 12_000, 100), machine.pick(1024, 256, 16)
    attention = 4 * width * width + 4 * width + 2 * width
    mlp = 8 * width * width + 5 * width + 2 * width
    return [(words + context) * width + 2 * width, *[attention, mlp] * 12]


class Diagonal:
    """A diagonal operator that marks when each product begins and ends."""

    def __init__(self, eigenvalues: Tensor) -> None:
        self.eigenvalues = eigenvalues
        self.marks: list[tuple[Mark, Mark]] = []

    def __call__(self, v: Tensor) -> Tensor:
        begin = Mark(v.device)
        w = v * self.eigenvalues
        self.marks.append((begin, Mark(v.device)))
        return w

    def seconds_between(self) -> list[float]:
        """What passed between the end of each product and the beginning of the next."""
        return [a[1].until(b[0]) for a, b in zip(self.marks, self.marks[1:])]


def gpt2_step(machine: Machine) -> Row:
    """batched_slq as a user runs it: everything between two products, and the memory of it all."""
    dims, n_probes, m, device = gpt2_dims(machine), 10, machine.pick(30, 12, 5), machine.device
    n = sum(dims)
    eigenvalues = torch.linspace(-1.0, 2.0, n, device=device)
    layout = Layout.of(dims, device)

    def run(operator: Diagonal) -> Tensor:
        q = batched_slq(operator, dims, num_probes=n_probes, num_steps=m, device=device, reorthogonalize="none")
        check("batched_slq: recurrences that ended early", int((q.steps < m).sum()), 0)
        outside = torch.maximum(q.nodes.max() - 2.0, -1.0 - q.nodes.min())
        check("batched_slq: nodes beyond the eigenvalues", float(outside), 1e-5)
        return (q.weights * q.nodes).sum(-1)  # v^T H v

    moments = run(Diagonal(eigenvalues))
    v = ops.random_probes(layout, n_probes, seed=0, block_ids=torch.arange(len(dims), device=device))
    expected = torch.zeros_like(moments)
    for p in range(n_probes):
        for l in range(len(dims)):
            part = v[p, layout.columns(l)].double()
            expected[p, l] = (part.square() * eigenvalues[layout.columns(l)].double()).sum()
    del v
    row = Row(check("batched_slq: v^T H v", difference(moments, expected), 64 * torch.finfo(torch.float32).eps))

    held = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
    operator = Diagonal(eigenvalues)
    run(operator)
    synchronize(device)
    times = Times(operator.seconds_between())
    row.times["a step without the product"] = times.summary()
    row.measured = {
        "ms": 1e3 * times.median,
        "share of copy bandwidth": machine.share_of_bandwidth(STEP_ELEMENTS * 4 * n_probes * n, times),
        "parameters": n,
    }
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - held
        row.measured["MiB beyond three vector sets"] = (peak - 3 * 4 * n_probes * n) / 2**20
        row.measured["vector sets"] = peak / (4 * n_probes * n)
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
}
