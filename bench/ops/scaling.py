"""Time per vector element as a function of size, blocks, probes, steps and threads, and a plot of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.machine import Machine
from bench.harness.rows import Row, Rows, Target
from bench.harness.timing import CPU, Times, measure
from bench.ops.rows import VECTOR_BYTES
from bench.ops.step import Step
from blockhess_ext import batched_slq

LARGE = 10**7


def step_times(machine: Machine, dims: Sequence[int], n_probes: int) -> Times:
    """Return the times of one lanczos_step after checking its result."""
    step = Step.of(machine, list(dims), n_probes)
    step.checked()
    times = measure(step.run, CPU, repeats=9, seconds=2.0)
    step.check_running()
    return times


def loop_times(n: int, num_steps: int) -> Times:
    """Return the times of a step of batched_slq without reorthogonalization, with a diagonal product."""
    eigenvalues = torch.linspace(-1.0, 2.0, n)
    options: dict[str, Any] = {"num_probes": 10, "num_steps": num_steps, "reorthogonalize": "none"}
    times = measure(lambda: batched_slq(lambda v: v * eigenvalues, [n], **options), CPU, repeats=5, seconds=2.0)
    return Times([t / num_steps for t in times.seconds])


def curves(machine: Machine) -> dict[str, list[tuple[float, float]]]:
    """Return curve -> points (varied quantity, nanoseconds per element of a set of vectors and step)."""
    unit = machine.pick(LARGE, 10**5, 10**4)
    largest = machine.pick(VECTOR_BYTES // 12, 10**6, 10**5)

    def point(x: float, times: Times, elements: float) -> tuple[float, float]:
        return x, 1e9 * times.median / elements

    sizes = [int(unit * f) for f in (0.001, 0.01, 0.1, 0.3, 1, 3)] + [largest]
    found = {"elements": [point(n, step_times(machine, [n], 1), n) for n in sizes]}
    found["blocks, of 1e7 elements together"] = [
        point(b, step_times(machine, [unit // b] * b, 1), unit)
        for b in (1, 10, 100, 1000, machine.pick(10_000, 1000, 100))
    ]
    found["probes, of 1e6 elements"] = [
        point(p, step_times(machine, [unit // 10], p), p * (unit // 10)) for p in (1, 3, 10, 40)
    ]
    found["steps, 10 probes of 1e5 elements"] = [
        point(m, loop_times(unit // 100, m), 10 * (unit // 100)) for m in (10, 30, 100, machine.pick(300, 100, 100))
    ]
    threads = torch.get_num_threads()
    try:
        found["threads, 1e7 elements"] = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found["threads, 1e7 elements"].append(point(count, step_times(machine, [unit], 1), unit))
    finally:
        torch.set_num_threads(threads)
    return found


def scaling(machine: Machine) -> Row:
    """Measure the curves of lanczos_step and of batched_slq."""
    machine.require(2.5 * machine.pick(VECTOR_BYTES, 10**7, 10**6))
    found = curves(machine)
    by_size = found["elements"]
    (base,) = (y for x, y in by_size if x == machine.pick(LARGE, 10**5, 10**4))
    row = Row(0.0, {"slowest element from 1e7 on, over that at 1e7": max(y for _, y in by_size[4:]) / base})
    row.curves = {name: [list(p) for p in points] for name, points in found.items()}
    return row


def plot(named: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """Plot the curves of one or more runs, by name, into an image file."""
    from matplotlib.figure import Figure

    kinds = list(next(iter(named.values())))
    figure = Figure(figsize=(3.2 * len(kinds), 3), layout="constrained", dpi=110)
    for panel, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds):
        for name, found in named.items():
            panel.plot(*zip(*found[kind]), "o-", label=name)
        panel.set_xscale("linear" if kind.startswith("threads") else "log")
        panel.set_xlabel(kind)
    figure.axes[0].set_ylim(bottom=0)  # the axis is shared
    figure.axes[0].set_ylabel("ns per element and step")
    figure.axes[0].legend()
    figure.savefig(path)


ROWS: Rows = {
    "time for each element, from 1e7 elements to 2 GiB of vectors": (
        scaling,
        [Target("within 1.3 x", "slowest element from 1e7 on, over that at 1e7", 1.3, False)],
    ),
}
