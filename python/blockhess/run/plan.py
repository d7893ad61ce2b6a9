"""The plan of a run: engine, blocks to compute exactly, and numbers of vectors and batches processed together.

It follows from counted products, operations and bytes, not from timings or the memory that is currently free, so the
same job is always computed in the same way; of the machine it depends on the memory budget only, which is recorded.
Memory of tangents is that of a dry run of the linear program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from blockhess._text import plural
from blockhess.hvp import ENGINES, TracedEngine
from blockhess.hvp.difference import expected_error
from blockhess.hvp.differences import LARGEST_GROUP, parameter_groups
from blockhess.hvp.exact import bytes_needed, is_cheaper_exact
from blockhess.hvp.operator import Engine
from blockhess.problem.memory import size_text, time_text
from blockhess.problem.problem import Problem
from blockhess.run.costs import Work, product_flops
from blockhess.run.sharding import BANDWIDTH, sharded_costs

# Work of one product with a usual block, of one parameter, in FLOPs of a forward pass, bytes of the gradient's graph
# and operations in it, and seconds of tracing per operation: orders of magnitude from bench/results, which decide
# whether tracing pays. A product with a larger block takes more of all three.
PRODUCT = {"autograd": Work(1.4, 7.0, 1.0), "traced": Work(1.27, 4.5, 1.2), "difference": Work(4.0, 0.0, 0.0)}
# Two gradients of a sharded model are with respect to all parameters: for each a forward pass, and two passes back.
SHARDED_FLOPS = 6.0
TRACE_SECONDS = 4e-3
# Bytes of the tangents of one vector per byte of the gradient's graph, before there is a trace to count them.
TANGENTS = 0.35
# Share of the products of Lanczos that a run with a tolerance makes, roughly.
TOLERANCE_SHARE = 0.05
# Vectors that a CPU multiplies together have tangents of at most this size, so that they stay in its caches.
CACHE_BYTES = 2**24
# Checks of products take at most this share of the expected products, but compare one block at least. In products,
# which count twice in float64: gradients in two precisions and the graph of one, differences of gradients and a product
# for each group of parameters, and a product per block in float64, with one more by autograd and two by a trace.
CHECK_SHARE, CHECK_FIXED, CHECK_GROUP, CHECK_BLOCK = 0.1, 15, 15, 5
# Their bytes per element of a checked block, by whether its products are traced; per parameter, of gradients in two
# precisions; and in float64 per parameter of a group, of its product, and while it moves, by whether the engine is
# "difference", which needs no product then.
BLOCK_BYTES = {False: 16, True: 20}
GRADIENT_BYTES, PRODUCT_BYTES, GROUP_BYTES = 12, 24, {False: 48, True: 44}
# Their memory in sizes of the gradient's graph: of losses in float64, and of a graph in float64 and its products, from
# `python -m bench --only "peak memory"`.
LOSS_GRAPHS, PRODUCT_GRAPHS = 2, 5.5


@dataclass(frozen=True)
class Plan:
    """What a run computes, and its cost.

    Attributes:
        engine: "autograd", "traced", "ggn" or "difference".
        traced: whether products are those of a linear program, for "traced" and "ggn".
        exact: for every block, whether it is computed exactly; the others are estimated. With a tolerance, those of
            them for which that takes fewer products are computed exactly after their first probes.
        passes: (first probe, number of probes, indices of the blocks) of the recurrences that run together.
        rows: number of vectors, of one block each, that are multiplied together.
        checked: indices of the blocks whose products are checked: all, or those for which a tenth of the products is
            enough. With "difference", the step of every block is chosen then.
        retain: whether graphs or constants of all batches are retained between steps.
        batches: number of batches, after splitting large ones.
        hvps: upper limit of the number of products, of one block, vector and batch each.
        least_hvps: lower limit with a tolerance; otherwise equal to hvps.
        flops: of the expected products, approximately.
        seconds: of the expected products, estimated from one measured forward pass.
        vector_bytes: largest memory of vectors or exactly computed blocks at a time.
        engine_bytes: largest memory of graphs and gradients, or of constants and tangents, at a time.
        check_bytes: memory of the checks, before the first step.
        kept_bytes: size of the vectors kept after the last step, on the host.
        memory_budget: in bytes.
        why: reason for the choice of the engine.
        groups: number of groups of parameters whose derivatives are compared with differences.
        expected_hvps: rough estimate with a tolerance; otherwise equal to hvps.
        largest_group: number of elements up to which parameters move together: fewer if memory is small.
        copy_bytes: size of the copies of the model, see `Problem.copy_bytes`.
        processes: number of processes that hold shards of the model; 1 if it is not sharded.
        shard_bytes: of the gradients of this process's shards.
        gathered_bytes: largest memory of gathered parameters and gradients at a time.
        traffic_bytes: sent by every process for the expected products, between shards.
        gather_traffic_bytes: part of it that gathers gradients of blocks.
    """

    engine: str
    traced: bool
    exact: tuple[bool, ...]
    passes: tuple[tuple[int, int, tuple[int, ...]], ...]
    rows: int
    checked: tuple[int, ...]
    retain: bool
    batches: int
    hvps: int
    least_hvps: int
    flops: float
    seconds: float = field(compare=False)
    vector_bytes: int
    engine_bytes: int
    check_bytes: int
    kept_bytes: int
    memory_budget: int
    why: str
    groups: int = 1
    expected_hvps: int = 0
    largest_group: int = LARGEST_GROUP
    copy_bytes: int = 0
    processes: int = 1
    shard_bytes: int = 0
    gathered_bytes: int = 0
    traffic_bytes: float = 0.0
    gather_traffic_bytes: float = 0.0

    @property
    def peak_bytes(self) -> int:
        """Largest memory of the run, beside that of the model and the data."""
        most = max(self.vector_bytes + self.engine_bytes, self.check_bytes)
        return self.copy_bytes + self.shard_bytes + self.gathered_bytes + most

    @property
    def exceeds_budget(self) -> bool:
        """Whether the smallest possible run takes more than the budget."""
        return self.peak_bytes > self.memory_budget

    def make(self, problem: Problem) -> Engine:
        """Return the engine of this plan; raises NotTraceable if it is traced and the problem cannot be traced."""
        if self.traced:
            return TracedEngine(problem, self.retain, self.rows, gauss_newton=self.engine == "ggn")
        return ENGINES[self.engine](problem, retain=self.retain)  # type: ignore[no-any-return]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as a JSON value."""
        names = ("first_probe", "num_probes", "blocks")
        return {**dataclasses.asdict(self), "passes": [dict(zip(names, each)) for each in self.passes]}

    def __str__(self) -> str:
        products = f"{self.hvps:,}"
        if self.least_hvps < self.hvps:
            products = f"about {self.expected_hvps:,} (at least {self.least_hvps:,}, at most {products})"
        n_exact, n_passes = sum(self.exact), len(self.passes)
        kept = "constants" if self.traced else "graphs"
        lines = [
            f"engine        {self.engine}{', traced' if self.engine == 'ggn' and self.traced else ''} ({self.why})",
            f"blocks        {len(self.exact)}: {len(self.exact) - n_exact} by Lanczos, {n_exact} computed exactly",
            f"batches       {self.batches}, {kept} {'kept between steps' if self.retain else 'computed in every step'}",
            f"products      {products} of one block, vector and batch, {self.rows} at a time; "
            f"about {self.flops:.2g} FLOPs, {time_text(self.seconds)}",
        ]
        if self.passes:
            probes, blocks = max(p[1] for p in self.passes), max(len(p[2]) for p in self.passes)
            lines += [
                f"recurrences   {probes} probes of {blocks} blocks at a time, in {n_passes} pass{'es' * (n_passes > 1)}"
            ]
        lines += [
            f"memory        {size_text(self.vector_bytes)} of vectors{' or exact blocks' * (n_exact > 0)}, "
            f"{size_text(self.engine_bytes)} of {kept} and {'tangents' if self.traced else 'gradients'}, "
            f"{size_text(self.copy_bytes)} of a copy of the model",
            f"checks        of products with {plural(len(self.checked), 'block')} before the "
            f"first step, in {size_text(self.check_bytes)}",
            f"peak          {size_text(self.peak_bytes)}, {'which exceeds' if self.exceeds_budget else 'within'} the "
            f"budget of {size_text(self.memory_budget)}",
        ]
        if self.processes > 1:
            sent, count = self.traffic_bytes, max(1, self.expected_hvps)
            gathers = self.gather_traffic_bytes / max(1.0, sent)
            lines += [
                f"shards        of {self.processes} processes: {size_text(self.shard_bytes)} of gradients, "
                f"{size_text(self.gathered_bytes)} of parameters and gradients gathered at a time",
                f"traffic       {size_text(sent / count)} between shards sent by every process for a product of "
                f"{time_text(self.seconds / count)}, {gathers:.0%} of it for its block; {size_text(sent)} in all, "
                f"{time_text(sent / BANDWIDTH)} at {BANDWIDTH / 1e9:.3g} GB/s",
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
    largest_exact: float = math.inf,
    keep_vectors: bool = False,
) -> tuple[Plan, Engine | None]:
    """Plan a run; returns also the engine, if it had to be made for that.

    Args:
        engine: one of `blockhess.hvp.CHOICES`; "auto" computes small blocks exactly, "exact" all of them.
        num_probes, num_steps: as for `spectrum`.
        basis_dims: for every block, the size of the basis vectors that are stored: its dim, or 0.
        budget: memory budget in bytes.
        exact: the blocks computed exactly by an earlier run.
        least: with a tolerance, smallest number of probes and steps of an estimated block.
        largest_exact: size of the blocks up to which they are computed exactly from the start.
        keep_vectors: whether the vectors after the last step are kept.

    Raises:
        ValueError: one probe of the largest block, or the blocks to compute exactly, exceed the budget.
        NotImplementedError: engine is "traced" and the problem cannot be traced.
    """
    dims, itemsize = problem.dims, problem.dtype.itemsize
    used = [problem.is_used(l) for l in range(len(dims))]
    copy_bytes = problem.copy_bytes
    room = max(0, budget - copy_bytes) // 2
    later = [False] * len(dims)  # blocks that may be computed exactly after their first probes
    if exact is None:
        exact = may_be_exact = exact_blocks(problem, engine, num_probes, num_steps, budget)
        if engine == "auto":
            exact = tuple(e and d <= largest_exact for d, e in zip(dims, may_be_exact))
            later = [may and not e for may, e in zip(may_be_exact, exact)]
    # The vectors of one probe: v, v_prev, H v, and the basis.
    sizes = [itemsize * (3 * d + min(num_steps, d) * b) for d, b in zip(dims, basis_dims)]
    largest = max(range(len(dims)), key=lambda l: sizes[l])
    needed = copy_bytes + 2 * max(sizes[largest], problem.graph_bytes)
    if needed > budget:
        what = f"block {problem.infos[largest].name!r}" if sizes[largest] > room else "one batch's graph"
        raise ValueError(
            f"spectrum: memory_budget must be at least {size_text(needed)} for one probe of {what}, got "
            f"{size_text(budget)}"
        )
    by_difference = engine == "difference" or bool(problem.lacking)
    gradient_bytes = _gradient_bytes(problem, by_difference)
    beside = max(sizes[largest], budget - copy_bytes - problem.graph_bytes - gradient_bytes)
    passes = tuple(_passes([l for l, e in enumerate(exact) if not e], sizes, num_probes, min(room, beside)))

    def of_blocks(probes: int, steps: int) -> list[int]:
        counts = [d if e else min(probes, num_probes) * min(steps, d) for d, e in zip(dims, exact)]
        return [problem.n_batches * count * u for count, u in zip(counts, used)]

    def products(probes: int, steps: int) -> int:
        return sum(of_blocks(probes, steps))

    n_batches = len(problem.batches)  # of this rank
    hvps = products(num_probes, num_steps)
    if least:
        more_probes = num_probes - min(least[0], num_probes)
        beyond = (d - more_probes * min(num_steps, d) for d, e in zip(dims, later) if e)
        hvps += problem.n_batches * sum(max(0, more) for more in beyond)
    rows, made = 1, None
    most = max([num_probes * sum(exact), *(count * len(blocks) for _, count, blocks in passes)])
    exact_hvps = products(0, 0)
    expected = max(products(*least), exact_hvps + int(TOLERANCE_SHARE * (hvps - exact_hvps))) if least else hvps
    counts = of_blocks(num_probes, num_steps)
    pays, why = (False, "as asked") if by_difference else _tracing_pays(problem, engine, expected, most, room, counts)
    if by_difference:
        why = why_difference(problem, problem.lacking)
    graph, tangents = problem.graph_bytes, 0
    if pays:
        made, failure, graph, tangents = _trace(problem, gauss_newton=engine == "ggn")
        if made and graph + tangents > room:
            failure = (
                f"memory_budget must be at least {size_text(copy_bytes + 2 * (graph + tangents))} for one traced vector"
            )
            if engine == "traced":
                raise ValueError(f"spectrum: {failure}, got {size_text(budget)}")
            made = None
        if engine == "traced" and failure:
            raise NotImplementedError(f"spectrum: engine='traced' cannot be had: {failure}")
        if failure:
            why, graph, tangents = f"no trace: {failure}", problem.graph_bytes, 0
    retain = not by_difference and n_batches * graph + tangents <= room
    engine_bytes = graph * (n_batches if retain else 1)
    if made:
        limit = room - engine_bytes if problem.device.type == "cuda" else min(CACHE_BYTES, room - engine_bytes)
        rows = made.rows = max(1, min(most, limit // max(1, tangents)))
        made.retain = retain
        engine_bytes += rows * tangents
    else:
        engine_bytes += gradient_bytes
    written_out = bytes_needed([d for d, e, m in zip(dims, exact, later) if e or m], itemsize, num_probes)
    together = max((sum(sizes[l] for l in blocks) * count for _, count, blocks in passes), default=0)
    kept = sum(size - itemsize * dim for size, dim, e in zip(sizes, dims, exact) if not e)
    sizes_of_groups = _sizes_of_groups(problem, LARGEST_GROUP)
    groups = min(len(sizes_of_groups), max(1, int((CHECK_SHARE * expected - CHECK_FIXED) / CHECK_GROUP)))
    every = [l for l, u in enumerate(used) if u]
    checked = tuple(every) if by_difference else _checked(every, expected, groups)
    name = "difference" if by_difference else "ggn" if engine == "ggn" else "traced" if made else "autograd"
    largest_group, shards = LARGEST_GROUP, {}
    if problem.is_sharded:
        passes_each, shards = SHARDED_FLOPS, sharded_costs(problem, counts, expected)
        # The step of a block is chosen with a random vector and two products; a part is moved, another one is kept.
        check_bytes = graph + 4 * itemsize * max(dims)
    else:
        passes_each = _forward_passes(problem, name, made is not None, counts)
        fixed = graph + tangents
        if not by_difference:  # which computes one product after the other
            fixed += BLOCK_BYTES[made is not None] * sum(dims[l] for l in checked)
        largest_parameter = max(p.numel() for p in problem.parameters.values())
        enough = max(budget - copy_bytes, fixed + _check_bytes(problem, largest_parameter, by_difference))
        while (check_bytes := fixed + _check_bytes(problem, max(sizes_of_groups), by_difference)) > enough:
            # As many parameters move as without the limit, in more and smaller groups.
            share, largest_group = groups / len(sizes_of_groups), largest_group // 2
            sizes_of_groups = _sizes_of_groups(problem, largest_group)
            groups = math.ceil(share * len(sizes_of_groups))
    plan = Plan(
        engine=name,
        traced=made is not None,
        exact=exact,
        passes=passes,
        rows=rows,
        checked=checked,
        retain=retain,
        batches=problem.n_batches,
        hvps=hvps,
        least_hvps=products(*least) if least else hvps,
        flops=expected * passes_each * problem.forward_flops,
        seconds=expected * passes_each * problem.forward_seconds,
        vector_bytes=max(together, written_out),
        engine_bytes=engine_bytes,
        check_bytes=check_bytes,
        kept_bytes=keep_vectors * num_probes * kept,
        memory_budget=budget,
        why=why,
        groups=groups,
        largest_group=largest_group,
        copy_bytes=copy_bytes,
        expected_hvps=expected,
        **shards,
    )
    return plan, made


def _sizes_of_groups(problem: Problem, largest: int) -> list[int]:
    return [sum(problem.parameters[n].numel() for n in names) for names in parameter_groups(problem, largest)]


def _gradient_bytes(problem: Problem, by_difference: bool) -> int:
    """Return the memory of gradients beside the vectors and graphs, while the largest product is computed."""
    if problem.is_sharded:
        return 0  # see `sharded_costs`
    sizes = {name: p.nbytes for name, p in problem.parameters.items()}
    largest = max(sum(sizes[name] for name in info.parameters) for info in problem.infos)
    if by_difference:  # two gradients, and the parameters that move
        return 3 * largest
    return largest if len(problem.batches) == 1 else max(largest, sum(sizes.values()))


def _check_bytes(problem: Problem, group: int, by_difference: bool) -> int:
    """Return the memory of checks with groups of at most so many parameters, without that of checked blocks."""
    other = 4 if problem.dtype == torch.float64 else 8  # the model in the other precision
    return other * sum(p.numel() for p in problem.model.parameters()) + max(
        GRADIENT_BYTES * sum(p.numel() for p in problem.parameters.values()) + LOSS_GRAPHS * problem.graph_bytes,
        GROUP_BYTES[by_difference] * group + LOSS_GRAPHS * problem.graph_bytes,
        0 if by_difference else PRODUCT_BYTES * group + int(PRODUCT_GRAPHS * problem.graph_bytes),
    )


def why_difference(problem: Problem, lacking: str) -> str:
    """Return why products are differences of gradients, and their expected error.

    Args:
        lacking: why there is no second derivative, or "".
    """
    return f"{lacking or 'as asked'}; {expected_error(problem)}"


def _forward_passes(problem: Problem, engine: str, traced: bool, counts: Sequence[int]) -> float:
    """Return the work of a product in forward passes, the mean over some numbers of products with each block."""
    flops = sum(count * each for count, each in zip(counts, product_flops(problem, engine, traced)))
    if not flops:  # no matrix products, or none that depend on the blocks
        return PRODUCT["difference" if engine == "difference" else "traced" if traced else "autograd"].flops
    return flops / sum(counts) / problem.forward_flops


def _tracing_pays(
    problem: Problem, engine: str, hvps: int, most: int, room: int, counts: Sequence[int]
) -> tuple[bool, str]:
    """Return whether to trace, and why."""
    if engine in ("autograd", "traced"):
        return engine == "traced", "as asked"
    room = CACHE_BYTES if problem.device.type == "cpu" else room
    rows = max(1, min(most, int(room / (TANGENTS * max(1, problem.graph_bytes)))))  # of the traced engine, roughly
    traced = dataclasses.replace(PRODUCT["traced"], launches=PRODUCT["traced"].launches / rows)
    times = {}
    for name, work in (("autograd", PRODUCT["autograd"]), ("traced", traced)):
        share = _forward_passes(problem, "ggn" if engine == "ggn" else name, name == "traced", counts) / work.flops
        times[name] = _seconds(problem, work, hvps * share)
    tracing = TRACE_SECONDS * problem.graph_nodes
    saved = times["autograd"] - times["traced"]
    if saved > tracing:
        return True, f"saves about {time_text(saved)} of products for {time_text(tracing)} of tracing, at nominal rates"
    return (
        False,
        f"tracing would take about {time_text(tracing)} and save {time_text(saved)} of products, at nominal rates",
    )


def _seconds(problem: Problem, product: Work, hvps: float) -> float:
    """Return the seconds of all products at nominal rates of the device, which are reproducible."""
    one = Work(
        product.flops * problem.forward_flops,
        product.bytes * problem.graph_bytes,
        product.launches * problem.graph_nodes,
    )
    return one.times(hvps).seconds(problem.device.type)


def _trace(problem: Problem, gauss_newton: bool) -> tuple[TracedEngine | None, str, int, int]:
    """Return the traced engine or why there is none, and its memory of constants and of the tangents of a vector."""
    made, failure, constants, tangents = None, "", 0, 0
    try:
        made = TracedEngine(problem, gauss_newton=gauss_newton)
        constants, tangents = made.constant_bytes, made.tangent_bytes
    except RuntimeError as error:  # NotTraceable, or an operation that fails in the dry run
        failure = (str(error).strip() or repr(error)).splitlines()[0]
    failures, *sizes = zip(*problem.ranks.gather((failure, constants, tangents)))
    failure = next(filter(None, failures), "")
    return None if failure else made, failure, *map(max, sizes)


def most_checked(hvps: int, groups: int, before: int = 0) -> int:
    """Return how many blocks to check in a share of the time of the products, after `before` others."""
    used = CHECK_FIXED + CHECK_GROUP * groups + (CHECK_FIXED + CHECK_BLOCK * before if before else 0)
    return max(1, int((CHECK_SHARE * hvps - used) / CHECK_BLOCK))


def _checked(used: Sequence[int], hvps: int, groups: int) -> tuple[int, ...]:
    """Return blocks to check, evenly spaced, in a share of the time of the products."""
    count = min(len(used), most_checked(hvps, groups))
    return tuple(used[(2 * i + 1) * len(used) // (2 * count)] for i in range(count))


def exact_blocks(problem: Problem, engine: str, num_probes: int, num_steps: int, budget: int) -> tuple[bool, ...]:
    """Return the blocks to compute exactly: with "auto", smallest first, those that need fewer products and fit."""
    room = max(0, budget - problem.copy_bytes) // 2
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
            f"spectrum: memory_budget must be at least {size_text(problem.copy_bytes + 2 * taken)} to write out "
            f"{sum(exact)} blocks (engine='exact'), got {size_text(budget)}"
        )
    return tuple(exact)


def _passes(
    blocks: list[int], sizes: Sequence[int], num_probes: int, room: int
) -> list[tuple[int, int, tuple[int, ...]]]:
    """Return passes of all probes and blocks if they fit, else of fewer probes, else of one probe and fewer blocks.

    The largest blocks come first, so that memory runs out at the start if at all.
    """
    if not blocks:
        return []
    together = min(num_probes, room // max(1, sum(sizes[l] for l in blocks)))
    groups = [blocks]
    if together == 0:
        together, groups = 1, []
        for l in sorted(blocks, key=lambda l: -sizes[l]):
            if not groups or sum(sizes[k] for k in groups[-1]) + sizes[l] > room:
                groups.append([])
            groups[-1].append(l)
    return [
        (first, min(together, num_probes - first), tuple(sorted(group)))
        for group in groups
        for first in range(0, num_probes, together)
    ]
