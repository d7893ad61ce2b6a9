"""`blockhess demo`: does the Hessian of a Transformer differ more from block to block than that of a CNN?

A small GPT on Shakespeare and a small ResNet on Fashion-MNIST, both at initialization, with one block per parameter
tensor, and the ResNet with both BatchNorm statistics. The conclusions follow from the measured numbers, whether or not
they agree with the paper (Zhang et al. 2024).
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
from blockhess.analysis.axes import Axis
from blockhess.analysis.curvature_spread import curvature_spread
from blockhess.analysis.jensen_shannon import js_matrix
from blockhess.analysis.selection import distributions, weights_only
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess.problem.model_state import setting
from blockhess.report.rows import to_json
from blockhess.report.text import describe
from blockhess.results.files import writable_folder
from blockhess.spectra import Spectra

PAPER_SIGMA = 1e-5**0.5  # of the paper's code, whatever the scale of the loss

CLEAR_FACTOR = 10  # the ratio above which the curvature factors of two models are called different
TEXT_WIDTH = 110

BATCHNORM_MEANINGS = {
    "eval": "running statistics, as in the paper's code",
    "batch": "statistics of the batch, as in training",
}

JS0_TITLE = """\
How much do the spectra of a model's blocks differ? JS0, the mean Jensen-Shannon distance over all pairs of blocks,
base 2: 0 if all are equal, 1 if no two overlap. On the signed-log axis flat and sharp blocks are resolved, on the
linear axis the sharpest. "noise": an upper estimate of what the random probes add to it."""

CURVATURE_TITLE = """\
How much do they differ in size? The largest |eigenvalue| of a weight block is what limits its learning rate."""

PAPERS_READING = """\
The paper's reading: where all blocks have similar Hessian spectra (small JS0, CNNs), one learning rate suits them
all and SGD does as well as Adam; where spectra differ from block to block (large JS0, Transformers), SGD's one rate
is wrong for most of them, and Adam's rates per coordinate are needed."""

CAVEATS = """\
Before you quote any of this:
- JS0 depends on the BatchNorm statistics. Running statistics are the identity at initialization, so 'eval' is a
  network without normalization; 'batch' is what training differentiates.
- JS0 depends on axis and sigma. On the linear axis, with 1% of a model's own range, all blocks far flatter than the
  sharpest look like one spike at 0. A fixed sigma resolves smaller eigenvalues, but depends on the scale of the loss,
  and far below range / steps it resolves single Lanczos nodes instead of a density.
- The noise is the distance of a block to itself, from two halves of the probes; more --probes make it smaller. It
  does not contain the error of too few --steps.
- These are tiny models at initialization, one seed, few samples. The paper's JS0 (0.10 for ResNet18, 14.93 for a
  GPT of 10.7M) has no published definition and is not on this scale, which ends at 1.
- Spectra describe the loss surface. Which optimizer is better is decided by training with both."""

# Winners of the clear rows -> conclusion.
CONCLUSIONS = {
    (): "No row is clear: the noise of the probes hides any difference between the two models, so these numbers say "
    "nothing about the paper's reading. Take more probes.",
    ("GPT",): "Wherever the answer is clear ({clear}), the GPT's blocks differ more from each other than the "
    "ResNet's. That agrees with the paper's reading: one learning rate (SGD) should suit the ResNet better than the "
    "GPT, which should gain more from Adam.",
    ("ResNet",): "Wherever the answer is clear ({clear}), the ResNet's blocks differ more from each other than the "
    "GPT's. That is the opposite of what the paper's reading expects, and no reason to think that the GPT needs Adam "
    "more.",
    (
        "GPT",
        "ResNet",
    ): "The rows disagree: the paper's reading holds for some choices of axis, sigma, blocks and BatchNorm "
    "statistics and not for others, so JS0 alone does not say that the GPT needs Adam and the ResNet does not.",
}


@dataclass(frozen=True)
class Size:
    """Sizes of the models, of the data and of the estimate; None means `spectrum`'s defaults."""

    gpt: GPTConfig
    resnet: ResNetConfig
    windows: int
    images: int
    num_probes: int | None = None
    num_steps: int | None = None


FULL = Size(
    GPTConfig(vocab_size=76, context=64, num_layers=2, num_heads=4, width=64),
    ResNetConfig(width=8, blocks_per_stage=(1, 1, 1), num_classes=10, in_channels=1, stem="small"),
    windows=8, images=32,
)  # fmt: skip
QUICK = Size(
    GPTConfig(vocab_size=76, context=16, num_layers=1, num_heads=2, width=16),
    ResNetConfig(width=4, blocks_per_stage=(1,), num_classes=10, in_channels=1, stem="small"),
    windows=4, images=8, num_probes=2, num_steps=8,
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """JS0 of both models for one axis and sigma, one set of blocks and one choice of BatchNorm statistics."""

    axis: str
    blocks: str
    batchnorm: str  # of the ResNet
    gpt: float
    gpt_noise: float  # upper estimate of what the random probes add to JS0; NaN if unknown
    resnet: float
    resnet_noise: float

    @property
    def winner(self) -> str:
        """The more heterogeneous model: "GPT", "ResNet", or "unclear" if noise may explain the difference."""
        if self.gpt - self.gpt_noise > self.resnet:
            return "GPT"
        return "ResNet" if self.resnet - self.resnet_noise > self.gpt else "unclear"


def probe_noise(spectra: Spectra, sigma: float, blocks: Sequence[str], axis: Axis) -> float:
    """Return the mean Jensen-Shannon distance between two estimates of the same block, each from half of the probes.

    The divergence is convex, so random probes increase a distance on average; by the triangle inequality, by at most
    about this much. NaN with a single probe.
    """
    half = spectra.quadrature.num_probes // 2
    if half == 0:
        return math.nan
    count = len(blocks)
    halves = (list(range(half)), list(range(half, 2 * half)))
    nodes, weights = map(torch.cat, zip(*(distributions(spectra, blocks, axis, probes) for probes in halves)))
    return float(js_matrix(nodes, weights, sigma=sigma)[:count, count:].diagonal().mean())


def compare(gpt: Spectra, resnet: Spectra) -> list[Comparison]:
    """Return JS0 of both models on the signed-log axis, on the linear axis with two sigmas, for two sets of blocks."""
    comparisons = []
    rules: dict[str, dict[str, Any]] = {
        "signed-log, 1% of range": {},
        "linear, 1% of range": {"axis": "linear"},
        f"linear, {PAPER_SIGMA:.3g} (paper)": {"axis": "linear", "sigma": PAPER_SIGMA},
    }
    for rule, options in rules.items():
        for blocks in ("all", "weights only"):
            values = []
            for spectra in (gpt, resnet):
                names = spectra.comparable_blocks() if blocks == "all" else weights_only(spectra)
                js0 = spectra.js0(**options, blocks=names)
                axis = Axis(js0.axis, js0.normalize, js0.scale)
                values += [js0.value, probe_noise(spectra, js0.sigma, names, axis)]
            comparisons.append(Comparison(rule, blocks, str(resnet.provenance["batchnorm"]), *values))
    return comparisons


def _factor(curvatures: tuple[float, float]) -> float:
    flattest, sharpest = curvatures
    return sharpest / flattest if flattest > 0 else math.inf


def _brief(factor: float) -> str:
    """Two digits, as 3.6 or 610,000."""
    return f"{float(f'{factor:.2g}'):,g}"


def curvature_verdict(gpt: tuple[float, float], resnets: Sequence[tuple[float, float]]) -> str:
    """Return what the largest |eigenvalue| of the flattest and sharpest blocks say about one learning rate for all."""
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
    """Return what the comparisons say about the paper's reading."""
    lines = []
    for batchnorm, meaning in BATCHNORM_MEANINGS.items():
        winners = [c.winner for c in comparisons if c.batchnorm == batchnorm]
        counts = ", ".join(f"{name} in {winners.count(name)}" for name in ("GPT", "ResNet", "unclear"))
        lines.append(f"BatchNorm {batchnorm!r} ({meaning}), {len(winners)} rows: {counts}.")
    winners = [c.winner for c in comparisons if c.winner != "unclear"]
    conclusion = CONCLUSIONS[tuple(sorted(set(winners)))]
    filled = textwrap.fill(conclusion.format(clear=f"{len(winners)} of {len(comparisons)} rows"), TEXT_WIDTH)
    return "\n".join([*lines, filled])


def summarize(comparisons: Sequence[Comparison], ranges: Mapping[str, tuple[float, float]]) -> str:
    """Return comparison.txt: tables of the comparisons and of the ends of every curvature spread, and conclusions."""
    header = ["axis and sigma", "blocks", "BatchNorm", "GPT", "noise", "ResNet", "noise", "more heterogeneous"]
    values = [[c.gpt, c.gpt_noise, c.resnet, c.resnet_noise] for c in comparisons]
    rows = [[c.axis, c.blocks, c.batchnorm, *(f"{x:.3f}" for x in v), c.winner] for c, v in zip(comparisons, values)]
    js0_table = format_table(header, rows, left=3)
    header = ["largest |eigenvalue|", "flattest block", "sharpest block", "factor"]
    table = format_table(header, [[stem, *map(number, r), _brief(_factor(r))] for stem, r in ranges.items()])
    of_gpt, *of_resnets = ranges.values()
    verdicts = [js0_verdict(comparisons), textwrap.fill(curvature_verdict(of_gpt, of_resnets), TEXT_WIDTH)]
    return "\n\n".join([JS0_TITLE, js0_table, CURVATURE_TITLE, table, PAPERS_READING, *verdicts, CAVEATS])


@contextmanager
def one_thread() -> Iterator[None]:
    """Run PyTorch on one thread.

    These tensors are too small to gain from more, and on a busy machine threads that wait for each other in every
    operation are several times slower than one.
    """
    with setting(torch.get_num_threads, torch.set_num_threads, 1):
        yield


@dataclass(frozen=True)
class Subject:
    """One model with its data, as arguments of `spectrum`, and the stem of its files."""

    stem: str
    title: str
    model: nn.Module
    data: Any
    loss_fn: Callable[..., Any]
    batchnorm: str = "eval"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `spectrum`."""
        return {name: getattr(self, name) for name in ("model", "data", "loss_fn", "batchnorm")}


def subjects(size: Size, seed: int) -> list[Subject]:
    """Return the GPT, and the ResNet twice: the same weights with either choice of BatchNorm statistics."""
    windows = shakespeare().batches(batch_size=size.windows, context=size.gpt.context, seed=seed)
    images, loss = fashion_mnist(size.images), nn.CrossEntropyLoss()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gpt, resnet = GPT(size.gpt), ResNet(size.resnet)
    on_text = f"GPT on {size.windows * size.gpt.context} characters of Shakespeare"
    on_images = f"ResNet on {size.images} images of Fashion-MNIST, BatchNorm"
    found = [Subject("gpt", on_text, gpt, windows, next_token_loss)]
    for policy, meaning in BATCHNORM_MEANINGS.items():
        found += [Subject(f"resnet_{policy}", f"{on_images} {policy!r}: {meaning}", resnet, images, loss, policy)]
    return found


def gpt_job() -> dict[str, Any]:
    """Return the demo's GPT as arguments of `spectrum`: a job of `blockhess plan` and `blockhess run`."""
    return subjects(FULL, seed=0)[0].arguments()


def resnet_job() -> dict[str, Any]:
    """Return the demo's ResNet, with BatchNorm "eval", likewise."""
    return subjects(FULL, seed=0)[1].arguments()


@one_thread()
def run(
    out: str | PathLike[str],
    *,
    num_probes: int | None = None,
    num_steps: int | None = None,
    seed: int = 0,
    quick: bool = False,
    tol: float | None = None,
    tol_sigma: float | None = None,
) -> dict[str, Any]:
    """Run the demo: print tables, JS0 and conclusions, and write results and pictures into a folder.

    Every result is written as soon as it is computed.

    Args:
        out: folder, made if it is missing; files of an earlier demo are replaced.
        num_probes, num_steps: of every spectrum; None means as many as `spectrum` needs by default, and 2 probes of 8
            steps with quick.
        seed: of the weights, the text windows and the probes.
        quick: use the tiny size, for a smoke test.
        tol, tol_sigma: as for `spectrum`; num_probes and num_steps then are upper limits.

    Returns:
        The contents of comparison.json.

    Raises:
        ValueError: the folder cannot be written, or a number is out of range.
        ImportError: matplotlib is missing.

    Example:
        >>> run("blockhess-demo", quick=True)
    """
    size = QUICK if quick else FULL
    num_probes = size.num_probes if num_probes is None else num_probes
    num_steps = size.num_steps if num_steps is None else num_steps
    for name, value, least in (("num_probes", num_probes, 1), ("num_steps", num_steps, 1), ("seed", seed, 0)):
        if value is not None and not least <= value < 2**63:
            rule = f"at least {least}" if value < least else "below 2^63"
            raise ValueError(f"demo: {name} must be {rule}, got {value}")
    folder = writable_folder(out)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('demo: pictures need matplotlib; type: pip install "blockhess[cli]"')

    start = time.perf_counter()
    results: dict[str, Spectra] = {}
    for subject in (todo := subjects(size, seed)):
        print(f"[{len(results) + 1}/{len(todo)}] {subject.title}", flush=True)
        options = {"num_probes": num_probes, "num_steps": num_steps, "tol": tol, "tol_sigma": tol_sigma, "seed": seed}
        spectra = blockhess.spectrum(**subject.arguments(), **options)
        spectra.save(folder / f"{subject.stem}.npz")
        text = describe(spectra)
        print(f"{text}\n", flush=True)
        (folder / f"{subject.stem}.txt").write_text(f"{subject.title}\n{text}\n")
        spectra.plot(folder / f"{subject.stem}_spectra.png")
        spectra.heatmap(folder / f"{subject.stem}_heatmap.png")
        results[subject.stem] = spectra

    comparisons = [c for stem in results if stem != "gpt" for c in compare(results["gpt"], results[stem])]
    spreads = {stem: spread for stem, spectra in results.items() if (spread := curvature_spread(spectra))}
    ranges = {stem: (spread.smallest, spread.largest) for stem, spread in spreads.items()}
    summary = summarize(comparisons, ranges)
    (folder / "comparison.txt").write_text(f"{summary}\n")
    found = {"js0": [asdict(c) | {"winner": c.winner} for c in comparisons], "largest_eigenvalue": ranges}
    (folder / "comparison.json").write_text(to_json(found))
    print(
        f"{summary}\n\nDone in {time.perf_counter() - start:.0f} s. Written to {folder}/:\n"
        f"  {', '.join(ranges)}: each .npz (blockhess show reads it), .txt, _spectra.png, _heatmap.png\n"
        "  comparison.txt, comparison.json"
    )
    return found
