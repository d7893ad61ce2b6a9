"""The rows of the CPU's speed table that measure whole jobs: spectra of all blocks of a network by 10 x 100.

A job is `blockhess.spectrum` and the Jensen-Shannon matrix. Rivals are the paper's procedure and other packages, whose
products go through the paper's recurrence; the matrix is computed by the same function for all. Before timing, the
matrices of a short run with the same probes are compared. Times are extrapolated, see `slices.py`; where computing a
block exactly takes fewer products than Lanczos, ours makes fewer than the rivals. Of GPT2-nano, rivals are measured on
4 of 51 blocks. The default job, without counts, is timed in full, except for GPT2-nano.

"cold" is the first round, "again" the median of the later ones. Imports are excluded. "Everything but products" is
set-up, Lanczos and quadratures with diagonal products, whose time is subtracted, and the Jensen-Shannon matrix.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

import blockhess
from bench.end_to_end.slices import PEERS, PROBES, STEPS, Slice, js_matrix, of_ours, of_rival, ours, plan, probes_of
from bench.harness.machine import Machine
from bench.harness.rows import Row, Rows, Target, faster
from bench.harness.timing import Entry, check, failure_reason, now, time_in_turn
from bench.hvp import cases
from bench.hvp.rivals import Case
from blockhess.hvp import BlockOperator
from blockhess.hvp.operator import Column
from blockhess.models import GPTConfig, ResNetConfig
from blockhess.problem.model_state import fixed_state
from blockhess_ext import batched_slq

# Of the Jensen-Shannon matrix (distances in [0, 1]), due to rounding of float32 products.
LARGEST_JS_ERROR = 1e-3
CHECKED_PROBES, CHECKED_STEPS = 1, 2


@dataclass(frozen=True)
class Job:
    """A case and the part of it that is timed."""

    case: Case  # with all blocks
    steps: int = 1  # of ours and of every rival to time, after set-up
    stride: int = 1  # rivals are measured on every stride-th block, so that all depths and kinds take part
    rounds: int = 2  # in which rivals take turns
    with_default: bool = True  # whether the default job is timed

    @property
    def measured(self) -> Case:
        """The case with the blocks only that rivals are measured on."""
        return dataclasses.replace(self.case, blocks=self.case.blocks[self.stride // 2 :: self.stride])


def compared(case: Case, engine: str) -> dict[str, tuple[float, str]]:
    """Return rival -> error of its Jensen-Shannon matrix in a short run with our probes, and why it is not timed."""
    spectra = ours(case, num_probes=CHECKED_PROBES, num_steps=CHECKED_STEPS, engine=engine)
    probes, expected = probes_of(spectra), spectra.js_matrix(axis="linear")
    found: dict[str, tuple[float, str]] = {}
    counts = dict.fromkeys(case.blocks, 1)
    for name in PEERS:
        try:
            quadratures = of_rival(name, case, counts, probes, CHECKED_STEPS).quadratures
        except Exception as error:  # compare the other rivals
            found[name] = math.nan, failure_reason(error)
            continue
        js_error = float((js_matrix(spectra, quadratures) - expected).abs().max())
        wrong = f"wrong by {js_error:.2g} in the JS matrix, tolerance {LARGEST_JS_ERROR:g}"
        found[name] = js_error, "" if js_error <= LARGEST_JS_ERROR else wrong
    return found


def compare_and_time(
    case: Case,
    engine: str,
    seconds_of: Callable[[str], float],
    rounds: int,
    error: float = 0.0,
    engines: Sequence[str] = (),
) -> dict[str, Entry]:
    """Compare all rivals, then time ours, whose error is given, our `engines` and the correct rivals in turn."""
    entries = {name: Entry(error=error) for name in ("blockhess", *engines)} | {name: Entry() for name in PEERS}
    for name, (js_error, failure) in compared(case, engine).items():
        entries[name].error = None if math.isnan(js_error) else js_error
        entries[name].failure = failure
    timed = {name: partial(seconds_of, name) for name, entry in entries.items() if not entry.failure}
    time_in_turn(entries, timed, rounds)
    for name in timed:
        entries[name].first = entries[name].seconds[0]
    return entries


class Diagonal:
    """An engine with diagonal products that records the time they take."""

    name = "diagonal"

    def __init__(self, dims: list[int]) -> None:
        self._eigenvalues = [torch.linspace(-1.0, 2.0, dim) for dim in dims]
        self.seconds = 0.0

    def prepare(self, index: int) -> None:
        """See `Engine`."""

    def multiply(self, columns: Sequence[Column], share: float) -> Iterator[int]:
        """See `Engine`."""
        begin = now()
        for column in columns:
            column.products.addcmul_(column.vectors, self._eigenvalues[column.number], value=share)
        self.seconds += now() - begin
        yield sum(len(column.vectors) for column in columns)


def without_products(case: Case) -> tuple[float, float]:
    """Return the seconds of Lanczos and quadratures of all blocks without products, and of the JS matrix."""
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
    """Measure a whole job, ours and every rival's, and the share of ours that is not spent in products."""
    job = make(machine)
    case, measured = job.case, job.measured
    dims = {name: p.numel() for name, p in case.parameters.items()}
    with fixed_state(case.model):
        machine.require(5 * 4 * PROBES * sum(dims.values()) + 4 * case.problem.graph_bytes)
        whole = plan(case, num_probes=PROBES, num_steps=STEPS)
        theirs = {name: PROBES * min(STEPS, dim) for name, dim in dims.items()}
        mine = {name: dims[name] if exact else theirs[name] for name, exact in zip(dims, whole.exact)}
        probe = probes_of(ours(measured, num_probes=1, num_steps=1, engine="autograd"))
        loop, comparison = without_products(case)
        slices: list[Slice] = []
        together = max(1, PROBES * (len(dims) - sum(whole.exact)))

        def seconds_of(name: str) -> float:
            if name != "blockhess":
                return of_rival(name, measured, theirs, probe, job.steps).whole + comparison
            slices.append(of_ours(case, mine, together, job.steps))
            return slices[-1].whole + comparison

        entries = compare_and_time(measured, whole.engine, seconds_of, job.rounds)
        default = _default_job(case) if job.with_default else {}
    row, times = Row.of(entries), entries["blockhess"].seconds
    for name in PEERS:
        if row.measured.pop(f"times faster than {name}", None) is not None:
            ratios = [a / b for a, b in zip(entries[name].seconds, times)]
            row.measured[f"times faster than {name}, cold"] = ratios[0]
            row.measured[f"times faster than {name}, again"] = statistics.median(ratios[1:] or ratios)
    for word, found, seconds in (("cold", slices[0], times[0]), ("again", slices[-1], times[-1])):
        row.measured[f"set-up, {word}, s"] = found.setup
        row.measured[f"share of all but products, {word}"] = (found.setup + loop + comparison) / seconds
    if default:
        default["default job: times faster than 10 x 100"] = times[-1] / default["default job, s"]
    row.measured |= default | {
        "Lanczos and quadratures, s": loop,
        "JS matrix, s": comparison,
        "products": sum(mine.values()),
        "products of rivals": sum(theirs.values()),
        "blocks": len(dims),
    }
    row.notes += [
        f"{whole.engine}, {whole.rows} vectors together; {sum(whole.exact)} of {len(dims)} blocks computed exactly",
        f"extrapolated from {job.steps} step(s), of ours after the first, of rivals with one probe and "
        f"{len(measured.blocks)} of {len(dims)} blocks",
    ]
    return row


def _default_job(case: Case) -> dict[str, float]:
    """Return the seconds and the products of a job without counts, with its JS matrix."""
    begin = now()
    spectra = ours(case)
    spectra.js_matrix()
    return {"default job, s": now() - begin, "default job: products": spectra.provenance["hvps"]}


def _small_gpt(**options: int) -> Job:
    config = GPTConfig(context=8, num_layers=1, num_heads=2, width=16)
    return Job(cases.gpt("GPT, tiny", config, 2, 1), **options)


def gpt_small(machine: Machine) -> Job:
    return Job(cases.CASES["gpt"](), steps=2, rounds=3) if machine.size == "full" else _small_gpt()


def resnet(machine: Machine) -> Job:
    if machine.size == "full":
        case = cases.resnet("ResNet18 width 16, 32 images", ResNetConfig(16, (2, 2, 2, 2), 10, 1, "small"), 32, 1)
        return Job(case)
    return Job(cases.resnet("ResNet, tiny", ResNetConfig(4, (1,), 10, 1, "small"), 4, 1))


def gpt_nano(machine: Machine) -> Job:
    """Return a job that measures rivals on every 13th block, coprime to the 8 of a layer, so that kinds vary."""
    if machine.size == "full":
        return Job(cases.gpt("GPT2-nano 10.7M, 1024 tokens", GPTConfig(), 4, 1), stride=13, with_default=False)
    return _small_gpt(stride=3, with_default=False)


def _share(word: str) -> Target:
    quantity = f"share of all but products, {word}"
    return Target(f"everything but products <= 3 % of wall time, {word}", quantity, 0.03, False)


ROWS: Rows = {
    "end to end, 10 x 100, GPT of 0.8M parameters, 512 tokens": (
        partial(job_row, make=gpt_small),
        [
            *(faster(name, 4, ", cold") for name in PEERS[:2]),
            faster("curvlinops", 7, ", cold"),
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
