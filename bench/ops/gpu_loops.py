"""The rows of the GPU's speed table that run all of batched_slq on diagonal operators."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from bench.harness.machine import Machine
from bench.harness.rows import Row
from bench.harness.timing import Mark, Times, check, difference, synchronize
from bench.ops.layouts import log_spaced
from bench.ops.step import ROUNDING
from blockhess_ext import Quadrature, batched_slq, ops
from blockhess_ext.layout import Layout

STEP_ELEMENTS = 8  # moved by a Lanczos step: read w, v; read w, v, v_prev, write r; read r, write v_next


def small_blocks(machine: Machine) -> list[int]:
    """Return the sizes of many small blocks."""
    return log_spaced(machine.pick(300, 300, 12), 64, machine.pick(65_536, 65_536, 2048))


def exact_moments(eigenvalues: Tensor, layout: Layout, n_probes: int) -> Tensor:
    """Return v^T H v (n_probes, n_blocks) float64 of the default probes of batched_slq."""
    device = eigenvalues.device
    v = ops.random_probes(layout, n_probes, seed=0, block_ids=torch.arange(layout.n_blocks, device=device))
    moments = torch.zeros(n_probes, layout.n_blocks, dtype=torch.float64, device=device)
    for p in range(n_probes):
        for l in range(layout.n_blocks):
            part = v[p, layout.columns(l)].double()
            moments[p, l] = (part.square() * eigenvalues[layout.columns(l)].double()).sum()
    return moments


def gpt2_dims(machine: Machine) -> list[int]:
    """Return the sizes of 25 blocks of GPT-2 124M: embeddings, and attention and MLP of each layer."""
    width, words, context = machine.pick(768, 192, 16), machine.pick(50_257, 12_000, 100), machine.pick(1024, 256, 16)
    attention = 4 * width * width + 4 * width + 2 * width
    mlp = 8 * width * width + 5 * width + 2 * width
    return [(words + context) * width + 2 * width, *[attention, mlp] * 12]


class Diagonal:
    """A diagonal operator that records the beginning and end of each product."""

    def __init__(self, eigenvalues: Tensor) -> None:
        self.eigenvalues = eigenvalues
        self.marks: list[tuple[Mark, Mark]] = []

    def __call__(self, v: Tensor) -> Tensor:
        begin = Mark(v.device)
        w = v * self.eigenvalues
        self.marks.append((begin, Mark(v.device)))
        return w

    def seconds_between(self) -> list[float]:
        """Return the seconds from the end of each product to the beginning of the next."""
        return [a[1].until(b[0]) for a, b in zip(self.marks, self.marks[1:])]


def gpt2_step(machine: Machine) -> Row:
    """Measure batched_slq: time between two products, and peak memory."""
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
    error = difference(moments, exact_moments(eigenvalues, layout, n_probes))
    row = Row(check("batched_slq: v^T H v", error, ROUNDING))

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
        "share of copy bandwidth": machine.share(STEP_ELEMENTS * 4 * n_probes * n, times.median),
        "parameters": n,
    }
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - held
        row.measured["MiB beyond three vector sets"] = (peak - 3 * 4 * n_probes * n) / 2**20
        row.measured["vector sets"] = peak / (4 * n_probes * n)
    return row


def timed_loop(
    eigenvalues: Tensor, dims: list[int], num_steps: int, *, capturable: bool = False, cuda_graph: bool = False
) -> tuple[Quadrature, Times]:
    """Run batched_slq with 10 probes on a diagonal operator; return the times of its steps, product included."""
    device = eigenvalues.device
    marks: list[Mark] = []

    def product(v: Tensor) -> Tensor:
        return v * eigenvalues

    product.capturable = capturable  # type: ignore[attr-defined]
    q = batched_slq(
        product,
        dims,
        num_probes=10,
        num_steps=num_steps,
        device=device,
        reorthogonalize="none",
        cuda_graph=cuda_graph,
        on_step=lambda step, running: marks.append(Mark(device)),
    )
    check("batched_slq: recurrences that ended early", int((q.steps < num_steps).sum()), 0)
    del marks[:4]  # the first steps load kernels and capture graphs
    return q, Times([a.until(b) for a, b in pairwise(marks)])


def replayed_loop(machine: Machine) -> Row:
    """Measure whole steps, launched one by one and replayed from CUDA graphs, for two sets of small blocks."""
    m, device = machine.pick(30, 30, 6), machine.device
    row = Row(0.0)
    for size, dims in (
        ("", small_blocks(machine)),
        (", up to 4,096 elements", log_spaced(machine.pick(300, 300, 12), 64, machine.pick(4096, 4096, 128))),
    ):
        # Random eigenvalues, so that no recurrence ends early in a block of 64.
        eigenvalues = torch.randn(sum(dims), device=device, generator=machine.generator())
        plain, times = timed_loop(eigenvalues, dims, m)
        expected = exact_moments(eigenvalues, Layout.of(dims, device), plain.num_probes)
        error = difference((plain.weights * plain.nodes).sum(-1), expected)
        row.error = max(row.error, check("batched_slq: v^T H v", error, ROUNDING))
        row.times[f"plain{size}"] = times.summary()
        if device.type == "cpu":
            continue
        for name, capturable in (("replayed", False), ("replayed with the product", True)):
            q, graph_times = timed_loop(eigenvalues, dims, m, capturable=capturable, cuda_graph=True)
            apart = max(float((getattr(q, x) - getattr(plain, x)).abs().max()) for x in ("nodes", "weights"))
            row.measured["largest difference from the plain loop"] = check(f"batched_slq {name}", apart, 0)
            row.measured[f"times faster, {name}{size}"] = times.median / graph_times.median
            row.times[f"{name}{size}"] = graph_times.summary()
    return row
