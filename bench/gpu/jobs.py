"""The rows of the GPU's speed table that are jobs of `spectrum`: networks, precisions, memory, interruption.

The time of a step is taken by events between steps of `batched_slq`, without the steps that load kernels and capture
graphs. FLOPs are counted in one product of all blocks and probes, memory is torch's peak beyond model and data.
"""

from __future__ import annotations

import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import blockhess
import blockhess_ext
from bench.gpu import moments, networks
from bench.gpu.networks import Network
from bench.harness.machine import Machine
from bench.harness.memory import growth
from bench.harness.rows import Row, Rows, Target
from bench.harness.timing import Mark, Times, check, synchronize
from blockhess.hvp import TracedEngine
from blockhess.run.costs import Counted, Work
from blockhess.run.storage.signals import Interrupted
from blockhess.spectra import Spectra

# Largest error of float32 products, and of those with operands of 10 bits.
TOLERANCE = {"highest": 1e-3, "high": 3e-2}
LIMIT = {"highest": "gemm float32", "high": "gemm TF32"}
# Steps that are not timed: two load kernels, and two are captured.
UNTIMED = {False: 2, True: 4}


@dataclass
class Observation:
    """The calls of `batched_slq` in a job that came to their end.

    Attributes:
        passes: times of the steps of every call.
        work: of one product in every call.
    """

    passes: list[list[Mark]] = field(default_factory=list)
    work: list[Work] = field(default_factory=list)

    def step(self, untimed: int) -> Times:
        """Return the times of a step, added over the calls."""
        seconds = [[a.until(b) for a, b in pairwise(marks)] for marks in self.passes]
        return Times([sum(each) for each in zip(*(s[min(untimed, len(s) - 1) :] for s in seconds))])

    def flops(self) -> float:
        return sum(work.flops for work in self.work)

    def launches(self) -> float:
        return sum(work.launches for work in self.work)


@contextmanager
def observed(
    device: torch.device,
    graph: bool = True,
    on_step: Callable[[int], None] = lambda step: None,
    before: Callable[[], None] = lambda: None,
) -> Iterator[Observation]:
    """Record the steps of jobs in this context.

    Args:
        device: of the jobs.
        graph: whether steps may be replayed from CUDA graphs.
        on_step: called after every step.
        before: called before the first product of every call of `batched_slq`, after all checks.
    """
    found, original = Observation(), blockhess_ext.batched_slq

    def batched_slq(hvp: Any, dims: Any, **options: Any) -> Any:
        before()
        v = torch.randn(options["num_probes"], sum(dims), dtype=options["dtype"], device=device)
        with Counted() as counted:
            hvp(v)
        del v
        marks = [Mark(device)]

        def each(step: int, running: int) -> None:
            marks.append(Mark(device))
            on_step(step)

        options["cuda_graph"] = options["cuda_graph"] and graph
        result = original(hvp, dims, on_step=each, **options)
        found.passes.append(marks)  # not if memory ran out: the job then cuts the call
        found.work.append(counted.work)
        return result

    blockhess_ext.batched_slq = batched_slq
    try:
        yield found
    finally:
        blockhess_ext.batched_slq = original


@dataclass
class Job:
    """What a job of `spectrum` returned and took; peak in bytes."""

    spectra: Spectra
    observation: Observation
    peak: int


def run(
    machine: Machine, network: Network, graph: bool = True, before: Callable[[], None] = lambda: None, **options: Any
) -> Job:
    """Run a job of 10 probes by the engine "traced", or with other options; `graph` and `before` as for `observed`."""
    chosen = {"engine": "traced", "num_probes": 10, "reorthogonalize": "none", "progress": False, "seed": 0} | options
    made: list[Spectra] = []

    def work() -> None:
        made.append(blockhess.spectrum(**network.arguments(), **chosen))
        synchronize(machine.device)

    with observed(machine.device, graph, before=before) as observation:
        if machine.device.type == "cpu":
            peak = growth(work)
        else:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(machine.device)
            held = torch.cuda.memory_allocated(machine.device)
            work()
            peak = torch.cuda.max_memory_allocated(machine.device) - held
    return Job(made[0], observation, peak)


def row_of(machine: Machine, network: Network, job: Job, precision: str, graph: bool = False) -> Row:
    """Return step time, rate, launches, memory and error of a job."""
    times, plan = job.observation.step(UNTIMED[graph]), job.spectra.provenance["plan"]
    sizes = moments.sizes(moments.of_result(job.spectra))
    errors = {name: e / sizes[name] for name, e in (job.spectra.provenance["hvp_error"] or {}).items()}
    error = max(errors.values(), default=math.nan)
    row = Row(check("products", error, TOLERANCE[precision]), times={"a step": times.summary()})
    peak = plan["copy_bytes"] + max(plan["vector_bytes"] + plan["engine_bytes"], plan["check_bytes"])
    row.measured = {
        "s": times.median,
        "TFLOP/s": job.observation.flops() / times.median / 1e12,
        f"share of {LIMIT[precision]}": machine.share(job.observation.flops(), times.median, LIMIT[precision]),
        "kernels of a product": job.observation.launches(),
        "peak GiB": job.peak / 2**30,
        "planned GiB": peak / 2**30,
        "peak / plan": job.peak / peak,
        "HVP error / |H v|": error,
        "passes": len(job.observation.passes),
        "rows together": plan["rows"],
        "blocks": network.n_blocks,
        "seconds of the job": job.spectra.provenance["seconds"],
    }
    return row


def nano(machine: Machine, precision: str) -> Row:
    """Measure GPT2-nano, with and without replay of CUDA graphs, next to autograd."""
    network = networks.nano(machine)
    exact = moments.expected(machine, network)
    steps = machine.pick(10, 6, 6)
    job = run(machine, network, matmul_precision=precision, num_steps=steps)
    row = row_of(machine, network, job, precision, graph=machine.device.type == "cuda")
    row.error = check("moments", moments.error(moments.of_result(job.spectra), exact), TOLERANCE[precision])
    plain = run(machine, network, graph=False, matmul_precision=precision, num_steps=5)
    seconds = plain.observation.step(UNTIMED[False])
    row.times["a step, not replayed"] = seconds.summary()
    row.measured["times faster when replayed"] = seconds.median / row.measured["s"]
    same = (plain.spectra.quadrature.alpha - job.spectra.quadrature.alpha[..., :5]).abs().max()
    row.measured["largest difference of alpha when replayed"] = float(same)
    other = run(machine, network, matmul_precision=precision, num_steps=2, engine="autograd")
    by_autograd = other.observation.step(1)
    row.times["a step of autograd"] = by_autograd.summary()
    row.measured["times faster than autograd"] = by_autograd.median / row.measured["s"]
    return row


def gpt2(machine: Machine, precision: str) -> Row:
    """Measure GPT-2 124M: all its 25 blocks."""
    network = networks.gpt2(machine)
    steps = machine.pick(3, 2, 2)
    job = run(machine, network, False, matmul_precision=precision, num_steps=steps, num_probes=machine.pick(10, 2, 2))
    return row_of(machine, network, job, precision)


def gpt2_matrices(machine: Machine, precision: str, windows: int = 1, share: float = math.inf) -> Row:
    """Measure GPT-2 124M: every matrix of the embedding and of three layers, in a memory budget.

    Args:
        share: of the time left, which a job of 10 probes may take; else it has fewer, after a first job of one probe.
    """
    whole = networks.gpt2(machine, windows)
    layers = (0, 1) if machine.size == "tiny" else (0, 5, 11)
    wanted = (".tok.", ".pos.", *(f".layers.{i}." for i in layers))
    names = [n for n, p in whole.model.named_parameters() if p.ndim == 2 and any(text in n for text in wanted)]
    network = Network(whole.model, whole.data, whole.loss_fn, {name: [name] for name in names})
    options: dict[str, Any] = {"matmul_precision": precision, "num_steps": machine.pick(3, 2, 2)}
    options["memory_budget"] = "96 GiB" if machine.size != "tiny" else "1 GiB"
    if math.isinf(share):
        return row_of(machine, network, run(machine, network, False, **options), precision)
    begin, room = time.monotonic(), share * (machine.until - time.monotonic())
    job = run(machine, network, False, num_probes=1, **options)
    took, steps = time.monotonic() - begin, options["num_steps"] + 1  # and the product whose work is counted
    each = steps * job.observation.step(1).median
    most, fit = machine.pick(10, 10, 2), (room - 2 * took + each) / each
    probes = most if fit >= most else max(1, int(fit))
    if probes > 1:
        job = run(machine, network, False, num_probes=probes, **options)
    row = row_of(machine, network, job, precision)
    row.measured["probes"] = probes
    if probes < most:
        row.notes.append(f"{probes} of {most} probes: a job of one took {took:.0f} s, of {room:.0f} s for this row")
    return row


def resnet(machine: Machine, precision: str) -> Row:
    """Measure a ResNet18, whose products are convolutions."""
    network = networks.resnet(machine)
    job = run(machine, network, False, matmul_precision=precision, num_steps=machine.pick(5, 3, 3))
    return row_of(machine, network, job, precision)


def _nodes(spectra: Spectra) -> Tensor:
    return spectra.quadrature.nodes.cpu()


def out_of_memory(machine: Machine) -> Row:
    """Run out of memory once in a step: the job cuts its work and has the same result but for rounding."""
    network, device = networks.small(machine), machine.device
    options: dict[str, Any] = {"num_steps": 6, "reorthogonalize": "full"}
    expected = run(machine, network, graph=False, **options)
    provoke, restore = _limited(device, expected.peak // 2) if device.type == "cuda" else _failing_once()
    try:
        found = run(machine, network, graph=False, before=provoke, **options)
    finally:
        restore()
    a, b = _nodes(found.spectra), _nodes(expected.spectra)
    row = Row(check("nodes after memory ran out", float((a - b).abs().max() / b.abs().max()), 1e-4))
    plans = [job.spectra.provenance for job in (expected, found)]
    row.measured = {"cuts": len(plans[1]["shrunk"]), "peak GiB": found.peak / 2**30}
    row.notes = list(plans[1]["shrunk"])
    return row


Functions = tuple[Callable[[], None], Callable[[], None]]


def _limited(device: torch.device, n_bytes: int) -> Functions:
    """Return a function that leaves this process so much more memory than it holds then, and one that ends that."""
    total = torch.cuda.get_device_properties(device).total_memory

    def begin() -> None:
        torch.cuda.empty_cache()
        room = torch.cuda.memory_allocated(device) + n_bytes
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total), device)

    return begin, partial(torch.cuda.set_per_process_memory_fraction, 1.0, device)


def _failing_once() -> Functions:
    """Return a function after which the next product by the engine "traced" raises OutOfMemoryError, as above."""
    multiply, failed = TracedEngine._multiply, []

    def once(*arguments: Any) -> None:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("provoked")
        multiply(*arguments)

    return partial(setattr, TracedEngine, "_multiply", once), partial(setattr, TracedEngine, "_multiply", multiply)


def resumed(machine: Machine) -> Row:
    """Interrupt a job by SIGTERM and resume it: the same bits as without."""
    network, steps = networks.small(machine), 8
    torch.use_deterministic_algorithms(True)
    try:
        chosen = {"engine": "traced", "num_probes": 3, "num_steps": steps, "progress": False, "seed": 0}
        expected = blockhess.spectrum(**network.arguments(), **chosen)
        with tempfile.TemporaryDirectory() as folder:

            def interrupt(step: int) -> None:
                if step == steps // 2:
                    os.kill(os.getpid(), signal.SIGTERM)

            interrupted = False
            with observed(machine.device, on_step=interrupt):
                try:
                    blockhess.spectrum(**network.arguments(), **chosen, run_dir=folder)
                except Interrupted:
                    interrupted = True
            check("an interrupted job", float(not interrupted), 0)
            with observed(machine.device) as later:
                found = blockhess.spectrum(**network.arguments(), **chosen, run_dir=folder)
    finally:
        torch.use_deterministic_algorithms(False)
    apart = float((_nodes(found) - _nodes(expected)).abs().max())
    made = sum(len(marks) - 1 for marks in later.passes)
    return Row(check("nodes after a resumption", apart, 0), {"steps after resumption": made, "difference": apart})


PEAK = [
    Target("peak memory at most 1.2 x the plan", "peak / plan", 1.2, False),
    Target("and at least 0.8 x", "peak / plan", 0.8, True),
]
ONE_PASS = Target("at least 5 x autograd", "times faster than autograd", 5, True)
NAMES = {"highest": "float32", "high": "TF32"}

NANO: Rows = {
    f"GPT2-nano, 38 blocks x 10 probes x 1,024 tokens: a step of `spectrum`, {NAMES[precision]}": (
        partial(nano, precision=precision),
        [Target(f"at most {seconds} s", "s", seconds, False), ONE_PASS, *PEAK],
    )
    for precision, seconds in (("high", 0.10), ("highest", 0.45))
}
GPT2: Rows = {
    "GPT-2 124M, 25 blocks x 10 probes x 1,024 tokens: a step of `spectrum`, TF32": (
        partial(gpt2, precision="high"),
        [Target("at most 0.9 s", "s", 0.9, False), *PEAK],
    ),
    **{
        f"GPT-2 124M, matrices of embedding and layers 0, 5, 11, 10 probes x 1,024 tokens, {NAMES[precision]}": (
            partial(gpt2_matrices, precision=precision),
            PEAK,
        )
        for precision in ("high", "highest")
    },
    **{
        f"GPT-2 124M, the same matrices, 10 probes x 16 x 1,024 tokens in 96 GiB, {NAMES[precision]}": (
            partial(gpt2_matrices, precision=precision, windows=16, share=share),
            PEAK,
        )
        for precision, share in (("high", 0.4), ("highest", 0.9))
    },
}
RESNET: Rows = {
    f"ResNet18 of width 64, all parameters, 10 probes x 256 images: a step of `spectrum`, {NAMES[precision]}": (
        partial(resnet, precision=precision),
        PEAK,
    )
    for precision in ("high", "highest")
}
RELIABILITY: Rows = {
    "a job that runs out of memory once": (out_of_memory, [Target("cuts its work", "cuts", 1, True)]),
    "a job that is interrupted and resumed": (
        resumed,
        [
            Target("the same bits", "difference", 0, False),
            Target("resumes in the middle", "steps after resumption", 7, False),
        ],
    ),
}
