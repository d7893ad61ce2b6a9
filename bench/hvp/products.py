"""The rows of the CPU's speed table that measure one Hessian-vector product H_l v, by our engines and every rival.

The time is that of a further product, once everything that Lanczos steps share is ready. All products are compared with
float64 first. Rivals then take turns, product by product; a round is the mean over the measured blocks. Of large
models, every 5th or 13th block is measured.

- Products are made one by one. The engine "traced" makes those of all blocks and probes together in a job, see
  one_pass.py.
- The paper's procedure makes one forward and one first backward pass per step for all blocks. That time is measured
  with every product, and 1 / number of blocks of it is added.
- hessian-eigenthings and curvlinops make all passes at every product. PyHessian retains the graph of the first backward
  pass, as `engine="autograd"` does, with one graph per block.
- FLOPs are counted by `torch.utils.flop_counter` and given in forward passes.
- The "first call" is the set-up of the measured blocks: tracing, recording, graphs, operators.
- "peak" is the growth of resident memory in a fresh process that makes the rival and one product of every measured
  block. For our engines it includes the checks of the problem and tracing.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.harness.machine import Machine
from bench.harness.memory import growth, in_fresh_process
from bench.harness.rows import Row, Rows, faster
from bench.harness.timing import Entry, WrongResult, alternate, failure_reason, now, timed
from bench.hvp.cases import QUICK, case_of
from bench.hvp.rivals import RIVALS, Case, Rival
from blockhess.hvp import AutogradEngine, operator
from blockhess.problem.model_state import fixed_state

# Relative to |H v|. Rounding of float32 products was at most 1e-5 on every block of these models.
LARGEST_ERROR = 1e-3

Makers = dict[str, Callable[[Case], Rival]]
Flops = dict[str, float]  # rival -> of all products of the measured blocks


def compare(case: Case, makers: Makers) -> tuple[dict[str, Entry], Flops, dict[str, Rival]]:
    """Return an entry for every rival, the FLOPs of one product of every block, and the rivals that are correct."""
    entries, flops = {name: Entry() for name in makers}, dict.fromkeys(makers, 0.0)
    rivals: dict[str, Rival] = {}
    for name, make in makers.items():
        start = now()
        try:
            rivals[name] = make(case)
        except Exception as error:  # measure the other rivals
            entries[name].failure = failure_reason(error)
        entries[name].first = now() - start
    truth = AutogradEngine(case.problem.in_dtype(torch.float64))
    truth.prepare(0)
    numbers = {info.name: number for number, info in enumerate(case.problem.infos)}
    for block in case.blocks:
        v = case.vector(block)
        expected = operator.product(truth, numbers[block], v.double()[None])[0]
        for name in list(rivals):
            entry = entries[name]
            try:
                start = now()
                product = partial(rivals[name].of_block(block), v)
                entry.first += now() - start
                found, counted = _counted(rivals[name], product, len(numbers))
            except Exception as error:
                entry.failure = failure_reason(error)
            else:
                flops[name] += counted
                error = float((found.detach().reshape(-1).double() - expected).norm() / expected.norm())
                if not error <= LARGEST_ERROR:  # also if NaN
                    entry.failure = f"wrong by {error:.2g} of |H v| on {block}"
                entry.error = error if entry.failure else max(entry.error or 0.0, error)
            if entry.failure:
                del rivals[name]
    return entries, flops, rivals


def _counted(rival: Rival, product: Callable[[], Tensor], n_blocks: int) -> tuple[Tensor, float]:
    """Return a product, and the FLOPs of it and its share of a step."""
    with FlopCounterMode(display=False) as counter:
        found = product()
    with FlopCounterMode(display=False) as shared:
        rival.step()
    return found, counter.get_total_flops() + shared.get_total_flops() / n_blocks


def measure(case: Case, makers: Makers, rounds: int) -> tuple[dict[str, Entry], Flops]:
    """Compare all rivals, then time the correct ones; the times are means over the measured blocks."""
    with fixed_state(case.model):
        entries, flops, rivals = compare(case, makers)
        seconds: dict[str, list[list[float]]] = {name: [] for name in rivals}
        for block in case.blocks:
            v, calls = case.vector(block), {}
            for name, rival in rivals.items():
                seconds[name].append([])
                product = partial(rival.of_block(block), v)
                calls[name] = partial(_time_product, rival, product, seconds[name][-1], len(case.parameters))
            for _ in alternate(calls, rounds):
                pass
    for name, of_blocks in seconds.items():
        entries[name].seconds = [statistics.fmean(times) for times in zip(*of_blocks)]
    return entries, flops


def _time_product(rival: Rival, product: Callable[[], Tensor], seconds: list[float], n_blocks: int) -> None:
    """Append the time of a product and its share of a step, which comes last as it may replace the product's graph."""
    seconds.append(timed(product) + timed(rival.step) / n_blocks)


def _peak(key: str, size: str, name: str, threads: int) -> int:
    """Return the growth of memory of this process when one rival makes a product of every measured block."""
    torch.set_num_threads(threads)

    def run(case: Case) -> None:
        with fixed_state(case.model):
            rival = RIVALS[name](case)
            for block in case.blocks:
                rival.of_block(block)(case.vector(block))

    run(QUICK[key]())  # loads libraries
    case = case_of(key, size)
    return growth(lambda: run(case))


def row(machine: Machine, key: str, rounds: int) -> Row:
    """Measure products of one case by all rivals.

    Raises:
        WrongResult: One of our engines is wrong or failed.
    """
    case = case_of(key, machine.size)
    entries, flops = measure(case, RIVALS, machine.pick(rounds, 1, 1))
    if entries["autograd"].failure:
        raise WrongResult(f"autograd: {entries['autograd'].failure}")
    for name, entry in entries.items():
        if not entry.failure:
            entry.peak_bytes = in_fresh_process(_peak, key, machine.size, name, torch.get_num_threads())
    found, forward = Row.of(entries), case.problem.forward_flops * len(case.blocks)
    found.measured |= {f"forward passes, {name}": flops[name] / forward for name in entries if flops[name]}
    found.notes.append(f"{len(case.blocks)} of {len(case.parameters)} blocks, forward pass {forward:.3g} FLOP")
    return found


ROWS: Rows = {
    "one product, GPT 0.8M, 512 tokens": (
        partial(row, key="gpt", rounds=5),
        [faster("the paper's procedure", 3), faster("hessian-eigenthings", 3), faster("curvlinops", 6)],
    ),
    "one product, ResNet18 width 16, 64 images": (
        partial(row, key="resnet", rounds=5),
        [faster("the paper's procedure", 3)],
    ),
    "one product, GPT2-nano 10.7M, 1,024 tokens": (
        partial(row, key="nano", rounds=3),
        [faster("the paper's procedure", 2)],
    ),
}
