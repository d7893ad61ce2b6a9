"""`blockhess demo`: do the Hessian spectra of a Transformer differ more from block to block than those of a CNN?

A small GPT on Shakespeare and a small ResNet on Fashion-MNIST, both at initialization, with one block per parameter
tensor. BatchNorm uses the statistics of the batch, as in training. The reading follows from the measured numbers,
whether or not they agree with the paper (Zhang et al. 2024).
"""

from __future__ import annotations

import importlib.util
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

import blockhess
from blockhess._text import format_table, printable
from blockhess.cli.job_file import on_device
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess.problem.model_state import setting
from blockhess.report.plots import plot_models, save_figure
from blockhess.results.files import writable_folder
from blockhess.spectra import Spectra

CONFIDENCE = 0.95
TEXT_WIDTH = 110

NOTE = """\
Curvature spread: standard deviation of log10 of the largest |eigenvalue| of the weight blocks, in decades. JS0: mean
Jensen-Shannon distance between the spectra of all blocks, from 0 to 1. Intervals: 95 %, for random probes and
finite steps, given these weights and data."""

CAVEAT = (
    "These are two small models at initialization, with one seed and few data: which optimizer is better is decided by "
    "training with both."
)


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


Interval = tuple[float, float, float] | None


def order(gpt: Interval, resnet: Interval) -> str:
    """Return which model has the larger value: "GPT", "ResNet", or "" if the intervals overlap or one is missing."""
    if gpt is None or resnet is None:
        return ""
    if gpt[0] > resnet[1]:
        return "GPT"
    return "ResNet" if resnet[0] > gpt[1] else ""


def reading(spread: str, js0: str) -> list[str]:
    """Return three sentences on the models of larger curvature spread and JS0, see order."""
    first = {
        "GPT": "The largest eigenvalues of the GPT's weight blocks spread more widely: one learning rate for all "
        "blocks suits it worse than the ResNet, which is the paper's reason why Transformers need Adam.",
        "ResNet": "The largest eigenvalues of the ResNet's weight blocks spread more widely: one learning rate for all "
        "blocks suits it worse than the GPT, against the paper's reading.",
        "": "The curvature spreads of the two models are not apart beyond their errors.",
    }[spread]
    if not js0:
        second = "JS0 does not order the two models: its intervals overlap, and narrow with more --steps."
    else:
        second = f"The whole spectra of the {js0}'s blocks, by JS0, differ more from each other."
    return [first, second, CAVEAT]


def summarize(results: Mapping[str, Spectra]) -> tuple[str, dict[str, Any]]:
    """Return comparison.txt, which compares the GPT and the ResNet, and its numbers as JSON values."""
    spreads = {name: spectra.curvature_spread(CONFIDENCE) for name, spectra in results.items()}
    js0s = {name: spectra.js0(confidence=CONFIDENCE) for name, spectra in results.items()}
    header = ["model", "blocks", "curvature spread", "interval", "sharpest / flattest", "JS0", "interval"]
    lines = []
    for name, js0 in js0s.items():
        spread = spreads[name]
        assert spread is not None and js0.interval is not None
        values = [f"{spread.value:.2f}", _interval(spread.interval), f"{float(f'{spread.ratio:.2g}'):,g}"]
        lines.append([name, str(len(js0.blocks)), *values, f"{js0.value:.2f}", _interval(js0.interval)])
    sentences = reading(
        order(*(spread.interval if spread else None for spread in spreads.values())),
        order(*(js0.interval for js0 in js0s.values())),
    )
    filled = [textwrap.fill(f"{i}. {text}", TEXT_WIDTH, subsequent_indent="   ") for i, text in enumerate(sentences, 1)]
    found = {
        name: {"curvature_spread": spread and spread.to_dict(), "js0": asdict(js0s[name])}
        for name, spread in spreads.items()
    }
    return "\n".join([format_table(header, lines), "", NOTE, "", *filled]), found | {"reading": sentences}


def _interval(interval: Interval) -> str:
    return "-" if interval is None else f"{interval[0]:.2f} ... {interval[1]:.2f}"


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
    """One model with its data, as arguments of `spectrum`, and its name."""

    name: str
    title: str
    model: nn.Module
    data: Any
    loss_fn: Callable[..., Any]
    batchnorm: str = "eval"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `spectrum`."""
        return {name: getattr(self, name) for name in ("model", "data", "loss_fn", "batchnorm")}


def subjects(size: Size, seed: int) -> list[Subject]:
    """Return the GPT and the ResNet."""
    windows = shakespeare().batches(batch_size=size.windows, context=size.gpt.context, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        gpt, resnet = GPT(size.gpt), ResNet(size.resnet)
    on_text = f"GPT on {size.windows * size.gpt.context} characters of Shakespeare"
    on_images = f"ResNet on {size.images} images of Fashion-MNIST, BatchNorm with batch statistics"
    return [
        Subject("GPT", on_text, gpt, windows, next_token_loss),
        Subject("ResNet", on_images, resnet, fashion_mnist(size.images), nn.CrossEntropyLoss(), "batch"),
    ]


def gpt_job() -> dict[str, Any]:
    """Return the demo's GPT as arguments of `spectrum`: a job of `blockhess plan` and `blockhess run`."""
    return subjects(FULL, seed=0)[0].arguments()


def resnet_job() -> dict[str, Any]:
    """Return the demo's ResNet, likewise."""
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
    device: str | None = None,
) -> dict[str, Any]:
    """Run the demo: print and write a comparison of both models, their results and one picture of both.

    Every result is written as soon as it is computed.

    Args:
        out: folder, made if it is missing; files of an earlier demo are replaced.
        num_probes, num_steps: of every spectrum; None means as many as `spectrum` needs by default, and 2 probes of 8
            steps with quick.
        seed: of the weights, the text windows and the probes.
        quick: use the tiny size, for a smoke test.
        tol, tol_sigma: as for `spectrum`; num_probes and num_steps then are upper limits.
        device: of models and data, such as "cuda"; None means the CPU.

    Returns:
        The numbers and the reading of the comparison, as JSON values.

    Raises:
        ValueError: the folder cannot be written, a number is out of range, or there is no such device.
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
    options: dict[str, Any] = {
        "num_probes": num_probes,
        "num_steps": num_steps,
        "tol": tol,
        "tol_sigma": tol_sigma,
        "seed": seed,
    }
    results: dict[str, Spectra] = {}
    for subject in subjects(size, seed):
        print(subject.title, flush=True)
        arguments = subject.arguments() if device is None else on_device(subject.arguments(), device)
        spectra = results[subject.name] = blockhess.spectrum(**arguments, **options)
        spectra.save(folder / f"{subject.name.lower()}.npz")
        p = spectra.provenance
        print(f"  {len(spectra.names)} blocks, {p['hvps']} Hessian-vector products, {p['seconds']:.0f} s", flush=True)

    text, found = summarize(results)
    (folder / "comparison.txt").write_text(f"{text}\n")
    save_figure(plot_models(results), folder / "comparison.png")
    print(f"\n{text}\n\nDone in {time.perf_counter() - start:.0f} s. Written to {printable(folder)}/:")
    print("  comparison.png  the spectra of all blocks, and their distances, of both models")
    print("  comparison.txt  this table and text")
    for name in results:
        file = f"{name.lower()}.npz"
        print(f"  {file:<14}  every block: blockhess show {printable(folder / file)}")
    return found
