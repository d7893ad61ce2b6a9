"""Measure the products and the error of `blockhess.spectrum` without counts, next to 10 probes of 100 steps.

    python -m bench.accuracy.default_job [--json PATH] [--text PATH] [--quick | --show PATH]      # 15 minutes

Every network is measured by the default job and by 10 probes of 100 steps with the same seed; the reference is 10 x 100
with another seed. Errors are the largest over the blocks: the Wasserstein-1 distance of the spectra as a share of the
block's range, and the distance of the extreme nodes as a share of the largest |node|. The reference is not exact: its
own errors are in the column of 10 x 100. Seconds are those of the processor.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import blockhess
from bench.harness import command
from bench.harness.environment import describe, one_line
from blockhess._text import format_table
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess_ext.early_stopping import change

COUNTS = {"num_probes": 10, "num_steps": 100}
SEED, WINDOWS, IMAGES = 0, 8, 32

Arguments = dict[str, Any]


def gpt(layers: int, width: int) -> Callable[[], Arguments]:
    """Return a function that returns a GPT on Shakespeare as arguments of `spectrum`."""

    def make() -> Arguments:
        text = shakespeare()
        config = GPTConfig(
            vocab_size=len(text.vocabulary), context=64, num_layers=layers, num_heads=width // 32, width=width
        )
        windows = text.batches(batch_size=WINDOWS, context=64, seed=SEED)
        return {"model": GPT(config), "data": windows, "loss_fn": next_token_loss}

    return make


def resnet(width: int, stages: tuple[int, ...]) -> Callable[[], Arguments]:
    """Return a function that returns a ResNet on Fashion-MNIST as arguments of `spectrum`."""

    def make() -> Arguments:
        config = ResNetConfig(width=width, blocks_per_stage=stages, num_classes=10, in_channels=1, stem="small")
        return {"model": ResNet(config), "data": fashion_mnist(IMAGES), "loss_fn": nn.CrossEntropyLoss()}

    return make


NETWORKS = {
    "GPT, 2 layers of 64": gpt(2, 64),
    "GPT, 3 layers of 96": gpt(3, 96),
    "ResNet, width 8": resnet(8, (1, 1, 1)),
    "ResNet, width 16": resnet(16, (1, 1, 1)),
}


def errors(found: blockhess.Spectra, reference: blockhess.Spectra) -> tuple[float, float]:
    """Return the largest error of the distribution functions and of the extreme nodes."""
    rules = found.merged, reference.merged
    ends = [torch.stack(nodes.aminmax(dim=1)) for nodes, _ in rules]
    radius = rules[1][0].abs().amax(1)
    of_ends = torch.where(radius > 0, (ends[0] - ends[1]).abs() / radius, 0.0)
    return float(change(*rules).max()), float(of_ends.max())


def measured(arguments: Arguments, reference: blockhess.Spectra, **counts: int) -> dict[str, Any]:
    """Return products, seconds, errors and the comparisons of blocks of one job."""
    begin = time.process_time()
    found = blockhess.spectrum(**arguments, **counts, seed=SEED, progress=False)
    seconds = time.process_time() - begin
    distance, ends = errors(found, reference)
    js0, spread = found.js0(confidence=0.95), found.curvature_spread()
    return {
        "products": found.provenance["hvps"],
        "seconds": seconds,
        "distribution": distance,
        "extremes": ends,
        "not reached": sum("tolerance" in block.note for block in found.blocks),
        "js0": js0.value,
        "js0_interval": js0.probes_interval,
        "spread": spread and spread.value,
    }


def measure(quick: bool) -> dict[str, Any]:
    """Return the result that the table shows."""
    networks = {"GPT, tiny": gpt(1, 32), "ResNet, tiny": resnet(4, (1,))} if quick else NETWORKS
    rows = []
    for name, make in networks.items():
        torch.manual_seed(SEED)
        arguments = make()
        reference = blockhess.spectrum(**arguments, **COUNTS, seed=SEED + 1, progress=False)
        jobs = {"default": measured(arguments, reference), "10 x 100": measured(arguments, reference, **COUNTS)}
        parameters = sum(p.numel() for p in arguments["model"].parameters())
        rows += [{"network": name, "parameters": parameters, "job": job, **found} for job, found in jobs.items()]
        print(f"  {name}", file=sys.stderr, flush=True)
    return {"environment": describe(), "rows": rows}


def text(result: dict[str, Any]) -> str:
    """Return the table of a result."""
    lines = []
    for row in result["rows"]:
        lower, upper, _ = row["js0_interval"]
        lines.append(
            [
                row["network"], f"{row['parameters']:,}", row["job"], f"{row['products']:,}", f"{row['seconds']:.0f}",
                f"{row['distribution']:.4f}", f"{row['extremes']:.4f}", str(row["not reached"]),
                f"{row['spread']:.3f}", f"{row['js0']:.3f}", f"{lower:.3f} ... {upper:.3f}",
            ]
        )  # fmt: skip
    header = [
        "network", "parameters", "job", "products", "CPU s", "W1", "extremes", "not reached", "spread", "JS0",
        "at this number of steps",
    ]  # fmt: skip
    return "\n".join(
        [
            "W1 and extremes: the largest error of a block, relative to 10 x 100 with another seed, as a share of the",
            "range and of the largest |node|; the default job limits both to 0.01. Not reached: blocks that did not",
            "reach the tolerance. Spread in decades; JS0 with the interval of the probes, 95 %.",
            "",
            format_table(header, lines, left=1),
            "",
            one_line(result["environment"]),
        ]
    )


def main() -> None:
    command.run(__doc__, measure, text, quick="tiny networks, to check that it runs")


if __name__ == "__main__":
    main()
