"""Measure the cost of one Hessian-vector product H_l v of one parameter block, by every engine and every rival.

    python -m bench.hvp.products [--json PATH] [--threads N] [--case NAME] [--quick]
    python -m bench.hvp.products --table PATH  # print the tables of such a file

The cost is that of a further product, once everything that Lanczos steps share is ready. All products of all rivals
are first compared with float64; a rival with an error above LARGEST_ERROR is reported and not timed, and the exit code
is 1 if it is one of our engines. Rivals then take turns, product by product, so that the load of the machine affects
all alike. A round is the mean over the measured blocks; tables give the median and range of the rounds, and ratios are
taken round by round. Of large models, every 5th or 13th block is measured.

- The paper's procedure makes one forward and one first backward pass per step for all blocks. That time is measured
  with every product, and 1 / number of blocks of it is added.
- hessian-eigenthings and curvlinops make all passes at every product. PyHessian retains the graph of the first backward
  pass, as `engine="autograd"` does, with one graph per block.
- FLOPs are counted by `torch.utils.flop_counter` and given in forward passes.
- "set-up" is the time before the first product of the measured blocks: tracing, compiling, graphs, operators.
- "peak" is the growth of resident memory in a fresh process that makes the rival and one product of every measured
  block. For this package's engines it includes the checks of the problem and tracing.
- Compiled programs are measured on a few blocks only, since compiling one takes half a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.harness.command import write_json
from bench.harness.environment import describe, one_line, peers
from bench.harness.memory import growth, in_fresh_process
from bench.harness.rows import short
from bench.harness.timing import alternate, failure_reason, timed
from bench.hvp.rivals import COMPILED, RIVALS, Case, Compiled, Rival, Traced
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.hvp import AutogradEngine
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig
from blockhess.problem.model_state import fixed_state

SEED = 0

# Relative to |H v|. Rounding of float32 products was at most 1e-5 on every block of these models.
LARGEST_ERROR = 1e-3

OURS = ("traced", "autograd", "traced, compiled")

Makers = dict[str, Callable[[Case], Rival]]

# Case -> rival -> how many times as long as "traced" it should take.
TARGETS = {
    "GPT 0.8M, 512 tokens": {"the paper's procedure": 3.0, "hessian-eigenthings": 3.0, "curvlinops": 6.0},
    "ResNet18 width 16, 64 images": {"the paper's procedure": 3.0},
    "GPT2-nano 10.7M, 1024 tokens": {"the paper's procedure": 2.0},
}


@dataclass
class Row:
    """Measurements of one rival on one case."""

    rival: str
    failure: str = ""  # why it was not timed
    error: float = 0.0  # largest |difference from float64| / |H v| of a block
    make_seconds: float = 0.0  # set-up before the first block
    block_seconds: float = 0.0  # set-up of a block, mean over blocks
    flops: dict[str, float] = field(default_factory=dict)  # block -> FLOPs of a product, 0 if not counted
    seconds: dict[str, list[float]] = field(default_factory=dict)  # block -> seconds of a product in every round
    peak_bytes: int = 0  # growth of memory of a fresh process that makes a product of every measured block

    @property
    def rounds(self) -> list[float]:
        """Seconds of a product in every round, mean over blocks."""
        return [statistics.fmean(times) for times in zip(*self.seconds.values())]

    @property
    def each(self) -> float:
        """Seconds of a product, median over rounds."""
        return statistics.median(self.rounds)


@dataclass
class Result:
    """Measurements of all rivals on one case; see `Problem` for the sizes of the problem and its graph."""

    name: str
    parameters: int
    n_blocks: int
    blocks: tuple[str, ...]
    forward_flops: int
    graph_nodes: int
    graph_bytes: int
    constant_bytes: int
    load: tuple[float, float]
    rows: list[Row]


def gpt(name: str, config: GPTConfig, windows: int, stride: int) -> Case:
    """Return a GPT with next-token cross-entropy on Shakespeare; measures every stride-th block."""
    torch.manual_seed(SEED)
    text = shakespeare()
    [(tokens, targets)] = text.batches(batch_size=windows, context=config.context, seed=SEED)
    model = nn.Sequential(GPT(dataclasses.replace(config, vocab_size=len(text.vocabulary))), nn.Flatten(0, 1))
    return _case(name, model, (tokens, targets.flatten()), stride)


def resnet(name: str, config: ResNetConfig, images: int, stride: int) -> Case:
    """Return a ResNet with cross-entropy on Fashion-MNIST and BatchNorm with running statistics."""
    torch.manual_seed(SEED)
    return _case(name, ResNet(config), fashion_mnist(images), stride)


def _case(name: str, model: nn.Module, batch: tuple[Tensor, Tensor], stride: int) -> Case:
    names = [parameter for parameter, _ in model.named_parameters()]
    return Case(name, model, nn.CrossEntropyLoss(), batch, tuple(names[stride // 2 :: stride]))


GPT_SMALL = GPTConfig(context=64, num_layers=4, num_heads=4, width=128)
# Strides are coprime to the 8 blocks of a GPT's layer and the 6 of a ResNet's, so that all kinds of blocks take part.
CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: gpt("GPT 0.8M, 512 tokens", GPT_SMALL, 8, 1),
    "gpt-compiled": lambda: gpt("GPT 0.8M, 512 tokens, compiled", GPT_SMALL, 8, 13),  # half a minute per block
    "resnet": lambda: resnet("ResNet18 width 16, 64 images", ResNetConfig(16, (2, 2, 2, 2), 10, 1, "small"), 64, 5),
    "nano": lambda: gpt("GPT2-nano 10.7M, 1024 tokens", GPTConfig(), 4, 13),
}
ROUNDS = {"nano": 3}  # 5 for the others
QUICK: dict[str, Callable[[], Case]] = {
    "gpt": lambda: gpt("GPT, tiny", GPTConfig(context=8, num_layers=1, num_heads=2, width=16), 2, 3),
    "resnet": lambda: resnet("ResNet, tiny", ResNetConfig(4, (1,), 10, 1, "small"), 4, 4),
}


def compare(case: Case, makers: Makers) -> tuple[list[Row], dict[str, Rival]]:
    """Return a row for every rival, and the rivals whose products are correct."""
    rows = {name: Row(name) for name in makers}
    rivals: dict[str, Rival] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            rivals[name] = make(case)
        except Exception as error:  # measure the other rivals
            rows[name].failure = failure_reason(error)
        rows[name].make_seconds = time.perf_counter() - start
    truth = AutogradEngine(case.problem.in_dtype(torch.float64))
    truth.prepare(0)
    numbers = {info.name: number for number, info in enumerate(case.problem.infos)}
    for block in case.blocks:
        v = case.vector(block)
        expected = truth.product(numbers[block], v.double()[None])
        assert expected is not None
        for name in list(rivals):
            row = rows[name]
            try:
                start = time.perf_counter()
                product = partial(rivals[name].of_block(block), v)
                row.block_seconds += (time.perf_counter() - start) / len(case.blocks)
                found, flops = _counted(rivals[name], product, len(numbers))
            except Exception as error:
                row.failure = failure_reason(error)
            else:
                row.flops[block] = flops
                difference = found.detach().reshape(-1).double() - expected[0]
                error = float(difference.norm() / expected.norm())
                if not error <= LARGEST_ERROR:  # also if NaN
                    row.failure = f"wrong by {error:.2g} of |H v| on {block}"
                row.error = error if row.failure else max(row.error, error)
            if row.failure:
                del rivals[name]
    return list(rows.values()), rivals


def _counted(rival: Rival, product: Callable[[], Tensor], n_blocks: int) -> tuple[Tensor, float]:
    """Return a product, and the FLOPs of it and its share of a step; 0 if counting would disable compilation."""
    if isinstance(rival, Compiled):  # runs eagerly after it was counted
        return product(), 0.0
    with FlopCounterMode(display=False) as counter:
        found = product()
    with FlopCounterMode(display=False) as shared:
        rival.step()
    return found, counter.get_total_flops() + shared.get_total_flops() / n_blocks


def measure(case: Case, makers: Makers, rounds: int) -> list[Row]:
    """Compare all rivals, then time the correct ones."""
    with fixed_state(case.model):
        rows, rivals = compare(case, makers)
        by_name, n_blocks = {row.rival: row for row in rows}, len(case.parameters)
        for block in case.blocks:
            v, calls = case.vector(block), {}
            for name, rival in rivals.items():
                seconds = by_name[name].seconds[block] = []
                calls[name] = partial(_time_product, rival, partial(rival.of_block(block), v), seconds, n_blocks)
            for _ in alternate(calls, rounds):
                pass
    return rows


def _time_product(rival: Rival, product: Callable[[], Tensor], seconds: list[float], n_blocks: int) -> None:
    """Append the time of a product and its share of a step, which comes last as it may replace the product's graph."""
    seconds.append(timed(product) + timed(rival.step) / n_blocks)


def _peak(key: str, quick: bool, name: str, threads: int) -> int:
    """Return the growth of memory of this process when one rival makes a product of every measured block."""
    torch.set_num_threads(threads)

    def run(case: Case) -> None:
        with fixed_state(case.model):
            rival = _makers(key)[name](case)
            for block in case.blocks:
                rival.of_block(block)(case.vector(block))

    run(QUICK.get(key, QUICK["gpt"])())  # loads libraries
    case = (QUICK if quick else CASES)[key]()
    return growth(lambda: run(case))


def _makers(key: str) -> Makers:
    return COMPILED if key == "gpt-compiled" else RIVALS


def run(key: str, quick: bool, rounds: int, threads: int) -> Result:
    """Measure one case; if quick, the memory of one rival only."""
    case, makers, load = (QUICK if quick else CASES)[key](), _makers(key), os.getloadavg()[0]
    with fixed_state(case.model):
        problem = case.problem
    constant_bytes = 0

    def traced(case: Case) -> Rival:
        nonlocal constant_bytes
        rival = Traced(case)
        constant_bytes = rival.constant_bytes
        return rival

    rows = measure(case, {**makers, "traced": traced}, rounds)
    result = Result(
        name=case.name,
        parameters=sum(p.numel() for p in case.parameters.values()),
        n_blocks=len(case.parameters),
        blocks=case.blocks,
        forward_flops=problem.forward_flops,
        graph_nodes=problem.graph_nodes,
        graph_bytes=problem.graph_bytes,
        constant_bytes=constant_bytes,
        load=(load, os.getloadavg()[0]),
        rows=rows,
    )
    del case, problem
    for row in rows[: 1 if quick else None]:
        if not row.failure:
            row.peak_bytes = in_fresh_process(_peak, key, quick, row.rival, threads)
    return result


def _spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Format median and range."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{short(middle)} ({short(low)} - {short(high)})"


def _break_even(invested: float, slow: Row, fast: Row, n_blocks: int) -> str:
    """Say after how many products, `fast` instead of `slow`, a time spent before the first one is recovered."""
    saved = slow.each - fast.each
    if saved <= 0:
        return "does not pay: products are not faster"
    products = max(0.0, invested / saved)
    return f"pays after {products:,.0f} products" + (f", {products / n_blocks:,.0f} per block" if n_blocks > 1 else "")


def table(result: Result) -> str:
    """Return the table of all rivals of one case, followed by conclusions."""
    first = next((row for row in result.rows if not row.failure), None)
    lines = [
        f"**{result.name}**: {result.parameters:,} parameters, {len(result.blocks)} of {result.n_blocks} blocks, "
        f"one forward pass {result.forward_flops / 1e9:.3g} GFLOP; load average {result.load[0]:.1f} before, "
        f"{result.load[1]:.1f} after",
        "",
        f"| rival | ms per product (range) | times {first.rival if first else '-'} (range) | forward passes | GFLOP/s "
        "| set-up, s | peak, MiB | error |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in result.rows:
        if row.failure or first is None:
            lines.append(
                f"| {row.rival} | not timed: {row.failure} | | | | | | {f'{row.error:.1g}' if row.error else '-'} |"
            )
            continue
        flops = statistics.fmean(row.flops.values())
        ratios = [theirs / ours for theirs, ours in zip(row.rounds, first.rounds)]
        setup = row.make_seconds + row.block_seconds * len(result.blocks)
        counted = (f"{flops / result.forward_flops:.2f}", f"{flops / row.each / 1e9:.1f}") if flops else ("-", "-")
        lines.append(
            f"| {row.rival} | {_spread(row.rounds, 1e3)} | {_spread(ratios)} | {counted[0]} | {counted[1]} "
            f"| {setup:.2f} | {row.peak_bytes / 2**20:.0f} | {row.error:.1g} |"
        )
    return "\n".join([*lines, "", *"\n\n".join(_conclusions(result)).splitlines()])


def _conclusions(result: Result) -> list[str]:
    rows = {row.rival: row for row in result.rows if not row.failure}
    traced, autograd, compiled = (rows.get(name) for name in ("traced", "autograd", "traced, compiled"))
    lines = []
    if traced and autograd:
        invested = traced.make_seconds - autograd.make_seconds
        lines.append(
            f"Tracing took {traced.make_seconds:.1f} s for all {result.n_blocks} blocks "
            f"({1e3 * traced.make_seconds / result.graph_nodes:.0f} ms for each of the {result.graph_nodes} "
            f"operations of the gradient) and {_break_even(invested, autograd, traced, result.n_blocks)}. "
            f"Constants take {result.constant_bytes / 2**20:.0f} MiB, {result.constant_bytes / result.graph_bytes:.2f} "
            "times the tensors of the gradient's graph."
        )
    if traced:
        for rival, wanted in TARGETS.get(result.name, {}).items():
            if rival in rows:
                ratio = statistics.median(a / b for a, b in zip(rows[rival].rounds, traced.rounds))
                verdict = "met" if ratio >= wanted else "missed"
                lines.append(f"Target: {wanted:g} times as long for {rival}. {verdict.capitalize()}: {ratio:.2f}.")
    if traced and compiled:
        lines.append(
            f"Compiling {', '.join(result.blocks)} took {compiled.block_seconds:.1f} s per block, which "
            f"{_break_even(compiled.block_seconds, traced, compiled, 1)}."
        )
    return lines


def markdown(data: dict[str, Any]) -> str:
    """Return the tables of a result."""
    parts = []
    for entry in data["results"]:
        rows = [Row(**row) for row in entry["rows"]]
        parts.append(table(Result(**{**entry, "rows": rows})))
    parts.append(
        "Medians and ranges over rounds; a round is the mean over the measured blocks. Set-up is for these blocks. "
        + one_line(data["environment"] | data["peers"])
    )
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result to this file")
    parser.add_argument("--table", type=Path, metavar="PATH", help="measure nothing; print the tables")
    parser.add_argument("--case", choices=list(CASES), action="append", help="measure this case only; repeatable")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of PyTorch (default 1)")
    parser.add_argument("--quick", action="store_true", help="tiny models and one round, to check that it runs")
    options = parser.parse_args()
    if options.table:
        print(markdown(json.loads(options.table.read_text())))
        return 0
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    torch.set_num_threads(options.threads)
    keys = [key for key in (QUICK if options.quick else CASES) if not options.case or key in options.case]
    data: dict[str, Any] = {"environment": describe(), "peers": peers(), "results": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing is compiled yet
        for key in keys:
            rounds = 1 if options.quick else ROUNDS.get(key, 5)
            data["results"].append(asdict(run(key, options.quick, rounds, options.threads)))
            if options.json:
                write_json(data, options.json)
    print(markdown(data))
    rows = [(entry["name"], row["rival"], row["failure"]) for entry in data["results"] for row in entry["rows"]]
    failures = [row for row in rows if row[2] and not row[2].startswith("absent")]
    for case, rival, why in failures:
        print(f"bench.hvp.products: {case}: not timed: {rival}, {why}", file=sys.stderr)
    return int(any(rival in OURS for _, rival, _ in failures))


if __name__ == "__main__":
    sys.exit(main())
