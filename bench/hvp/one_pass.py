"""The rows of the CPU's speed table that measure the engine "traced": one pass for products of all blocks and probes.

- Operator calls are counted by a TorchDispatchMode in a later step of 10 probes, of all blocks that are not computed
  exactly. They do not depend on the number of tokens, so 32 tokens are taken, with the rows planned for 1,024.
- Set-up is tracing, constants, and what the first step takes longer than a later one, of all blocks and one probe.
- Products are timed next to those of the last commit with a linear program for every block, in this process.
- The share of matrix products is the time of their kernels, by torch.profiler, in that of a step without profiler.
- Peak memory is that of a fresh process that runs a job of two steps with the engine "traced".
- Short jobs are run in full by all rivals.
- Bare products are those of a later step of the engine that the job takes.
"""

from __future__ import annotations

import importlib
import math
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from bench.end_to_end import fixed_budget
from bench.end_to_end.slices import PEERS, PROBES, STEPS, arguments, of_rival, ours, plan, probes_of
from bench.harness.machine import Machine
from bench.harness.memory import growth, in_fresh_process
from bench.harness.rows import Row, Rows, Target, faster
from bench.harness.timing import Entry, Rival, check, compare_and_time, difference, now, time_in_turn, timed
from bench.hvp.cases import QUICK, case_of
from bench.hvp.products import LARGEST_ERROR
from bench.hvp.rivals import Case
from blockhess.estimate import job_arguments
from blockhess.hvp import AutogradEngine, BlockOperator, Engine, TracedEngine
from blockhess.problem.model_state import fixed_state
from blockhess.problem.prepare import prepared_problem
from blockhess.problem.problem import Problem
from blockhess.run.costs import Counted
from blockhess.run.job import Job

PER_BLOCK = "53306e3"  # the last commit with a linear program for every block


class Calls(Counted):
    """Counts operator calls, views and allocations included, besides the work of operations."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return super().__torch_dispatch__(func, types, args, kwargs)


def whole(key: str, size: str) -> Case:
    """Return a case with all blocks."""
    case = case_of(key, size)
    return Case(case.name, case.model, case.criterion, case.batch, tuple(case.parameters))


def planned_rows(case: Case, probes: int) -> int:
    """Return the number of vectors that a job multiplies together."""
    return plan(case, num_probes=probes, num_steps=STEPS, engine="traced").rows


def vectors(probes: int, dims: Sequence[int]) -> Tensor:
    """Return random vectors of all blocks."""
    return torch.randn(probes, sum(dims), generator=torch.Generator().manual_seed(0))


def later_step(
    problem: Problem, engine: Engine, probes: int, numbers: Sequence[int] | None = None
) -> Callable[[], Tensor]:
    """Return a step of products with random vectors, after the first one."""
    operator = BlockOperator(problem, engine, numbers)
    v = vectors(probes, operator.dims)
    operator(v)
    return lambda: operator(v)


def calls(machine: Machine) -> Row:
    """Count operator calls of a step of GPT2-nano."""
    full, short = (whole(key, machine.size) for key in ("nano", "nano, 32 tokens"))
    exact = plan(full, num_probes=PROBES, num_steps=STEPS).exact
    numbers, rows = [l for l, is_exact in enumerate(exact) if not is_exact], planned_rows(full, PROBES)
    row, expected = Row(0.0, notes=[f"{len(numbers)} blocks x {PROBES} probes; {rows} rows planned"]), None
    with fixed_state(short.model):
        engines: dict[str, Callable[[Problem], Engine]] = {
            "autograd": AutogradEngine,
            "all rows together": partial(TracedEngine, rows=PROBES * len(numbers)),
            "planned rows": partial(TracedEngine, rows=rows),
        }
        for name, make in engines.items():
            step = later_step(short.problem, make(short.problem), PROBES, numbers)
            with Calls() as counted:
                found = step()
            row.measured[f"kernels, {name}"] = counted.work.launches
            row.measured[f"calls with views, {name}"] = counted.count
            expected = found if expected is None else expected
            row.error = max(row.error, check(f"products, {name}", difference(found, expected), LARGEST_ERROR))
    return row


def flops(machine: Machine) -> Row:
    """Count the FLOPs of products over those of a forward pass."""
    case, row = whole("gpt", machine.size), Row(0.0)
    n = PROBES * len(case.blocks)
    for name, rows in (("planned rows", planned_rows(case, PROBES)), ("all rows together", n)):
        with fixed_state(case.model):
            step = later_step(case.problem, TracedEngine(case.problem, rows=rows), PROBES)
            with Counted() as counted:
                step()
        row.measured[f"forward passes, {name}"] = counted.work.flops / n / case.problem.forward_flops
    return row


def setup(machine: Machine, key: str) -> Row:
    """Measure the time before a later step that is not spent in products."""
    tiny = QUICK[key]()
    with fixed_state(tiny.model):
        later_step(tiny.problem, TracedEngine(tiny.problem), 1)  # loads libraries
    case = whole(key, machine.size)
    rows = planned_rows(case, 1)
    with fixed_state(case.model):
        problem, begin = case.problem, now()
        engine = TracedEngine(problem, rows=rows)
        traced = now()
        step = later_step(problem, engine, 1)
        made = now()
        later = statistics.fmean(timed(step) for _ in range(2))
    measured = {"set-up, s": made - begin - later, "of that tracing, s": traced - begin, "a later step, s": later}
    return Row(0.0, measured, notes=[f"{len(problem.dims)} blocks, {rows} rows together"])


@contextmanager
def package_of(commit: str) -> Iterator[str]:
    """Make this package at a commit importable; yield its name. It shares the extension."""
    name = f"blockhess_{commit}"
    with tempfile.TemporaryDirectory() as folder:
        archive = ["git", "-C", str(Path(__file__).parents[2]), "archive", f"{commit}:python"]
        found = subprocess.run(archive, capture_output=True)
        if found.returncode:
            raise LookupError(f"absent (commit {commit} is not in the history of this checkout)")
        subprocess.run(["tar", "-x", "-C", folder], check=True, input=found.stdout)
        for path in Path(folder).rglob("*.py"):
            path.write_text(re.sub(r"\bblockhess(?!_ext)", name, path.read_text()))
        Path(folder, "blockhess").rename(Path(folder, name))
        sys.path.insert(0, folder)
        try:
            yield name
        finally:
            sys.path.remove(folder)


def operator_of(package: str, case: Case, rows: int) -> Callable[[Tensor], Tensor]:
    """Return the operator of all blocks by the engine "traced" of a package."""
    hvp, problem, losses, blocks = (
        importlib.import_module(f"{package}.{module}")
        for module in ("hvp", "problem.problem", "problem.losses", "problem.blocks")
    )
    loss, found = losses.make_loss(case.criterion), blocks.partition(case.model).blocks
    made = problem.Problem(case.model, loss, [case.batch], found)
    return hvp.BlockOperator(made, hvp.TracedEngine(made, rows=rows))  # type: ignore[no-any-return]


def step_time(machine: Machine, key: str, probes: int) -> Row:
    """Time products next to those of one linear program for every block, which multiplied vectors one by one."""
    try:
        with package_of(PER_BLOCK) as package:
            return _step_time(machine, key, probes, package)
    except LookupError as error:
        return Row(0.0, {}, notes=[str(error)])


def _step_time(machine: Machine, key: str, probes: int, package: str) -> Row:
    case, other = whole(key, machine.size), "a program for every block"
    rows = planned_rows(case, probes)
    with fixed_state(case.model):
        v = vectors(probes, case.problem.dims)
        operators = {"blockhess": operator_of("blockhess", case, rows), other: operator_of(package, case, 1)}
        expected, scale = operators[other](v), 1 / (probes * len(case.blocks))
        rivals = {
            name: Rival(partial(partial, operator, v), partial(difference, b=expected), LARGEST_ERROR, scale)
            for name, operator in operators.items()
        }
        entries = compare_and_time(rivals, rounds=machine.pick(7, 2, 2), seconds=math.inf)
    row = Row.of(entries)
    row.measured[f"time / that of {other}"] = entries["blockhess"].median / entries[other].median
    row.notes.append(f"{probes} probes, {rows} rows together")
    return row


def matrix_share(machine: Machine) -> Row:
    """Measure the share of matrix products in the time of a step."""
    case = whole("fused", machine.size)
    rows = planned_rows(case, 3)
    names = {f"aten::{name}" for name in ("mm", "addmm", "bmm", "baddbmm")}
    shares = []
    with fixed_state(case.model):
        step = later_step(case.problem, TracedEngine(case.problem, rows=rows), 3)
        for _ in range(5):
            with profile(activities=[ProfilerActivity.CPU]) as found:
                seconds = timed(step)
            products = sum(e.self_cpu_time_total for e in found.key_averages() if e.key in names) / 1e6
            shares.append(products / seconds)
    return Row(0.0, {"share of matrix products": statistics.median(shares)}, notes=[f"{rows} rows together"])


def _memory(key: str, size: str, probes: int) -> tuple[int, int]:
    torch.set_num_threads(1)
    options: dict[str, Any] = {"num_probes": probes, "num_steps": 2, "engine": "traced"}
    ours(whole(key, "tiny"), **options)  # loads libraries
    case = whole(key, size)
    return growth(lambda: ours(case, **options)), plan(case, **options).peak_bytes


def memory(machine: Machine, key: str, probes: int) -> Row:
    """Compare the peak memory of a job with its plan."""
    grown, planned = in_fresh_process(_memory, key, machine.size, probes)
    measured = {"measured, MiB": grown / 2**20, "planned, MiB": planned / 2**20}
    return Row(0.0, {"share beside the plan": abs(grown / planned - 1), **measured}, notes=[f"{probes} probes"])


def short_job(machine: Machine, key: str) -> Row:
    """Time whole jobs of 3 probes x 15 steps by all engines and rivals."""
    case, options = whole(key, machine.size), {"num_probes": 3, "num_steps": 15}
    counts = {name: 3 * min(15, p.numel()) for name, p in case.parameters.items()}
    with fixed_state(case.model):
        probes = probes_of(ours(case, num_probes=3, num_steps=1, engine="autograd"))

        def seconds_of(name: str) -> float:
            if name in PEERS:
                return of_rival(name, case, counts, probes, 15).whole
            return timed(lambda: ours(case, engine="auto" if name == "blockhess" else name, **options))

        chosen, rounds = plan(case, **options).engine, machine.pick(3, 1, 1)
        entries = fixed_budget.compare_and_time(case, "autograd", seconds_of, rounds, engines=("autograd", "traced"))
    row = Row.of(entries)
    row.notes.append(f"{len(counts)} blocks; auto takes {chosen}")
    names = [f"times faster than {name}" for name in PEERS[1:]]
    if packages := [row.measured[name] for name in names if name in row.measured]:
        row.measured["times faster than the fastest package"] = min(packages)
    return row


def overhead(machine: Machine) -> Row:
    """Time a job of 27 products, of 9 blocks in 3 steps, next to 27 bare products."""
    case, options = case_of("gpt-2", machine.size), {"num_probes": 1, "num_steps": 3}
    given, checked = job_arguments(**arguments(case, options))
    with prepared_problem(**given) as (problem, *_):
        job = Job(problem, checked)
        step = later_step(problem, job.make_engine(), 1)
        entries = {"blockhess": Entry(error=0.0), "its products": Entry(error=0.0)}
        seconds_of = {
            "blockhess": lambda: timed(lambda: ours(case, **options)),
            "its products": lambda: sum(timed(step) for _ in range(3)),
        }
        time_in_turn(entries, seconds_of, machine.pick(3, 1, 1))
    row = Row.of(entries)
    row.measured["time / that of its products"] = 1 / row.measured["times faster than its products"]
    row.notes.append(f"{3 * len(case.blocks)} products by {job.plan.engine}; {len(job.plan.checked)} blocks checked")
    return row


def _rows(
    what: str, measure: Callable[..., Row], text: str, quantity: str, of: dict[str, tuple[float, dict[str, Any]]]
) -> Rows:
    """Return rows of some cases, with their largest values and arguments."""
    names = {"gpt": "GPT 0.8M", "nano": "GPT2-nano", "resnet": "ResNet18", "vit": "ViT-small", "gpt-2": "GPT-2 124M"}
    return {
        f"one pass: {what}, {names[key]}": (
            partial(measure, key=key, **given),
            [Target(text.format(most), quantity, most, False)],
        )
        for key, (most, given) in of.items()
    }


_PROBES = {"gpt": 10, "nano": 2, "resnet": 4, "vit": 1, "gpt-2": 1}
ROWS: Rows = {
    "one pass: operator calls of a Lanczos step, GPT2-nano, 10 probes": (
        calls,
        [Target("<= 2,000 kernels, all rows together", "kernels, all rows together", 2000, False)],
    ),
    "one pass: FLOPs of a product, GPT 0.8M": (
        flops,
        [Target("<= 1.27 forward passes", "forward passes, planned rows", 1.27, False)],
    ),
    "one pass: share of matrix products, GPT 0.4M": (
        matrix_share,
        [Target(">= 80 % of the time", "share of matrix products", 0.8, True)],
    ),
    **_rows("set-up", setup, "<= {:g} s", "set-up, s", {"gpt": (2, {}), "nano": (4, {}), "gpt-2": (20, {})}),
    **_rows(
        "a product",
        step_time,
        "<= {:g} x a program for every block",
        "time / that of a program for every block",
        {key: (most, {"probes": _PROBES[key]}) for key, most in (("gpt", 0.85), ("resnet", 0.95), ("nano", 0.95))},
    ),
    **_rows(
        "peak memory",
        memory,
        "within 20 % of the plan",
        "share beside the plan",
        {key: (0.2, {"probes": probes}) for key, probes in _PROBES.items()},
    ),
    "one pass: short job, GPT 0.4M": (partial(short_job, key="fused"), [faster(PEERS[0], 2.5)]),
    "one pass: short job, Transformers' GPT-2 of 0.4M": (
        partial(short_job, key="hf"),
        [faster("the fastest package", 1.5)],
    ),
    "one pass: 27 products, GPT-2 124M": (
        overhead,
        [Target("<= 1.5 x its products", "time / that of its products", 1.5, False)],
    ),
}
