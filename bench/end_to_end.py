"""The rows of the CPU's speed table that a user waits for: the spectra of all blocks of a network.

Nobody has the hours that 10 probes of 100 steps take with every rival, so a slice of the job is timed: set-up, and
some of the products with everything that goes with them. The whole is set-up and the number of products times the mean
of the slice. Ours is `blockhess.spectrum` told to do the whole job, and stopped.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import blockhess
from bench import hvp, paper_procedure
from bench.hvp_rivals import RIVALS, Case, Product
from bench.machine import Machine
from bench.paper_procedure import Quadratures
from bench.rows import Row, Target
from bench.timing import Entry, alternate, check, now, told
from blockhess import estimate
from blockhess.model_state import fixed_state
from blockhess.models import GPTConfig, ResNetConfig
from blockhess_ext import batched_slq

PROBES, STEPS, SEED = 10, 100, 0
PEERS = ("the paper's procedure", "hessian-eigenthings", "curvlinops", "PyHessian")
# Of the Jensen-Shannon matrix (distances, in 0 ... 1), at a sigma of 1 % of the range: rounding of float32 products.
LARGEST_JS_ERROR = 1e-3
CHECKED_PROBES, CHECKED_STEPS = 1, 2


# --- everybody's spectra --------------------------------------------------------------------------------------


class Stopped(Exception):
    """A job was stopped, as was asked for."""


@contextmanager
def on_products(call: Callable[[], object]) -> Iterator[None]:
    """`blockhess.spectrum` calls `call` after every product."""

    @contextmanager
    def bar(*_: object) -> Iterator[Callable[[], object]]:
        yield call

    with mock.patch.object(estimate, "progress_bar", bar):
        yield


def ours(case: Case, **options: Any) -> blockhess.Spectra:
    """The spectra of the blocks of a case."""
    wanted = {name: [name] for name in case.blocks}
    return blockhess.spectrum(
        case.model,
        case.batch,
        case.criterion,
        blocks=wanted,
        seed=SEED,
        reorthogonalize="none",
        progress=False,
        **options,
    )


def probes_of(spectra: blockhess.Spectra) -> list[dict[str, Tensor]]:
    """The random vectors that a result was made with: the first input of any operator of these dims and ids."""
    q, seen = spectra.quadrature, []

    def operator(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return v

    batched_slq(operator, q.dims, num_probes=q.num_probes, num_steps=1, seed=q.seed, block_ids=q.block_ids)
    return [dict(zip(spectra.names, probe.split(q.dims))) for probe in seen[0]]


@dataclass
class Slice:
    """What a part of a job took, in seconds.

    Attributes:
        setup: before the first product, of all that was prepared. work: of `products` products and what goes with them.
    """

    setup: float
    work: float
    products: int
    quadratures: Quadratures = field(default_factory=dict)

    def whole(self, products: int) -> float:
        """Seconds of a job of so many products."""
        return self.setup + self.work * products / self.products


def theirs(name: str, case: Case, probes: Sequence[dict[str, Tensor]], num_steps: int) -> Slice:
    """A rival's products in the paper's recurrence, block after block, as its users must.

    What a rival does once a step for all blocks is counted for the blocks that are measured.
    """
    begin = now()
    rival = RIVALS[name](case)
    found = Slice(now() - begin, 0.0, 0)
    n_blocks, shared = len(case.parameters), 0.0
    for block in case.blocks:
        begin = now()
        product = rival.of_block(block)
        found.setup += (now() - begin) * n_blocks / len(case.blocks)

        def products(vectors: dict[str, Tensor], product: Product = product) -> dict[str, Tensor]:
            found.products += 1
            return {name: product(v).reshape(-1).double() for name, v in vectors.items()}

        begin = now()
        found.quadratures |= paper_procedure.lanczos(products, [{block: probe[block]} for probe in probes], num_steps)
        found.work += now() - begin
    for _ in range(len(probes) * num_steps):
        begin = now()
        rival.step()
        shared += now() - begin
    found.work += shared * len(case.blocks) / n_blocks
    return found


def js_matrix(spectra: blockhess.Spectra, quadratures: Quadratures | None = None) -> Tensor:
    """Of the spectra, or of other quadratures of the same probes, at the sigma that the spectra ask for."""
    sigma = spectra.default_sigma()
    if quadratures is not None:
        q = spectra.quadrature
        nodes, weights = torch.zeros_like(q.nodes), torch.zeros_like(q.weights)
        for l, name in enumerate(spectra.names):
            for p, (x, w) in enumerate(quadratures[name]):
                nodes[p, l], nodes[p, l, : len(x)] = float(x[-1]), torch.from_numpy(x)
                weights[p, l, : len(w)] = torch.from_numpy(w)
        q = dataclasses.replace(q, nodes=nodes, weights=weights)
        spectra = blockhess.Spectra(spectra.blocks, q, spectra.provenance)
    return spectra.js_matrix(sigma=sigma)


# --- the rows -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """A case, and the part of it that is timed.

    Attributes:
        case: with all blocks. probes, steps: that ours is told to do; as many products as of 10 probes and 100 steps.
        ours: products of ours that are timed. theirs: steps of one probe of each rival. blocks: of rivals, each
            stride-th.
    """

    case: Case
    probes: int
    steps: int
    ours: int
    theirs: int
    stride: int = 1
    rounds: int = 2


def first_products(job: Job) -> tuple[Slice, int]:
    """Ours, stopped, and the products of the whole job."""
    ends: list[float] = []

    def count() -> None:
        ends.append(now())
        if len(ends) > job.ours:
            raise Stopped

    begin = now()
    try:
        with on_products(count):
            ours(job.case, num_probes=job.probes, num_steps=job.steps)
    except Stopped:
        pass
    work = ends[-1] - ends[0]
    products = len(ends) - 1
    return Slice(ends[0] - begin - work / products, work, products), products


def compared(job: Job, measured: Case, engine: str) -> dict[str, tuple[float, str]]:
    """Rival -> the error of its Jensen-Shannon matrix and why it has none."""
    spectra = ours(measured, num_probes=CHECKED_PROBES, num_steps=CHECKED_STEPS, engine=engine)
    probes, expected = probes_of(spectra), js_matrix(spectra)
    found: dict[str, tuple[float, str]] = {}
    for name in PEERS:
        try:
            slice_ = theirs(name, measured, probes, CHECKED_STEPS)
        except Exception as error:  # a peer may fail in any way
            found[name] = math.nan, told(error)
            continue
        found[name] = float((js_matrix(spectra, slice_.quadratures) - expected).abs().max()), ""
    return found


def _take_turns(entries: dict[str, Entry], clock: Callable[[str], float], rounds: int) -> None:
    """Let the clock fill the times of those that are right."""
    timed = [name for name, entry in entries.items() if not entry.failure]
    for _ in alternate({name: partial(clock, name) for name in timed}, rounds):
        pass
    for name in timed:
        entries[name].first = entries[name].seconds[0]


def job_row(machine: Machine, make: Callable[[Machine], Job]) -> Row:
    """Everything that a user waits for, ours and every rival's."""
    job = make(machine)
    case = job.case
    measured = dataclasses.replace(case, blocks=case.blocks[job.stride // 2 :: job.stride])
    with fixed_state(case.model):
        dims = {name: p.numel() for name, p in case.parameters.items()}
        plan = blockhess.plan(
            case.model, case.batch, case.criterion, num_probes=PROBES, num_steps=STEPS, reorthogonalize="none"
        )
        entries = {"blockhess": Entry(error=0.0), **{name: Entry() for name in PEERS}}
        for name, (error, failure) in compared(job, measured, plan.engine).items():
            entries[name].error = None if failure else error
            wrong = f"wrong by {error:.2g} in the JS matrix, at most {LARGEST_JS_ERROR:g} is right"
            entries[name].failure = failure or ("" if error <= LARGEST_JS_ERROR else wrong)
        unit = ours(measured, num_probes=1, num_steps=1, engine="autograd")
        probe = probes_of(unit)
        total = PROBES * sum(min(STEPS, dim) for dim in dims.values())

        def clock(name: str) -> float:
            if name == "blockhess":
                seconds = first_products(job)[0].whole(plan.hvps)
            else:
                seconds = theirs(name, measured, probe, job.theirs).whole(total)
            entries[name].seconds.append(seconds)
            return seconds

        _take_turns(entries, clock, job.rounds)
    row = Row.of(entries)
    for name in PEERS:
        if not entries[name].failure:
            cold, *again = [a / b for a, b in zip(entries[name].seconds, entries["blockhess"].seconds)]
            row.measured[f"times faster than {name}, cold"] = cold
            row.measured[f"times faster than {name}, again"] = statistics.median(again or [cold])
            del row.measured[f"times faster than {name}"]
    row.measured |= {"products": plan.hvps, "products of rivals": total, "blocks": len(dims)}
    row.notes += [
        f"{plan.engine}{', compiled' if plan.compiled else ', nothing to compile'}; "
        f"{sum(plan.exact)} of {len(dims)} blocks written out",
        f"extrapolated from {job.ours:,} of {plan.hvps:,} products, and of rivals from one probe, {job.theirs} steps, "
        f"{len(measured.blocks)} blocks of {total:,} products",
    ]
    return row


def _small_gpt() -> Case:
    return hvp.gpt("GPT, tiny", GPTConfig(context=8, num_layers=1, num_heads=2, width=16), 2, 1)


def _gpt(machine: Machine) -> Job:
    if machine.size == "full":
        return Job(hvp.CASES["gpt"](), PROBES, STEPS, ours=260, theirs=1)
    return Job(_small_gpt(), PROBES, STEPS, ours=20, theirs=1, rounds=2)


def _resnet(machine: Machine) -> Job:
    if machine.size == "full":
        case = hvp.resnet("ResNet18 width 16, 32 images", ResNetConfig(16, (2, 2, 2, 2), 10, 1, "small"), 32, 1)
        return Job(case, PROBES, STEPS, ours=220, theirs=1)
    case = hvp.resnet("ResNet, tiny", ResNetConfig(4, (1,), 10, 1, "small"), 4, 1)
    return Job(case, PROBES, STEPS, ours=20, theirs=1, rounds=2)


def _nano(machine: Machine) -> Job:
    if machine.size == "full":
        case = hvp.gpt("GPT2-nano 10.7M, 1024 tokens", GPTConfig(), 4, 1)
        return Job(case, 1, PROBES * STEPS, ours=len(case.blocks), theirs=1, stride=13, rounds=2)
    return Job(_small_gpt(), 1, PROBES * STEPS, ours=20, theirs=1, stride=3, rounds=1)


def everything_else(machine: Machine) -> Row:
    """What 10 probes of 100 steps take without the products, in full; and the JS matrix; GPT2-nano's layout."""
    job = _nano(machine)
    sample, products = first_products(job)
    dims = [p.numel() for p in job.case.parameters.values()]
    machine.require(5 * 4 * PROBES * sum(dims))
    eigenvalues = torch.linspace(-1.0, 2.0, sum(dims))
    spent = 0.0

    def operator(v: Tensor) -> Tensor:
        nonlocal spent
        begin = now()
        w = v * eigenvalues
        spent += now() - begin
        return w

    begin = now()
    q = batched_slq(operator, dims, num_probes=PROBES, num_steps=STEPS, reorthogonalize="none")
    loop = now() - begin - spent
    check("quadratures: weights", float((q.weights.sum(-1) - 1).abs().max()), 1e-9)
    spectra = blockhess.Spectra(
        [blockhess.BlockInfo(name, tuple(p.shape), p.numel(), (name,)) for name, p in job.case.parameters.items()],
        q,
        {},
    )
    begin = now()
    spectra.js_matrix()
    comparison = now() - begin
    plan = blockhess.plan(
        job.case.model, job.case.batch, job.case.criterion, num_probes=PROBES, num_steps=STEPS, reorthogonalize="none"
    )
    whole = sample.whole(plan.hvps) + loop + comparison
    row = Row(0.0)
    row.measured = {
        "set-up, s": sample.setup,
        "all but products of 10 x 100, s": loop,
        "JS matrix, s": comparison,
        "products, s (extrapolated)": whole - sample.setup - loop - comparison,
        "share of all but products": (sample.setup + loop + comparison) / whole,
    }
    row.notes.append(f"products extrapolated from {products} of {plan.hvps:,}; everything else measured in full")
    return row


def large_blocks(machine: Machine) -> Case:
    """A GPT of one layer whose parameters are nearly all in blocks of 1e5 and more; 32 tokens."""
    width, context = machine.pick(320, 32, 16), machine.pick(32, 8, 8)
    config = GPTConfig(context=context, num_layers=1, num_heads=4, width=width)
    return hvp.gpt("GPT of one layer, width 320", config, 1, 1)


TOLERANCES = (0.05, 0.04, 0.03, 0.02, 0.01)


def adaptive(machine: Machine) -> Row:
    """`spectrum(tol=)` with the largest tolerance whose JS matrix is as near the truth as that of 10 x 100.

    The truth is a run of more probes and steps. Rivals take 10 probes of 100 steps, a slice of which is timed; what
    they would find is what ours finds with the same probes, as the other rows have shown.
    """
    case = large_blocks(machine)
    probes, steps = machine.pick(PROBES, 3, 2), machine.pick(STEPS, 10, 5)
    with fixed_state(case.model):
        truth = ours(case, num_probes=2 * probes, num_steps=3 * steps // 2, engine="traced").js_matrix
        sigma_run = ours(case, num_probes=probes, num_steps=steps, engine="traced")
        sigma = sigma_run.default_sigma()
        expected = truth(sigma=sigma)

        def error(spectra: blockhess.Spectra) -> float:
            return float((spectra.js_matrix(sigma=sigma) - expected).abs().max())

        allowed = error(sigma_run)
        for tol in TOLERANCES:
            found = ours(case, num_probes=20, num_steps=2 * steps, tol=tol)
            if error(found) <= allowed:
                break
        entries = {"blockhess": Entry(error=error(found)), **{name: Entry(error=allowed) for name in PEERS}}
        for name, (js_error, failure) in compared(Job(case, 1, 1, 1, 1), case, "traced").items():
            entries[name].failure = failure or ("" if js_error <= LARGEST_JS_ERROR else f"wrong by {js_error:.2g}")
        probe = probes_of(ours(case, num_probes=1, num_steps=1, engine="autograd"))
        total = probes * sum(min(steps, p.numel()) for p in case.parameters.values())

        def clock(name: str) -> float:
            if name == "blockhess":
                begin = now()
                ours(case, num_probes=20, num_steps=2 * steps, tol=tol)
                seconds = now() - begin
            else:
                seconds = theirs(name, case, probe, 5).whole(total)
            entries[name].seconds.append(seconds)
            return seconds

        _take_turns(entries, clock, 3)
    row = Row.of(entries)
    row.measured |= {
        "tol": tol,
        "error over that of 10 x 100": error(found) / allowed,
        "products": found.provenance["hvps"],
        "products of rivals": total,
    }
    row.notes += [
        f"error: of the JS matrix at sigma {sigma:.3g} beside {2 * probes} probes of {3 * steps // 2} steps",
        f"rivals extrapolated from one probe and 5 steps of all blocks; {probes} x {steps}",
    ]
    return row


def _faster(rival: str, times: float, when: str = "") -> Target:
    return Target(f">= {times:g} x {rival}{when}", f"times faster than {rival}{when}", times, True)


ROWS: dict[str, tuple[Callable[[Machine], Row], list[Target]]] = {
    "end to end, 10 x 100, GPT of 0.8M parameters, 512 tokens": (
        partial(job_row, make=_gpt),
        [
            *(_faster(name, 1.6, ", cold") for name in PEERS[:2]),
            _faster("curvlinops", 3.2, ", cold"),
            *(_faster(name, 2.8, ", again") for name in PEERS[:2]),
            _faster("curvlinops", 5.5, ", again"),
        ],
    ),
    "end to end, 10 x 100, ResNet18 of width 16, 32 images": (partial(job_row, make=_resnet), []),
    "end to end, 10 x 100, GPT2-nano (10.7M), 1,024 tokens": (
        partial(job_row, make=_nano),
        [_faster(PEERS[0], 2, ", again")],
    ),
    "everything but products, end to end, GPT2-nano, no reorthogonalisation": (
        everything_else,
        [Target("<= 3 % of wall time", "share of all but products", 0.03, False)],
    ),
    "end to end to the same accuracy (adaptive), nearly all in blocks of 1e5 elements": (
        adaptive,
        [
            *(_faster(name, 8) for name in PEERS[:3]),
            Target("JS matrix as near the truth as by 10 x 100", "error over that of 10 x 100", 1, False),
        ],
    ),
}
