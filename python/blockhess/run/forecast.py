"""Predicted time of a job on several processes, from rates measured in this one.

seconds = fixed + max over ranks of (its products and Lanczos steps) * rate + traffic / bandwidth
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from blockhess.hvp import Engine, TracedEngine
from blockhess.hvp.operator import product
from blockhess.problem.memory import size_text, time_text
from blockhess.problem.problem import Problem
from blockhess.run.costs import product_costs
from blockhess.run.job import Job
from blockhess.run.options import Options
from blockhess.run.plan import Plan
from blockhess.run.sharding import BANDWIDTH
from blockhess.run.split_work import items_of, shared
from blockhess_ext import batched_slq

REPEATS = 3


@dataclass(frozen=True)
class Forecast:
    """Predicted time and memory of a job on several processes; with `tol`, upper limits.

    Attributes:
        plan: of the job in one process.
        work, data: number of processes that share recurrences, and that share batches.
        fixed_seconds: before the first product, in every process: preparation, checks of products, tracing.
        seconds: total time.
        alone_seconds: total time in one process.
        balance: mean load of the ranks / largest load.
        memory_bytes: of the vectors, graphs and copy of the model in one process, and of what it holds of shards.
        traffic_bytes: sent by each process, beside the traffic between shards in `plan`.
        traffic_seconds: duration of this traffic.
        bandwidth: assumed bytes per second between processes.
    """

    plan: Plan
    work: int
    data: int
    fixed_seconds: float
    seconds: float
    alone_seconds: float
    balance: float
    memory_bytes: int
    traffic_bytes: float
    traffic_seconds: float
    bandwidth: float

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as a JSON value."""
        return {**dataclasses.asdict(self), "plan": self.plan.to_dict()}

    def __str__(self) -> str:
        at_most = "at most " if self.plan.least_hvps < self.plan.hvps else ""
        shards = f" x {self.plan.processes} hold shards" if self.plan.processes > 1 else ""
        number = self.work * self.data * self.plan.processes
        return "\n".join(
            [
                str(self.plan),
                f"processes     {number}: {self.work} share recurrences x {self.data} share batches{shards}",
                f"time          {at_most}{time_text(self.seconds)}, {time_text(self.alone_seconds)} in one process; "
                f"{time_text(self.fixed_seconds)} of it before the first product, in every process",
                f"balance       {self.balance:.0%} (mean load / largest)",
                f"memory        {size_text(self.memory_bytes)} of vectors, graphs and copies in every process",
                f"traffic       {size_text(self.traffic_bytes)} {'of results ' * bool(shards)}sent by every process, "
                f"{time_text(self.traffic_seconds)} at {self.bandwidth / 1e9:.3g} GB/s",
            ]
        )


def forecast(
    prepared: AbstractContextManager[tuple[Problem, Any, Any]],
    options: Options,
    work: int = 1,
    data: int = 1,
    *,
    bandwidth: float = BANDWIDTH,
    clock: Callable[[], float] = time.perf_counter,
) -> Forecast:
    """Predict the time of a job on a mesh of work x data processes; measures a few products in this process.

    Args:
        prepared: the problem, from `prepared_problem`.
        work, data: number of processes that share recurrences, and that share batches.
        bandwidth: bytes per second between processes.
        clock: returns seconds; time.process_time if the machine has other load.
    """
    start = clock()
    with prepared as (problem, *_):
        job = Job(problem, options)
        engine = job.make_engine()
        fixed = clock() - start
        counted = product_costs(problem, engine)
        products = product_seconds(problem, engine, clock)
        steps = _step_seconds(problem, clock)
        share = -(-problem.n_batches // data)

        def loads(ranks: int, batches: int) -> list[float]:
            measured = job.cost([batches * seconds for seconds in products], steps)
            pieces = shared(job.units, job.cost(counted), ranks)
            return [sum(measured(*item) for unit in units for item in items_of(unit)) for units in pieces]

        ranks = loads(work, share)
        plan, dims, itemsize = job.plan, problem.dims, problem.dtype.itemsize
        sent = sum(
            itemsize * dims[l] * (dims[l] if p < 0 else min(options.num_steps, dims[l]))
            for unit in shared(job.units, job.cost(counted), work)[0]
            for l, p in items_of(unit)
        )
        traffic = 2 * (data - 1) / data * sent
        results = 4 * 8 * options.num_probes * len(dims) * min(options.num_steps, max(dims)) if work > 1 else 0
        retained = share if plan.retain else 1
        return Forecast(
            plan=plan,
            work=work,
            data=data,
            fixed_seconds=fixed,
            seconds=fixed + max(ranks) + traffic / bandwidth,
            alone_seconds=fixed + sum(loads(1, problem.n_batches)),
            balance=sum(ranks) / len(ranks) / max(ranks) if max(ranks) else 1.0,
            memory_bytes=plan.vector_bytes // work
            + plan.engine_bytes * retained // max(1, problem.n_batches * plan.retain)
            + plan.copy_bytes
            + plan.shard_bytes
            + plan.gathered_bytes,
            traffic_bytes=traffic + results,
            traffic_seconds=(traffic + results) / bandwidth,
            bandwidth=bandwidth,
        )


def product_seconds(
    problem: Problem, engine: Engine, clock: Callable[[], float], numbers: Sequence[int] | None = None
) -> list[float]:
    """Return the measured seconds of one product with each block, or with those numbered, for the first batch."""
    engine.prepare(0)
    rows = engine.rows if isinstance(engine, TracedEngine) else 1
    found = []
    for number in range(len(problem.dims)) if numbers is None else numbers:
        vectors = torch.ones(rows, problem.dims[number], dtype=problem.dtype, device=problem.device)
        multiply = partial(product, engine, number, vectors)
        found.append(_median(multiply, clock, problem) / rows if problem.is_used(number) else 0.0)
    return found


def _step_seconds(problem: Problem, clock: Callable[[], float]) -> list[float]:
    """Return the seconds of a Lanczos step of each block without its product, measured together."""
    steps = min(4, max(problem.dims))

    def recurrences() -> None:
        # A diagonal operator whose Krylov spaces are larger than the number of steps.
        batched_slq(lambda v: v * scales, problem.dims, num_probes=1, num_steps=steps, reorthogonalize="none",
                    check=False, dtype=problem.dtype, device=problem.device)  # fmt: skip

    scales = torch.linspace(1, 2, sum(problem.dims), dtype=problem.dtype, device=problem.device)
    seconds = _median(recurrences, clock, problem) / steps
    return [seconds * dim / sum(problem.dims) for dim in problem.dims]


def _median(call: Callable[[], object], clock: Callable[[], float], problem: Problem) -> float:
    times = []
    for _ in range(1 + REPEATS):  # the first one is a warm-up
        start = clock()
        call()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        times.append(clock() - start)
    return statistics.median(times[1:])
