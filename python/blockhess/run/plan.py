"""The plan of a run: engine, blocks to compute exactly, and numbers of vectors and batches processed together.

It follows from counted products, operations and bytes, not from timings or the memory that is currently free, so the
same job is always computed in the same way; of the machine it depends on the memory budget only, which is recorded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from blockhess.hvp import ENGINES
from blockhess.hvp.exact import bytes_needed, is_cheaper_exact
from blockhess.hvp.operator import Engine
from blockhess.problem.memory import size_text, time_text
from blockhess.problem.problem import Problem
from blockhess.run.costs import FLOPS_PER_SECOND

# Orders of magnitude from bench/results/hvp_cpu.json, which decide about tracing and compiling. A product takes about
# PRODUCT_FORWARDS forward passes. Tracing takes TRACE_SECONDS per block and operation of the gradient's graph and saves
# the fraction TRACE_SAVES of the time; compiling takes COMPILE_SECONDS per block on a CPU and saves COMPILE_SAVES.
PRODUCT_FORWARDS = 1.3
TRACE_SECONDS, TRACE_SAVES = 5e-4, 0.2
COMPILE_SECONDS, COMPILE_SAVES = 20.0, 0.15
# Bytes of a trace's constants per byte of autograd's graph.
TRACED_BYTES = 2.0


@dataclass(frozen=True)
class Plan:
    """What a run computes, and its cost.

    Attributes:
        engine: "autograd", "traced" or "ggn".
        exact: for every block, whether it is computed exactly; the others are estimated.
        passes: (first probe, number of probes, indices of the blocks) of the recurrences that run together.
        rows: number of vectors per call of the engine.
        compiled: whether linear programs are compiled, which pays for the longest jobs only.
        retain: whether graphs or constants of all batches are retained between steps.
        batches: number of batches, after splitting large ones.
        hvps: upper limit of the number of products, of one block, vector and batch each.
        least_hvps: lower limit with a tolerance; otherwise equal to hvps.
        flops: of all products, approximately.
        seconds: of all products, estimated from one measured forward pass.
        vector_bytes: largest memory of vectors or exactly computed blocks at a time.
        engine_bytes: largest memory of graphs or constants at a time.
        kept_bytes: size of the vectors kept after the last step, on the host.
        memory_budget: in bytes.
        why: reason for the choice of the engine.
    """

    engine: str
    exact: tuple[bool, ...]
    passes: tuple[tuple[int, int, tuple[int, ...]], ...]
    rows: int
    compiled: bool
    retain: bool
    batches: int
    hvps: int
    least_hvps: int
    flops: float
    seconds: float = field(compare=False)
    vector_bytes: int
    engine_bytes: int
    kept_bytes: int
    memory_budget: int
    why: str

    def make(self, problem: Problem) -> Engine:
        """Return the engine of this plan; raises NotTraceable if it is "traced" and the problem cannot be traced."""
        options = {"rows": self.rows, "compiled": self.compiled} if self.engine == "traced" else {}
        return ENGINES[self.engine](problem, retain=self.retain, **options)  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON value."""
        names = ("first_probe", "num_probes", "blocks")
        return {**dataclasses.asdict(self), "passes": [dict(zip(names, each)) for each in self.passes]}

    def __str__(self) -> str:
        products = f"{self.hvps:,}"
        if self.least_hvps < self.hvps:
            products = f"at most {products}, at least {self.least_hvps:,},"
        lines = [
            f"engine        {self.engine}{', compiled' if self.compiled else ''} ({self.why})",
            f"blocks        {len(self.exact)}, of which {sum(self.exact)} exactly",
            f"batches       {self.batches}, {'kept' if self.retain else 'rebuilt'} between steps",
            f"products      {products} of one block, vector and batch, about {self.flops:.2g} FLOPs, "
            f"{time_text(self.seconds)}",
            f"together      {max((p[1] for p in self.passes), default=0)} probes of "
            f"{max((len(p[2]) for p in self.passes), default=0)} blocks, in {len(self.passes)} pass(es)",
            f"memory        {size_text(self.vector_bytes)} vectors, {size_text(self.engine_bytes)} {self.engine}, "
            f"of {size_text(self.memory_budget)}",
        ]
        if self.kept_bytes:
            lines += [
                f"kept          {size_text(self.kept_bytes)} of vectors after the last step, for more steps later"
            ]
        return "\n".join(lines)


def make_plan(
    problem: Problem,
    *,
    engine: str = "auto",
    num_probes: int,
    num_steps: int,
    basis_dims: Sequence[int],
    budget: int,
    exact: tuple[bool, ...] | None = None,
    least: tuple[int, int] | None = None,
    keep_vectors: bool = False,
) -> Plan:
    """Plan a run.

    Args:
        engine: one of `blockhess.hvp.CHOICES`; "auto" computes small blocks exactly, "exact" all of them.
        num_probes, num_steps: as for `spectrum`.
        basis_dims: for every block, the size of the basis vectors that are stored: its dim, or 0.
        budget: memory budget in bytes.
        exact: the blocks computed exactly by an earlier run.
        least: with a tolerance, smallest number of probes and steps of an estimated block.
        keep_vectors: whether the vectors after the last step are kept.

    Raises:
        ValueError: one probe of the largest block, or the blocks to compute exactly, exceed the budget.
    """
    dims, itemsize = problem.dims, problem.dtype.itemsize
    used = [problem.is_used(l) for l in range(len(dims))]
    room = budget // 2
    if exact is None:
        exact = _exact_blocks(problem, engine, num_probes, num_steps, room)
    # The vectors of one probe: v, v_prev, H v, and the basis.
    sizes = [itemsize * (3 * d + min(num_steps, d) * b) for d, b in zip(dims, basis_dims)]
    largest = max(range(len(dims)), key=lambda l: sizes[l])
    needed = 2 * max(sizes[largest], problem.graph_bytes)
    if needed > budget:
        what = f"block {problem.infos[largest].name!r}" if sizes[largest] > room else "one batch's graph"
        raise ValueError(
            f"spectrum: memory_budget must be at least {size_text(needed)} for one probe of {what}, got "
            f"{size_text(budget)}"
        )
    passes = tuple(_passes([l for l, e in enumerate(exact) if not e], sizes, num_probes, room))

    def products(probes: int, steps: int) -> int:
        of_blocks = (d if e else min(probes, num_probes) * min(steps, d) for d, e, u in zip(dims, exact, used) if u)
        return problem.n_batches * sum(of_blocks)

    n_batches = len(problem.batches)  # of this rank
    hvps = products(num_probes, num_steps)
    chosen, why = _engine(problem, engine, hvps)
    graph = int(problem.graph_bytes * (TRACED_BYTES if chosen == "traced" else 1.0))
    retain = n_batches * graph <= room
    forwards = hvps * PRODUCT_FORWARDS
    together = max((sum(sizes[l] for l in blocks) * count for _, count, blocks in passes), default=0)
    compiled = chosen == "traced" and problem.device.type == "cpu"  # not measured on a GPU
    kept = sum(size - itemsize * dim for size, dim, e in zip(sizes, dims, exact) if not e)
    return Plan(
        engine=chosen,
        exact=exact,
        passes=passes,
        rows=num_probes if chosen == "traced" and problem.device.type == "cuda" else 1,
        compiled=compiled and COMPILE_SAVES * _product_seconds(problem, hvps) > 2 * COMPILE_SECONDS * sum(used),
        retain=retain,
        batches=problem.n_batches,
        hvps=hvps,
        least_hvps=products(*least) if least else hvps,
        flops=forwards * problem.forward_flops,
        seconds=forwards * problem.forward_seconds,
        vector_bytes=max(together, bytes_needed([d for d, e in zip(dims, exact) if e], itemsize, num_probes)),
        engine_bytes=graph * (n_batches if retain else 1),
        kept_bytes=keep_vectors * num_probes * kept,
        memory_budget=budget,
        why=why,
    )


def _engine(problem: Problem, engine: str, hvps: int) -> tuple[str, str]:
    if engine not in ("auto", "exact"):
        return engine, "as asked"
    saved = TRACE_SAVES * _product_seconds(problem, hvps)
    tracing = TRACE_SECONDS * problem.graph_nodes * len(problem.blocks)
    if saved > tracing:
        return "traced", f"saves about {saved:.0f} s of products for {tracing:.0f} s of tracing"
    return "autograd", f"tracing would take about {tracing:.1f} s and save {saved:.1f} s of products"


def _product_seconds(problem: Problem, hvps: int) -> float:
    """Return the seconds of all products at the nominal rate of the device, which are reproducible."""
    return float(hvps * PRODUCT_FORWARDS * problem.forward_flops / FLOPS_PER_SECOND[problem.device.type])


def _exact_blocks(problem: Problem, engine: str, num_probes: int, num_steps: int, room: int) -> tuple[bool, ...]:
    """Return which blocks to compute exactly: with "auto", smallest first, those that need fewer products and fit."""
    exact = [False] * len(problem.dims)
    if engine not in ("auto", "exact"):
        return tuple(exact)
    chosen: list[int] = []
    for l in sorted(range(len(exact)), key=lambda l: problem.dims[l]):
        dim = problem.dims[l]
        if not problem.is_used(l) or (engine == "auto" and not is_cheaper_exact(dim, num_probes, num_steps)):
            continue
        exact[l] = engine == "exact" or bytes_needed([*chosen, dim], problem.dtype.itemsize, num_probes) <= room
        if exact[l]:
            chosen.append(dim)
    taken = bytes_needed(chosen, problem.dtype.itemsize, num_probes)
    if engine == "exact" and taken > room:
        raise ValueError(
            f"spectrum: memory_budget must be at least {size_text(2 * taken)} to write out {sum(exact)} blocks "
            f"(engine='exact'), got {size_text(2 * room)}"
        )
    return tuple(exact)


def _passes(
    blocks: list[int], sizes: Sequence[int], num_probes: int, room: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return passes of all probes and blocks if they fit, else of fewer probes, else of one probe and fewer blocks."""
    if not blocks:
        return []
    together = min(num_probes, room // max(1, sum(sizes[l] for l in blocks)))
    groups = [blocks]
    if together == 0:
        together, groups = 1, []
        for l in blocks:
            if not groups or sum(sizes[k] for k in groups[-1]) + sizes[l] > room:
                groups.append([])
            groups[-1].append(l)
    return [
        (first, min(together, num_probes - first), tuple(group))
        for group in groups
        for first in range(0, num_probes, together)
    ]
