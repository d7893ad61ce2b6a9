"""The main job: is a Transformer's Hessian more heterogeneous, block by block, than a CNN's? On real data, in minutes.

A small GPT on Shakespeare and a small ResNet on Fashion-MNIST, both at initialisation, every parameter tensor a block,
the ResNet under both BatchNorm policies. The verdict is derived from the measured numbers and says so where they do
not support the paper (Zhang et al. 2024). Every result is written as soon as it is there.
"""

from __future__ import annotations

import importlib.util
import math
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

import blockhess
from blockhess._text import format_table, number
from blockhess.analysis.jensen_shannon import js_matrix
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess.report.rows import to_json
from blockhess.report.text import curvature_range, describe, weights_only
from blockhess.results.files import writable_folder
from blockhess.spectra import Spectra

# The paper's code smooths with sigma^2 = 1e-5 whatever the scale of the loss.
PAPER_SIGMA = 1e-5**0.5

# Factors between blocks tell two models apart if one is this many times the other.
CLEAR_FACTOR = 10

TEXT_WIDTH = 110

BATCHNORM_MEANINGS = {
    "eval": "running statistics, as in the paper's code",
    "batch": "statistics of the batch, as in training",
}


@dataclass(frozen=True)
class Size:
    """How large the models, the data and the estimate are."""

    layers: int
    width: int
    heads: int
    context: int
    windows: int
    resnet_width: int
    resnet_stages: int
    images: int
    num_probes: int
    num_steps: int


FULL = Size(2, 64, 4, 64, 8, resnet_width=8, resnet_stages=3, images=32, num_probes=6, num_steps=40)
QUICK = Size(1, 16, 2, 16, 4, resnet_width=4, resnet_stages=1, images=8, num_probes=2, num_steps=8)


@dataclass(frozen=True)
class Comparison:
    """JS0 of the GPT and the ResNet under one sigma rule, block set and BatchNorm policy.

    Attributes:
        sigma, blocks: the rule and the block set, in words.
        batchnorm: policy of the ResNet.
        gpt, resnet: JS0.
        gpt_noise, resnet_noise: by how much the random probes may have raised each of them; NaN where unknown.
    """

    sigma: str
    blocks: str
    batchnorm: str
    gpt: float
    gpt_noise: float
    resnet: float
    resnet_noise: float

    @property
    def winner(self) -> str:
        """The more heterogeneous model: "GPT", "ResNet", or "unclear" where noise may explain the difference."""
        if self.gpt - self.gpt_noise > self.resnet:
            return "GPT"
        if self.resnet - self.resnet_noise > self.gpt:
            return "ResNet"
        return "unclear"


def probe_noise(spectra: Spectra, sigma: float, blocks: Sequence[str]) -> float:
    """Return the mean Jensen-Shannon distance between two estimates of the same block, each from half of the probes.

    Random probes raise a distance on average (the divergence is convex), by about this much at most (triangle
    inequality). NaN with a single probe.

    Args:
        spectra: a result with at least two probes.
        sigma: width of the Gaussian.
        blocks: names.
    """
    half = spectra.quadrature.num_probes // 2
    if half == 0:
        return math.nan
    rows = spectra.rows(blocks)
    halves = (slice(0, half), slice(half, 2 * half))
    parts = [spectra.quadrature.of_probes(probes).merged() for probes in halves]
    nodes = torch.cat([nodes[rows] for nodes, _ in parts])
    weights = torch.cat([weights[rows] for _, weights in parts])
    return float(js_matrix(nodes, weights, sigma=sigma)[: len(rows), len(rows) :].diagonal().mean())


def compare(gpt: Spectra, resnet: Spectra) -> list[Comparison]:
    """Return JS0 of both models under two sigma rules and for two block sets."""
    comparisons = []
    for rule, sigma in (("1% of own range", None), (f"{PAPER_SIGMA:.3g} (paper)", PAPER_SIGMA)):
        for blocks in ("all", "weights only"):
            values = []
            for spectra in (gpt, resnet):
                names = spectra.comparable_blocks() if blocks == "all" else weights_only(spectra)
                js0 = spectra.js0(sigma=sigma, blocks=names)
                values += [js0.value, probe_noise(spectra, js0.sigma, names)]
            comparisons.append(Comparison(rule, blocks, str(resnet.provenance["batchnorm"]), *values))
    return comparisons


def comparison_table(comparisons: Sequence[Comparison]) -> str:
    """Return the comparisons as aligned text, one a line."""
    header = ["sigma", "blocks", "BatchNorm", "GPT", "noise", "ResNet", "noise", "more heterogeneous"]
    rows = []
    for c in comparisons:
        values = (c.gpt, c.gpt_noise, c.resnet, c.resnet_noise)
        rows.append([c.sigma, c.blocks, c.batchnorm, *(f"{value:.3f}" for value in values), c.winner])
    return format_table(header, rows, left=3)


def curvature_table(ranges: Mapping[str, tuple[float, float]]) -> str:
    """Return the curvature_range of every result as aligned text, one a line."""
    rows = [
        [name, number(flattest), number(sharpest), _brief(_factor((flattest, sharpest)))]
        for name, (flattest, sharpest) in ranges.items()
    ]
    return format_table(["largest |eigenvalue|", "flattest block", "sharpest block", "factor"], rows)


def _factor(curvatures: tuple[float, float]) -> float:
    flattest, sharpest = curvatures
    return sharpest / flattest if flattest > 0 else math.inf


def _brief(factor: float) -> str:
    """Two digits, as 3.6 or 610,000."""
    return f"{float(f'{factor:.2g}'):,g}"


def curvature_verdict(gpt: tuple[float, float], resnets: Sequence[tuple[float, float]]) -> str:
    """Return what the curvature_range of the models say about one learning rate for all blocks."""
    of_gpt, of_resnets = _factor(gpt), [_factor(resnet) for resnet in resnets]
    numbers = f"{_brief(of_gpt)} in the GPT, {' and '.join(map(_brief, of_resnets))} in the ResNet"
    if of_gpt > CLEAR_FACTOR * max(of_resnets):
        meaning = "by this measure one learning rate for all blocks suits the GPT worse, as the paper's reading has it"
    elif CLEAR_FACTOR * of_gpt < min(of_resnets):
        meaning = "by this measure one learning rate for all blocks suits the ResNet worse, against the paper's reading"
    else:
        meaning = "that is too close to tell the models apart"
    return f"Sharpest and flattest weights differ by a factor of {numbers}: {meaning}."


def js0_verdict(comparisons: Sequence[Comparison]) -> str:
    """Return what the comparisons say about the paper's reading, in words that follow from the numbers."""
    lines = []
    for policy, meaning in BATCHNORM_MEANINGS.items():
        winners = [c.winner for c in comparisons if c.batchnorm == policy]
        counts = ", ".join(f"{name} in {winners.count(name)}" for name in ("GPT", "ResNet", "unclear"))
        lines.append(f"BatchNorm {policy!r} ({meaning}), {len(winners)} rows: {counts}.")

    winners = [c.winner for c in comparisons if c.winner != "unclear"]
    clear = f"{len(winners)} of {len(comparisons)} rows"
    if not winners:
        conclusion = (
            "No row is clear: the noise of the probes hides any difference between the two models, so these "
            "numbers say nothing about the paper's reading. Take more probes."
        )
    elif set(winners) == {"GPT"}:
        conclusion = (
            f"Wherever the answer is clear ({clear}), the GPT's blocks differ more from each other than the "
            "ResNet's. That agrees with the paper's reading: one learning rate (SGD) should suit the ResNet better "
            "than the GPT, which should gain more from Adam."
        )
    elif set(winners) == {"ResNet"}:
        conclusion = (
            f"Wherever the answer is clear ({clear}), the ResNet's blocks differ more from each other than the "
            "GPT's. That is the opposite of what the paper's reading expects, and no reason to think that the GPT "
            "needs Adam more."
        )
    else:
        conclusion = (
            "The rows disagree: the paper's reading holds for some choices of sigma, blocks and BatchNorm policy "
            "and not for others, so JS0 alone does not say that the GPT needs Adam and the ResNet does not."
        )
    return "\n".join([*lines, textwrap.fill(conclusion, TEXT_WIDTH)])


JS0_TITLE = """\
How much do the spectra of a model's blocks differ? JS0, the mean Jensen-Shannon distance over all pairs of blocks,
base 2, linear axis: 0 where all are alike, 1 where they have nothing in common. "noise": what the random probes may
have added to it."""

CURVATURE_TITLE = """\
How much do they differ in size? The largest |eigenvalue| of a weight block is what limits its learning rate."""

PAPERS_READING = """\
The paper's reading: where all blocks have similar Hessian spectra (small JS0, CNNs), one learning rate suits them
all and SGD does as well as Adam; where spectra differ from block to block (large JS0, Transformers), SGD's one rate
is wrong for most of them, and Adam's rates per coordinate are needed."""

CAVEATS = """\
Before you quote any of this:
- JS0 depends on the BatchNorm policy. Running statistics are the identity at initialisation, so 'eval' looks at a
  network without normalisation; 'batch' is what training differentiates.
- JS0 depends on sigma. 1% of a model's own range does not care how the loss is scaled, but then blocks far flatter
  than the sharpest are all one spike at 0, and alike. A fixed sigma sees smaller eigenvalues, but depends on scale,
  and far below range / steps it resolves single Lanczos nodes instead of a density.
- The noise is the distance of a block to itself, from two halves of the probes; more --probes make it smaller. It
  does not contain what too few --steps do.
- These are tiny models at initialisation, one seed, few samples. The paper's JS0 (0.10 for ResNet18, 14.93 for a
  GPT of 10.7M) has no published definition and is not on this scale, which ends at 1.
- Spectra describe the loss surface. Which optimizer wins is decided by training with both."""


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread: these tensors are too small for two to be much faster.

    And where other programs keep the cores busy, threads that wait for each other in every operation are several times
    slower than one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Subject:
    """One model on its data, as spectrum takes them, and the stem of its files."""

    stem: str
    title: str
    model: nn.Module
    data: Any
    loss_fn: Callable[..., Any]
    batchnorm: str = "eval"


def subjects(size: Size, seed: int) -> list[Subject]:
    """Return the GPT and, with the same weights under both BatchNorm policies, the ResNet; all at initialisation."""
    text = shakespeare()
    windows = text.batches(batch_size=size.windows, context=size.context, seed=seed)
    images = fashion_mnist(size.images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gpt = GPT(
            GPTConfig(
                vocab_size=len(text.vocabulary),
                context=size.context,
                num_layers=size.layers,
                num_heads=size.heads,
                width=size.width,
            )
        )
        resnet = ResNet(
            ResNetConfig(
                width=size.resnet_width,
                blocks_per_stage=(1,) * size.resnet_stages,
                num_classes=10,
                in_channels=1,
                stem="small",
            )
        )
    tokens = size.windows * size.context
    on_images = f"ResNet on {size.images} images of Fashion-MNIST"
    loss = nn.CrossEntropyLoss()
    return [
        Subject("gpt", f"GPT on {tokens} characters of Shakespeare", gpt, windows, next_token_loss),
        *(
            Subject(f"resnet_{policy}", f"{on_images}, BatchNorm {policy!r}: {meaning}", resnet, images, loss, policy)
            for policy, meaning in BATCHNORM_MEANINGS.items()
        ),
    ]


def gpt_job() -> dict[str, Any]:
    """The demo's GPT as arguments of `spectrum`: a job that `blockhess plan` takes."""
    return _job(subjects(FULL, seed=0)[0])


def resnet_job() -> dict[str, Any]:
    """The demo's ResNet, BatchNorm "eval", likewise."""
    return _job(subjects(FULL, seed=0)[1])


def _job(subject: Subject) -> dict[str, Any]:
    return {
        "model": subject.model,
        "data": subject.data,
        "loss_fn": subject.loss_fn,
        "batchnorm": subject.batchnorm,
        "num_probes": FULL.num_probes,
        "num_steps": FULL.num_steps,
    }


@one_thread()
def run(
    out: str | PathLike[str],
    *,
    num_probes: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    tol: float | None = None,
    sigma: float | None = None,
) -> dict[str, Any]:
    """Run the demo: print tables, JS0 and what they suggest; write results and pictures into a folder.

    Args:
        out: folder, made where it is missing; files of an earlier run are replaced.
        num_probes, num_steps: of every spectrum; None means the size's own.
        seed: of the weights, the windows of text and the probes.
        quick: take the tiny size, for a smoke test.
        tol, sigma: as for `spectrum`; num_probes and num_steps are then the most. JS0 has sigmas of its own.

    Returns:
        what comparison.json holds.

    Raises:
        ValueError: the folder cannot be written, or a number breaks its rule.
        ImportError: matplotlib is missing.

    Example:
        >>> run("blockhess-demo", quick=True)
    """
    size = QUICK if quick else FULL
    num_probes = size.num_probes if num_probes is None else num_probes
    num_steps = size.num_steps if num_steps is None else num_steps
    for name, value, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 1), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"demo: {name} must be at least {least}, got {value}")
        if value >= 2**63:
            raise ValueError(f"demo: {name} must be below 2^63, got {value}")
    folder = writable_folder(out)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('demo: pictures need matplotlib; type: pip install "blockhess[cli]"')

    start = time.perf_counter()
    results = []
    todo = subjects(size, seed)
    for position, subject in enumerate(todo, 1):
        print(f"[{position}/{len(todo)}] {subject.title}", flush=True)
        spectra = blockhess.spectrum(
            subject.model,
            subject.data,
            subject.loss_fn,
            num_probes=num_probes,
            num_steps=num_steps,
            tol=tol,
            sigma=sigma,
            seed=seed,
            batchnorm=subject.batchnorm,
        )
        spectra.save(folder / f"{subject.stem}.npz")
        text = describe(spectra)
        print(f"{text}\n", flush=True)
        (folder / f"{subject.stem}.txt").write_text(f"{subject.title}\n{text}\n")
        spectra.plot(folder / f"{subject.stem}_spectra.png")
        spectra.heatmap(folder / f"{subject.stem}_heatmap.png")
        results.append(spectra)

    gpt, *resnets = results
    comparisons = [comparison for resnet in resnets for comparison in compare(gpt, resnet)]
    ranges = {subject.stem: curvature_range(spectra) for subject, spectra in zip(todo, results)}
    of_gpt, *of_resnets = ranges.values()
    summary = "\n\n".join(
        [
            JS0_TITLE,
            comparison_table(comparisons),
            CURVATURE_TITLE,
            curvature_table(ranges),
            PAPERS_READING,
            js0_verdict(comparisons),
            textwrap.fill(curvature_verdict(of_gpt, of_resnets), TEXT_WIDTH),
            CAVEATS,
        ]
    )
    (folder / "comparison.txt").write_text(f"{summary}\n")
    found = {"js0": [asdict(c) | {"winner": c.winner} for c in comparisons], "largest_eigenvalue": ranges}
    (folder / "comparison.json").write_text(to_json(found))
    print(summary)
    print(
        f"\nDone in {time.perf_counter() - start:.0f} s. Written to {folder}/:\n"
        f"  {', '.join(ranges)}: each .npz (blockhess show reads it), .txt, _spectra.png, _heatmap.png\n"
        "  comparison.txt, comparison.json"
    )
    return found
