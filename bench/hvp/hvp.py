"""What one Hessian-vector product of one parameter block costs, by every engine and every rival, in the steady state.

    python -m bench.hvp.hvp [--json PATH] [--rounds N] [--threads N] [--case NAME] [--quick]
    python -m bench.hvp.hvp --table PATH ...  # prints the tables of such files

All products of all rivals are compared with float64 before anything is timed; a rival whose products differ is shown
with its error and not timed. Rivals then run in turn, product by product, so that whatever else the machine does falls
on all alike. README.md says what the numbers mean. The exit code is 1 where one of our own engines is wrong or fails.
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

from bench.harness.environment import describe, peers
from bench.harness.memory import growth, in_fresh_process
from bench.harness.rows import short
from bench.harness.timing import alternate, timed, told
from bench.hvp.hvp_rivals import COMPILED, RIVALS, Case, Compiled, Rival, Traced
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.hvp import AutogradEngine
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig
from blockhess.problem.model_state import fixed_state

SEED = 0

# Of |H v|. Rounding of float32 products was at most 1e-5 on every block of these models.
LARGEST_ERROR = 1e-3

OURS = ("traced", "autograd", "traced, compiled")

Makers = dict[str, Callable[[Case], Rival]]


# How many times as long as traced a rival should take.
TARGETS = {
    "GPT 0.8M, 512 tokens": {"the paper's procedure": 3.0, "hessian-eigenthings": 3.0, "curvlinops": 6.0},
    "ResNet18 width 16, 64 images": {"the paper's procedure": 3.0},
    "GPT2-nano 10.7M, 1024 tokens": {"the paper's procedure": 2.0},
}


@dataclass
class Row:
    """What one rival gave on one case.

    Attributes:
        failure: why it was not timed. error: the largest |difference from float64| / |H v| of a block.
        make_seconds: before the first block. block_seconds: before the first product of a block, mean over blocks.
        flops: of a product of every block, 0 if not counted. seconds: block -> time of a product, one a round.
        peak_bytes: growth of a fresh process that makes the rival and one product of every block measured.
    """

    rival: str
    failure: str = ""
    error: float = 0.0
    make_seconds: float = 0.0
    block_seconds: float = 0.0
    flops: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int = 0

    @property
    def rounds(self) -> list[float]:
        """Seconds of a product, mean over blocks, one a round."""
        return [statistics.fmean(times) for times in zip(*self.seconds.values())]

    @property
    def each(self) -> float:
        """Seconds of a product: the median round."""
        return statistics.median(self.rounds)


@dataclass
class Result:
    """What all rivals gave on one case; the sizes are those of the problem and the trace, see `Problem`."""

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
    """Next-token cross-entropy on Shakespeare; every stride-th block."""
    torch.manual_seed(SEED)
    text = shakespeare()
    [(tokens, targets)] = text.batches(batch_size=windows, context=config.context, seed=SEED)
    model = nn.Sequential(GPT(dataclasses.replace(config, vocab_size=len(text.vocabulary))), nn.Flatten(0, 1))
    return _case(name, model, (tokens, targets.flatten()), stride)


def resnet(name: str, config: ResNetConfig, images: int, stride: int) -> Case:
    """Cross-entropy on Fashion-MNIST, BatchNorm with running statistics; every stride-th block."""
    torch.manual_seed(SEED)
    return _case(name, ResNet(config), fashion_mnist(images), stride)


def _case(name: str, model: nn.Module, batch: tuple[Tensor, Tensor], stride: int) -> Case:
    names = [parameter for parameter, _ in model.named_parameters()]
    return Case(name, model, nn.CrossEntropyLoss(), batch, tuple(names[stride // 2 :: stride]))


GPT_SMALL = GPTConfig(context=64, num_layers=4, num_heads=4, width=128)
# Strides have no factor in common with the 8 blocks of a GPT's layer and the 6 of a ResNet's, so all kinds take part.
CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: gpt("GPT 0.8M, 512 tokens", GPT_SMALL, 8, 1),
    "gpt-compiled": lambda: gpt("GPT 0.8M, 512 tokens, compiled", GPT_SMALL, 8, 13),  # at half a minute a block
    "resnet": lambda: resnet("ResNet18 width 16, 64 images", ResNetConfig(16, (2, 2, 2, 2), 10, 1, "small"), 64, 5),
    "nano": lambda: gpt("GPT2-nano 10.7M, 1024 tokens", GPTConfig(), 4, 13),
}
ROUNDS = {"nano": 3}  # 5 of the others
QUICK: dict[str, Callable[[], Case]] = {
    "gpt": lambda: gpt("GPT, tiny", GPTConfig(context=8, num_layers=1, num_heads=2, width=16), 2, 3),
    "resnet": lambda: resnet("ResNet, tiny", ResNetConfig(4, (1,), 10, 1, "small"), 4, 4),
}


def compare(case: Case, makers: Makers) -> tuple[list[Row], dict[str, Rival]]:
    """A row for every rival, and those rivals whose products are right."""
    rows = {name: Row(name) for name in makers}
    rivals: dict[str, Rival] = {}
    for name, make in makers.items():
        start = time.perf_counter()
        try:
            rivals[name] = make(case)
        except Exception as error:  # a rival may fail in any way, and others should still be measured
            rows[name].failure = told(error)
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
                row.failure = told(error)
            else:
                row.flops[block] = flops
                difference = found.detach().reshape(-1).double() - expected[0]
                error = float(difference.norm() / expected.norm())
                if not error <= LARGEST_ERROR:  # NaN neither
                    row.failure = f"wrong by {error:.2g} of |H v| on {block}"
                row.error = error if row.failure else max(row.error, error)
            if row.failure:
                del rivals[name]
    return list(rows.values()), rivals


def _counted(rival: Rival, product: Callable[[], Tensor], n_blocks: int) -> tuple[Tensor, float]:
    """A product and the FLOPs of it and of its share in a step, 0 where counting would change what is timed."""
    if isinstance(rival, Compiled):  # once counted, it runs eagerly for ever
        return product(), 0.0
    with FlopCounterMode(display=False) as counter:
        found = product()
    with FlopCounterMode(display=False) as shared:
        rival.step()
    return found, counter.get_total_flops() + shared.get_total_flops() / n_blocks


def measure(case: Case, makers: Makers, rounds: int) -> list[Row]:
    """Compare all rivals, then time those that are right."""
    with fixed_state(case.model):
        rows, rivals = compare(case, makers)
        by_name, n_blocks = {row.rival: row for row in rows}, len(case.parameters)
        for block in case.blocks:
            v, clocks = case.vector(block), {}
            for name, rival in rivals.items():
                by_name[name].seconds[block] = []
                clocks[name] = _clock(rival, partial(rival.of_block(block), v), by_name[name].seconds[block], n_blocks)
            for _ in alternate(clocks, rounds):
                pass
    return rows


def _clock(rival: Rival, product: Callable[[], Tensor], seconds: list[float], n_blocks: int) -> Callable[[], float]:
    """Times a product with its share of a step, which comes after it, as it may replace the product's graph."""

    def call() -> float:
        seconds.append(timed(product) + timed(rival.step) / n_blocks)
        return seconds[-1]

    return call


def _peak(key: str, quick: bool, name: str, threads: int) -> int:
    """Growth of this process from a model and its batch to products of every block by one rival."""
    torch.set_num_threads(threads)

    def run(case: Case) -> None:
        with fixed_state(case.model):
            rival = _makers(key)[name](case)
            for block in case.blocks:
                rival.of_block(block)(case.vector(block))

    run(QUICK.get(key, QUICK["gpt"])())  # loads what a run loads lazily
    case = (QUICK if quick else CASES)[key]()
    return growth(lambda: run(case))


def _makers(key: str) -> Makers:
    return COMPILED if key == "gpt-compiled" else RIVALS


def run(key: str, quick: bool, rounds: int, threads: int) -> Result:
    """All of one case; if quick, the memory of one rival only."""
    result = _result((QUICK if quick else CASES)[key](), _makers(key), rounds)
    for row in result.rows[: 1 if quick else None]:
        if not row.failure:
            row.peak_bytes = in_fresh_process(_peak, key, quick, row.rival, threads)
    return result


def _result(case: Case, makers: Makers, rounds: int) -> Result:
    before = os.getloadavg()[0]
    with fixed_state(case.model):
        problem = case.problem
    constant_bytes = 0

    def traced(case: Case) -> Rival:
        nonlocal constant_bytes
        rival = Traced(case)
        constant_bytes = rival.constant_bytes
        return rival

    rows = measure(case, {name: traced if make is Traced else make for name, make in makers.items()}, rounds)
    return Result(
        name=case.name,
        parameters=sum(p.numel() for p in case.parameters.values()),
        n_blocks=len(case.parameters),
        blocks=case.blocks,
        forward_flops=problem.forward_flops,
        graph_nodes=problem.graph_nodes,
        graph_bytes=problem.graph_bytes,
        constant_bytes=constant_bytes,
        load=(before, os.getloadavg()[0]),
        rows=rows,
    )


# Tables


def _spread(values: Sequence[float], scale: float = 1.0) -> str:
    """Median and range."""
    low, middle, high = (scale * f(values) for f in (min, statistics.median, max))
    return f"{short(middle)} ({short(low)} - {short(high)})"


def _break_even(invested: float, slow: Row, fast: Row, n_blocks: int) -> str:
    saved = slow.each - fast.each
    if saved <= 0:
        return "does not pay: products are not faster"
    return f"pays after {max(0.0, invested / saved):,.0f} products" + (
        f", {max(0.0, invested / saved) / n_blocks:,.0f} a block" if n_blocks > 1 else ""
    )


def table(result: Result) -> str:
    """All rivals of one case, and what follows from them."""
    first = next((row for row in result.rows if not row.failure), None)
    lines = [
        f"**{result.name}**: {result.parameters:,} parameters, {len(result.blocks)} of {result.n_blocks} blocks, "
        f"one forward pass {result.forward_flops / 1e9:.3g} GFLOP; load of the machine {result.load[0]:.1f} before, "
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
            f"({1e3 * traced.make_seconds / result.graph_nodes:.0f} ms for each of the gradient's {result.graph_nodes} "
            f"operations) and {_break_even(invested, autograd, traced, result.n_blocks)}. Constants take "
            f"{result.constant_bytes / 2**20:.0f} MiB, {result.constant_bytes / result.graph_bytes:.2f} of what the "
            "gradient's graph holds."
        )
    if traced:
        for rival, wanted in TARGETS.get(result.name, {}).items():
            if rival in rows:
                ratio = statistics.median(a / b for a, b in zip(rows[rival].rounds, traced.rounds))
                verdict = "met" if ratio >= wanted else "missed"
                lines.append(f"Target: {wanted:g} times as long for {rival}. {verdict.capitalize()}: {ratio:.2f}.")
    if traced and compiled:
        lines.append(
            f"Compiled were {', '.join(result.blocks)}: {compiled.block_seconds:.1f} s a block, which "
            f"{_break_even(compiled.block_seconds, traced, compiled, 1)}."
        )
    return lines


def markdown(data: dict[str, Any]) -> str:
    """The tables of everything measured, from what the JSON holds."""
    parts = []
    for entry in data["results"]:
        rows = [Row(**row) for row in entry["rows"]]
        parts.append(table(Result(**{**entry, "rows": rows})))
    parts.append(
        "Medians and ranges of rounds, a round being the mean over the blocks measured; set-up is for those blocks. "
        + ", ".join(f"{name} {version}" for name, version in {**data["environment"], **data["peers"]}.items())
    )
    return "\n\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--table", type=Path, nargs="+", help="only print the tables of such files")
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this case; may be repeated")
    parser.add_argument("--rounds", type=int, help="timed products of each rival and block (default 3 or 5)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for all rivals (default 1)")
    parser.add_argument("--quick", action="store_true", help="tiny models and one round: checks, not timings")
    options = parser.parse_args()
    if options.table:
        print("\n\n".join(markdown(json.loads(path.read_text())) for path in options.table))
        return 0
    for name, value in (("rounds", options.rounds), ("threads", options.threads)):
        if value is not None and value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    torch.set_num_threads(options.threads)
    keys = [key for key in (QUICK if options.quick else CASES) if not options.case or key in options.case]
    data: dict[str, Any] = {"environment": describe(), "peers": peers(), "results": []}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # so that nothing is compiled already
        for key in keys:
            rounds = 1 if options.quick else options.rounds or ROUNDS.get(key, 5)
            data["results"].append(asdict(run(key, options.quick, rounds, options.threads)))
            if options.json:
                options.json.write_text(json.dumps(data, indent=1) + "\n")
    print(markdown(data))
    failures = [(e["name"], r["rival"], r["failure"]) for e in data["results"] for r in e["rows"] if _failed(r)]
    print(
        "".join(f"bench.hvp.hvp: {case}: not timed: {rival}, {why}\n" for case, rival, why in failures),
        end="",
        file=sys.stderr,
    )
    return int(any(rival in OURS for _, rival, _ in failures))


def _failed(row: dict[str, Any]) -> bool:
    return bool(row["failure"]) and not row["failure"].startswith("absent")


if __name__ == "__main__":
    sys.exit(main())
