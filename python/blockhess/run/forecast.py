"""What a job would take on several processes, from rates that this one measures.

seconds = fixed + max over ranks of (its products and Lanczos steps) * rate,   at least the traffic / bandwidth
"""

from __future__ import annotations

import dataclasses
import inspect
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockhess.estimate import spectrum
from blockhess.hvp import Engine
from blockhess.problem.memory import size_text, time_text
from blockhess.problem.prepare import prepared_problem
from blockhess.problem.problem import Problem
from blockhess.run.costs import product_costs
from blockhess.run.job import Job
from blockhess.run.options import Options
from blockhess.run.plan import Plan
from blockhess.run.split_work import items_of, shared
from blockhess_ext import batched_slq

# Of the link between processes, unless the user knows better: about 100 Gbit/s.
BANDWIDTH = 1e10
REPEATS = 3


@dataclass(frozen=True)
class Forecast:
    """What a job would take, at most: with `tol` it ends earlier.

    Attributes:
        plan: of the job in one process.
        work, data: processes that share recurrences, and batches.
        fixed_seconds: before the first product, in every process: surveying the data, checking the products, tracing.
        seconds: in all.
        alone_seconds: in one process.
        balance: mean load of the ranks / largest.
        memory_bytes: vectors and graphs of one process.
        traffic_bytes: that each process sends. traffic_seconds: which takes so long at the bandwidth assumed.
        bandwidth: bytes per second between processes.
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
        return "\n".join(
            [
                str(self.plan),
                f"processes     {self.work * self.data}: {self.work} share recurrences x {self.data} share batches",
                f"time          {time_text(self.seconds)}, {time_text(self.alone_seconds)} in one process; "
                f"{time_text(self.fixed_seconds)} of it before the first product, in every process",
                f"balance       {self.balance:.0%} (mean load / largest)",
                f"memory        {size_text(self.memory_bytes)} of vectors and graphs in every process",
                f"traffic       {size_text(self.traffic_bytes)} sent by every process, "
                f"{time_text(self.traffic_seconds)} at {self.bandwidth / 1e9:.3g} GB/s, hidden behind longer products",
            ]
        )


def forecast(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    work: int = 1,
    data_shares: int = 1,
    bandwidth: float = BANDWIDTH,
    clock: Callable[[], float] = time.perf_counter,
    **options: Any,
) -> Forecast:
    """Predict what a job would take on work x data_shares processes, from a few products measured in this one.

    Args:
        model, data, loss_fn, options: as for `spectrum`.
        work, data_shares: as in spectrum's parallel=(work, data).
        bandwidth: bytes per second between processes; used for data_shares > 1.
        clock: in seconds; time.process_time where others use the machine.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> forecast(model, batch, torch.nn.CrossEntropyLoss(), work=2).work
        2
    """
    given = inspect.signature(spectrum).bind(model, data, loss_fn, **options)
    given.apply_defaults()
    wishes = Options(**{f.name: given.arguments[f.name] for f in dataclasses.fields(Options)})
    posing = {n: given.arguments[n] for n in inspect.signature(prepared_problem).parameters if n in given.arguments}
    start = clock()
    with prepared_problem(**posing) as (problem, *_):
        job = Job(problem, wishes)
        engine = job.make_engine()
        fixed = clock() - start
        counted = product_costs(problem, engine)
        products = product_seconds(problem, engine, clock)
        steps = _step_seconds(problem, clock)
        share = -(-problem.n_batches // data_shares)

        def loads(ranks: int, batches: int) -> list[float]:
            measured = job.cost([batches * seconds for seconds in products], steps)
            cuts = shared(job.units, job.cost(counted), ranks)
            return [sum(measured(*item) for unit in units for item in items_of(unit)) for units in cuts]

        ranks = loads(work, share)
        plan, dims, itemsize = job.plan, problem.dims, problem.dtype.itemsize
        sent = sum(
            itemsize * dims[l] * (dims[l] if p < 0 else min(wishes.num_steps, dims[l]))
            for unit in shared(job.units, job.cost(counted), work)[0]
            for l, p in items_of(unit)
        )
        traffic = 2 * (data_shares - 1) / data_shares * sent
        results = 4 * 8 * wishes.num_probes * len(dims) * min(wishes.num_steps, max(dims)) if work > 1 else 0
        kept = share if plan.retain else 1
        return Forecast(
            plan=plan,
            work=work,
            data=data_shares,
            fixed_seconds=fixed,
            seconds=fixed + max(max(ranks), traffic / bandwidth),
            alone_seconds=fixed + sum(loads(1, problem.n_batches)),
            balance=sum(ranks) / len(ranks) / max(ranks) if max(ranks) else 1.0,
            memory_bytes=plan.vector_bytes // work
            + plan.engine_bytes * kept // max(1, problem.n_batches * plan.retain),
            traffic_bytes=traffic + results,
            traffic_seconds=(traffic + results) / bandwidth,
            bandwidth=bandwidth,
        )


def product_seconds(
    problem: Problem, engine: Engine, clock: Callable[[], float], numbers: Sequence[int] | None = None
) -> list[float]:
    """Of one product of each block, or of those numbered, vector and batch, as measured for the first batch."""
    engine.prepare(0)
    found = []
    for number in range(len(problem.dims)) if numbers is None else numbers:
        dim = problem.dims[number]
        rows = torch.ones(engine.rows, dim, dtype=problem.dtype, device=problem.device)

        def product(number: int = number, rows: torch.Tensor = rows) -> None:
            engine.product(number, rows)

        found.append(_median(product, clock, problem) / engine.rows if problem.is_used(number) else 0.0)
    return found


def _step_seconds(problem: Problem, clock: Callable[[], float]) -> list[float]:
    """Of a Lanczos step of one recurrence of each block, beside the product: in proportion to its size."""
    steps = min(4, max(problem.dims))

    def recurrences() -> None:
        # A diagonal operator that no Krylov space of so few steps exhausts.
        batched_slq(lambda v: v * scales, problem.dims, num_probes=1, num_steps=steps, reorthogonalize="none",
                    dtype=problem.dtype, device=problem.device)  # fmt: skip

    scales = torch.linspace(1, 2, sum(problem.dims), dtype=problem.dtype, device=problem.device)
    seconds = _median(recurrences, clock, problem) / steps
    return [seconds * dim / sum(problem.dims) for dim in problem.dims]


def _median(call: Callable[[], None], clock: Callable[[], float], problem: Problem) -> float:
    times = []
    for _ in range(1 + REPEATS):  # the first one warms up
        start = clock()
        call()
        if problem.device.type == "cuda":
            torch.cuda.synchronize(problem.device)
        times.append(clock() - start)
    return statistics.median(times[1:])
