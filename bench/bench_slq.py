"""blockhess.spectrum against the paper's procedure in plain PyTorch: same model, data, probes and steps.

    python bench/bench_slq.py [--json PATH] [--rounds N] [--threads N] [--quick]

Results are compared before anything is timed; a difference beyond rounding ends the run with exit code 1. Both sides
then run in turn, and medians are reported. README.md says what the numbers mean.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from environment import describe
from memory import peak_vector_sets
from paper_procedure import Quadratures, paper_spectrum
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import blockhess
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.density import node_grid, smooth
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess_ext import batched_slq

SEED = 0

# Both sides run the model in float32. Over a few Lanczos steps rounding grows to some hundred eps, relative to |H|.
LARGEST_TRACE_DIFFERENCE = 2**10 * torch.finfo(torch.float32).eps
# L1 distance of the densities, smoothed with 1 % of a block's range; two unrelated ones are 2 apart.
LARGEST_DENSITY_DIFFERENCE = 0.01


@dataclass(frozen=True)
class Case:
    """One model with its data, as both sides take them."""

    name: str
    model: nn.Module
    batches: list[Any]
    loss_fn: Callable[[nn.Module, Any], tuple[Tensor, float]]
    num_probes: int
    num_steps: int


@dataclass(frozen=True)
class Timing:
    """What one case gave; times in seconds, one a round."""

    name: str
    parameters: int
    blocks: int
    num_probes: int
    num_steps: int
    hvps: int
    paper_seconds: list[float]
    blockhess_seconds: list[float]
    trace_difference: float
    density_difference: float

    @property
    def paper(self) -> float:
        """Median of the paper's procedure."""
        return statistics.median(self.paper_seconds)

    @property
    def ours(self) -> float:
        """Median of blockhess."""
        return statistics.median(self.blockhess_seconds)

    @property
    def ratio(self) -> float:
        """How many times faster blockhess is."""
        return self.paper / self.ours


def image_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, float]:
    images, labels = batch
    return F.cross_entropy(model(images), labels), float(len(labels))


def cases(quick: bool) -> list[Case]:
    text = shakespeare()
    torch.manual_seed(SEED)
    layers, width, context, windows = (1, 32, 16, 4) if quick else (4, 128, 64, 8)
    gpt = GPT(GPTConfig(len(text.vocabulary), context, layers, num_heads=4, width=width))
    tokens = text.batches(batch_size=windows, context=context, seed=SEED)

    width, stages, images = (4, (1,), 8) if quick else (16, (1, 1, 1), 32)
    resnet = ResNet(ResNetConfig(width, stages, num_classes=10, in_channels=1, stem="small")).eval()
    num_steps = 4 if quick else 5
    return [
        Case(f"GPT, {windows * context} tokens", gpt, tokens, next_token_loss, 2, num_steps),
        Case(f"ResNet, {images} images", resnet, [fashion_mnist(images)], image_loss, 2, num_steps),
    ]


def run_blockhess(case: Case) -> blockhess.Spectra:
    return blockhess.spectrum(
        case.model,
        case.batches,
        case.loss_fn,
        num_probes=case.num_probes,
        num_steps=case.num_steps,
        seed=SEED,
        reorthogonalize="none",
        engine="autograd",  # so few products pay for nothing else, and both sides take the same probes
        progress=False,
    )


def run_paper(case: Case, probes: list[dict[str, Tensor]]) -> Quadratures:
    # Fused attention has no second derivative; blockhess makes the same choice by itself.
    with sdpa_kernel(SDPBackend.MATH):
        return paper_spectrum(case.model, case.batches, case.loss_fn, probes, case.num_steps)


def probes_of(spectra: blockhess.Spectra) -> list[dict[str, Tensor]]:
    """The random vectors that a result was made with: the first input of any operator of these dims and ids."""
    q, seen = spectra.quadrature, []

    def operator(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return v

    batched_slq(operator, q.dims, num_probes=q.num_probes, num_steps=1, seed=q.seed, block_ids=q.block_ids)
    shapes = [block.shape for block in spectra.blocks]
    return [
        {name: part.view(shape) for name, part, shape in zip(spectra.names, probe.split(q.dims), shapes)}
        for probe in seen[0]
    ]


def differences(spectra: blockhess.Spectra, paper: Quadratures) -> tuple[float, float]:
    """The largest difference of v^T H v relative to |H|, and the largest L1 distance of a density."""
    traces, densities = [], []
    for name in spectra.names:
        ours = spectra[name]
        n_probes = len(ours.nodes)
        theirs = [(torch.from_numpy(nodes), torch.from_numpy(weights)) for nodes, weights in paper[name]]
        size = max(float(ours.nodes.abs().max()), 1e-30)
        for p, (nodes, weights) in enumerate(theirs):
            moments = (ours.weights[p] @ ours.nodes[p], weights @ nodes)
            traces.append(abs(float(moments[0] - moments[1])) / size)

        nodes = torch.cat([ours.nodes.flatten(), *(nodes for nodes, _ in theirs)])
        sigma = max(0.01 * float(nodes.max() - nodes.min()), 1e-6 * size)
        grid = node_grid(nodes, sigma)
        own = smooth(ours.nodes.reshape(1, -1), ours.weights.reshape(1, -1) / n_probes, grid, sigma)[0]
        other_nodes, other_weights = (torch.cat(parts)[None] for parts in zip(*theirs))
        other = smooth(other_nodes, other_weights / n_probes, grid, sigma)[0]
        densities.append(float(torch.trapezoid((own - other).abs(), grid)))
    return max(traces), max(densities)


def measure(case: Case, rounds: int) -> Timing:
    """Compare the results of both sides, then time them in turn.

    Raises:
        RuntimeError: the results differ.
    """
    spectra = run_blockhess(case)
    probes = probes_of(spectra)
    trace, density = differences(spectra, run_paper(case, probes))
    if not (trace <= LARGEST_TRACE_DIFFERENCE and density <= LARGEST_DENSITY_DIFFERENCE):
        raise RuntimeError(
            f"{case.name}: results differ, nothing was timed: traces by {trace:.2g} of |H| (at most "
            f"{LARGEST_TRACE_DIFFERENCE:.2g}), densities by {density:.2g} (at most {LARGEST_DENSITY_DIFFERENCE})"
        )
    paper_seconds, blockhess_seconds = [], []
    for _ in range(rounds):
        start = time.perf_counter()
        run_paper(case, probes)
        middle = time.perf_counter()
        run_blockhess(case)
        paper_seconds.append(middle - start)
        blockhess_seconds.append(time.perf_counter() - middle)
    return Timing(
        name=case.name,
        parameters=sum(spectra.dims),
        blocks=len(spectra),
        num_probes=case.num_probes,
        num_steps=case.num_steps,
        hvps=spectra.provenance["hvps"],
        paper_seconds=paper_seconds,
        blockhess_seconds=blockhess_seconds,
        trace_difference=trace,
        density_difference=density,
    )


def markdown(timings: list[Timing], vector_sets: float, environment: dict[str, str | int]) -> str:
    lines = [
        "| model | parameters | blocks | block-HVPs | paper, s | blockhess, s | ms per HVP | times faster |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for t in timings:
        each = f"{1e3 * t.paper / t.hvps:.1f} -> {1e3 * t.ours / t.hvps:.1f}"
        lines.append(
            f"| {t.name} | {t.parameters:,} | {t.blocks} | {t.hvps:,} | {t.paper:.2f} | {t.ours:.2f} | {each} "
            f"| {t.ratio:.2f} |"
        )
    lines += [
        "",
        f"Medians of {len(timings[0].paper_seconds)} rounds in turn; traces agree within "
        f"{max(t.trace_difference for t in timings):.1g} of |H|, densities within "
        f"{max(t.density_difference for t in timings):.1g} (L1).",
        f"Peak memory of batched_slq without reorthogonalisation: {vector_sets:.2f} vector sets of n_probes x n.",
        ", ".join(f"{key} {value}" for key, value in environment.items()),
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write everything measured to this file")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for both sides (default 1)")
    parser.add_argument("--quick", action="store_true", help="tiny models and one round: checks, not timings")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    for name, value in (("rounds", rounds), ("threads", options.threads)):
        if value < 1:
            parser.error(f"--{name} must be at least 1, got {value}")
    torch.set_num_threads(options.threads)

    try:
        timings = [measure(case, rounds) for case in cases(options.quick)]
    except RuntimeError as error:
        print(f"bench_slq: {error}", file=sys.stderr)
        return 1
    # Five vectors over blocks from 2^10 to 2^22 elements; a set is 170 MB, or 42 MB where that will do.
    dims = [2**k for k in range(10, 21 if options.quick else 23)]
    vector_sets = peak_vector_sets(5, dims, num_steps=5)
    environment = describe()
    print(markdown(timings, vector_sets, environment))
    if options.json:
        result = {
            "environment": environment,
            "timings": [asdict(t) | {"paper": t.paper, "blockhess": t.ours, "ratio": t.ratio} for t in timings],
            "peak_vector_sets": vector_sets,
        }
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
