"""The rows of the CPU's speed table that a user waits for: the spectra of all blocks of a network, by 10 x 100.

Set-up, tracing, compiling, products, Lanczos, quadratures and the Jensen-Shannon matrix, ours and every rival's. Each
is timed on a slice of the job, see slices.py.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import blockhess
from bench.end_to_end.slices import (
    PEERS,
    PROBES,
    STEPS,
    Slice,
    js_matrix,
    of_ours,
    of_rival,
    ours,
    plan,
    probes_of,
)
from bench.harness.machine import Machine
from bench.harness.rows import Row, Target, faster
from bench.harness.timing import Entry, alternate, check, now, told
from bench.hvp import hvp
from bench.hvp.hvp_rivals import Case
from blockhess.hvp import BlockOperator
from blockhess.models import GPTConfig, ResNetConfig
from blockhess.problem.model_state import fixed_state
from blockhess_ext import batched_slq

# Of the Jensen-Shannon matrix (distances, in 0 ... 1), at a sigma of 1 % of the range: rounding of float32 products.
LARGEST_JS_ERROR = 1e-3
CHECKED_PROBES, CHECKED_STEPS = 1, 2


@dataclass(frozen=True)
class Job:
    """A case, and the part of it that is timed.

    Attributes:
        case: with all blocks. stride: of the blocks every stride-th is measured, from all depths and of several kinds.
        steps: of ours and of every rival, beside what is set-up. rounds: in which rivals take turns.
    """

    case: Case
    steps: int = 1
    stride: int = 1
    rounds: int = 2

    @property
    def measured(self) -> Case:
        """The case with the blocks that are measured."""
        return dataclasses.replace(self.case, blocks=self.case.blocks[self.stride // 2 :: self.stride])


def compared(case: Case, engine: str) -> dict[str, tuple[float, str]]:
    """Rival -> the error of its Jensen-Shannon matrix in a short run with our probes, and why it is not timed."""
    spectra = ours(case, num_probes=CHECKED_PROBES, num_steps=CHECKED_STEPS, engine=engine)
    probes, expected = probes_of(spectra), spectra.js_matrix(sigma=spectra.default_sigma())
    found: dict[str, tuple[float, str]] = {}
    counts = dict.fromkeys(case.blocks, 1)
    for name in PEERS:
        try:
            quadratures = of_rival(name, case, counts, probes, CHECKED_STEPS).quadratures
        except Exception as error:  # a peer may fail in any way
            found[name] = math.nan, told(error)
            continue
        error_ = float((js_matrix(spectra, quadratures) - expected).abs().max())
        wrong = f"wrong by {error_:.2g} in the JS matrix, at most {LARGEST_JS_ERROR:g} is right"
        found[name] = error_, "" if error_ <= LARGEST_JS_ERROR else wrong
    return found


def contest(
    case: Case, engine: str, clock: Callable[[str], float], rounds: int, error: float = 0.0
) -> dict[str, Entry]:
    """Ours, whose error is told, and every rival: compared, then those that are right timed in turn by the clock."""
    entries = {"blockhess": Entry(error=error), **{name: Entry() for name in PEERS}}
    for name, (js_error, failure) in compared(case, engine).items():
        entries[name].error = None if math.isnan(js_error) else js_error
        entries[name].failure = failure
    timed = [name for name, entry in entries.items() if not entry.failure]

    def keep(name: str) -> float:
        entries[name].seconds.append(clock(name))
        return entries[name].seconds[-1]

    for _ in alternate({name: partial(keep, name) for name in timed}, rounds):
        pass
    for name in timed:
        entries[name].first = entries[name].seconds[0]
    return entries


class Diagonal:
    """An engine whose products are multiplications, and which counts the time that they take."""

    name, rows = "diagonal", 1

    def __init__(self, dims: list[int]) -> None:
        self._eigenvalues = [torch.linspace(-1.0, 2.0, dim) for dim in dims]
        self.seconds = 0.0

    def prepare(self, index: int) -> None:
        """As in `Engine`."""

    def product(self, number: int, vectors: Tensor) -> Tensor:
        """As in `Engine`."""
        begin = now()
        result = vectors * self._eigenvalues[number]
        self.seconds += now() - begin
        return result


def without_products(case: Case) -> tuple[float, float]:
    """Seconds of 10 probes of 100 steps of all blocks without the products, in full; and of the JS matrix."""
    problem = case.problem
    engine = Diagonal(problem.dims)
    begin = now()
    q = batched_slq(
        BlockOperator(problem, engine), problem.dims, num_probes=PROBES, num_steps=STEPS, reorthogonalize="none"
    )
    loop = now() - begin - engine.seconds
    check("quadratures: weights", float((q.weights.sum(-1) - 1).abs().max()), 1e-9)
    spectra = blockhess.Spectra(problem.infos, q, {})
    begin = now()
    spectra.js_matrix()
    return loop, now() - begin


def job_row(machine: Machine, make: Callable[[Machine], Job]) -> Row:
    """Everything that a user waits for, ours and every rival's; and what of ours is no product."""
    job = make(machine)
    case, measured = job.case, job.measured
    dims = {name: p.numel() for name, p in case.parameters.items()}
    with fixed_state(case.model):
        machine.require(5 * 4 * PROBES * sum(dims.values()) + 4 * case.problem.graph_bytes)
        whole, part = (
            plan(case, num_probes=PROBES, num_steps=STEPS),
            plan(measured, num_probes=1, num_steps=PROBES * STEPS),
        )
        if (part.engine, part.compiled, part.rows) != (whole.engine, whole.compiled, 1):
            raise RuntimeError("the part that is timed is not planned as the whole job is")
        theirs = {name: PROBES * min(STEPS, dim) for name, dim in dims.items()}
        mine = {name: dims[name] if exact else theirs[name] for name, exact in zip(dims, whole.exact)}
        probe = probes_of(ours(measured, num_probes=1, num_steps=1, engine="autograd"))
        loop, comparison = without_products(case)
        slices: list[Slice] = []

        def clock(name: str) -> float:
            if name != "blockhess":
                return of_rival(name, measured, theirs, probe, job.steps).whole + comparison
            slices.append(of_ours(measured, mine, job.steps))
            return slices[-1].whole + comparison

        entries = contest(measured, whole.engine, clock, job.rounds)
    row, times = Row.of(entries), entries["blockhess"].seconds
    for name in PEERS:
        if row.measured.pop(f"times faster than {name}", None) is not None:
            ratios = [a / b for a, b in zip(entries[name].seconds, times)]
            row.measured[f"times faster than {name}, cold"] = ratios[0]
            row.measured[f"times faster than {name}, again"] = statistics.median(ratios[1:] or ratios)
    for word, found, seconds in (("cold", slices[0], times[0]), ("again", slices[-1], times[-1])):
        row.measured[f"set-up, {word}, s"] = found.setup
        row.measured[f"share of all but products, {word}"] = (found.setup + loop + comparison) / seconds
    row.measured |= {
        "Lanczos and quadratures, s": loop,
        "JS matrix, s": comparison,
        "products": sum(mine.values()),
        "products of rivals": sum(theirs.values()),
        "blocks": len(dims),
    }
    row.notes += [
        f"{whole.engine}, {'compiled' if whole.compiled else 'nothing to compile'}; "
        f"{sum(whole.exact)} of {len(dims)} blocks written out",
        f"extrapolated from {len(measured.blocks)} of {len(dims)} blocks, one probe, {job.steps} step(s) after the "
        f"first of ours and {job.steps} of rivals",
    ]
    return row


def _small_gpt(**options: int) -> Job:
    config = GPTConfig(context=8, num_layers=1, num_heads=2, width=16)
    return Job(hvp.gpt("GPT, tiny", config, 2, 1), **options)


def gpt_small(machine: Machine) -> Job:
    return Job(hvp.CASES["gpt"](), steps=2, rounds=3) if machine.size == "full" else _small_gpt()


def resnet(machine: Machine) -> Job:
    if machine.size == "full":
        case = hvp.resnet("ResNet18 width 16, 32 images", ResNetConfig(16, (2, 2, 2, 2), 10, 1, "small"), 32, 1)
        return Job(case)
    return Job(hvp.resnet("ResNet, tiny", ResNetConfig(4, (1,), 10, 1, "small"), 4, 1))


def gpt_nano(machine: Machine) -> Job:
    """Every 13th block: no factor in common with the 8 of a layer, so that depth and kind vary."""
    if machine.size == "full":
        return Job(hvp.gpt("GPT2-nano 10.7M, 1024 tokens", GPTConfig(), 4, 1), stride=13)
    return _small_gpt(stride=3)


def _share(word: str) -> Target:
    quantity = f"share of all but products, {word}"
    return Target(f"everything but products <= 3 % of wall time, {word}", quantity, 0.03, False)


ROWS: dict[str, tuple[Callable[[Machine], Row], list[Target]]] = {
    "end to end, 10 x 100, GPT of 0.8M parameters, 512 tokens": (
        partial(job_row, make=gpt_small),
        [
            *(faster(name, 1.6, ", cold") for name in PEERS[:2]),
            faster("curvlinops", 3.2, ", cold"),
            *(faster(name, 2.8, ", again") for name in PEERS[:2]),
            faster("curvlinops", 5.5, ", again"),
        ],
    ),
    "end to end, 10 x 100, ResNet18 of width 16, 32 images": (partial(job_row, make=resnet), []),
    "end to end, 10 x 100, GPT2-nano (10.7M), 1,024 tokens": (
        partial(job_row, make=gpt_nano),
        [*(faster(PEERS[0], 2, f", {word}") for word in ("cold", "again")), _share("cold"), _share("again")],
    ),
}
