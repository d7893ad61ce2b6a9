"""Figure 1: spectra of the full Hessian at 0, 25, 50 and 100 % of the steps of a training, and of the blocks beside.

Each network is trained with what the paper's code bases take, SGD for CNNs, AdamW for Transformers. The paper's three
statements are counted, not looked at: dispersion (largest eigenvalue over the 10th), symmetry at initialisation (most
negative over most positive eigenvalue), and evolution (the share of negative eigenvalues' weight, sum |lambda| over the
negative ones relative to all).

FOLDER/checkpoints/NAME-STEP.pt are kept, with one spectrum each in FOLDER/evolution, so an interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import blockhess
from blockhess import fingerprint
from blockhess.files import writable_folder
from blockhess.measures import merge_probes
from blockhess.paper.architectures import ARCHITECTURES, Architecture
from blockhess.paper.pictures import new_figure
from blockhess.paper.results import Claim, Result, verdict
from blockhess.spectra import Spectra
from blockhess.table import format_table
from blockhess.training import load_checkpoint, save_checkpoint, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.0, 0.25, 0.5, 1.0)
QUICK_SHARES = (0.0, 1.0)

# Network -> the paper's panel, optimizer, learning rate.
SUBJECTS = {
    "vgg-bn": ("VGG16", "SGD", 0.1),
    "resnet": ("ResNet18", "SGD", 0.1),
    "gpt-2": ("GPT2", "AdamW", 3e-3),
    "gpt-1": ("GPT2-nano", "AdamW", 3e-3),
    "vit-2": ("ViT-base", "AdamW", 3e-3),
}

NUM_STEPS, NUM_PROBES, LANCZOS_STEPS = 300, 2, 40
QUICK_STEPS, QUICK_PROBES, QUICK_LANCZOS = 8, 1, 5

# Spectra count as symmetric if the ends of the range are within this factor of each other.
SYMMETRIC = 3.0


@dataclass(frozen=True)
class Stage:
    """One checkpoint: the full Hessian's spectrum and the blocks'."""

    full: Spectra
    blocks: Spectra

    @property
    def nodes_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the full Hessian, (n,) each, by ascending node."""
        nodes, weights = (part[0] for part in merge_probes(self.full.quadrature))
        order = nodes.argsort()
        return nodes[order], weights[order]

    @property
    def tenth(self) -> float:
        """The 10th largest eigenvalue of the full Hessian."""
        return float(self.full.kth_eigenvalue(10)[0])

    @property
    def ends(self) -> tuple[float, float]:
        """Most negative and most positive eigenvalue."""
        low, high = self.full.eigenvalue_range()
        return float(low), float(high)

    @property
    def negative(self) -> float:
        """Sum of |lambda| over the negative eigenvalues, as a share of that over all."""
        nodes, weights = self.nodes_weights
        size = weights * nodes.abs()
        return float(size[nodes < 0].sum() / size.sum())


def run(*, seed: int = 0, quick: bool = False, folder: Path) -> Result:
    """Train, measure every checkpoint, and judge.

    Args:
        seed: of weights, batches and probes.
        quick: two networks, few steps.
        folder: keeps checkpoints and spectra.
    """
    subjects = dict(list(SUBJECTS.items())[1:4:2]) if quick else SUBJECTS
    num_steps = QUICK_STEPS if quick else NUM_STEPS
    found = {
        name: evolution(folder, name, optimizer, rate, num_steps, seed, quick)
        for name, (_, optimizer, rate) in subjects.items()
    }
    return judge(found, num_steps, seed)


def evolution(
    folder: Path, name: str, optimizer: str, rate: float, num_steps: int, seed: int, quick: bool
) -> list[Stage]:
    """Return the spectra at SHARES, or QUICK_SHARES, of a training, trained and measured unless kept."""
    architecture = ARCHITECTURES[name]
    steps = [round(share * num_steps) for share in (QUICK_SHARES if quick else SHARES)]
    paths = checkpoints(folder, architecture, name, optimizer, rate, num_steps, steps, seed)
    batch = architecture.batches(1, seed)
    stages = []
    for path in paths:
        model = architecture.model(seed)
        load_checkpoint(model, path)
        kept = writable_folder(folder / "evolution")
        spectra = []
        for blocks in ("full", "parameter"):
            file = kept / f"{path.stem}-{blocks}.npz"
            options: dict[str, Any] = {
                "num_probes": QUICK_PROBES if quick else NUM_PROBES,
                "num_steps": QUICK_LANCZOS if quick else LANCZOS_STEPS,
                "seed": seed,
            }
            before = blockhess.load(file) if file.exists() else None
            if before is None or not _same(before, model, options):
                before = blockhess.spectrum(model, batch, architecture.loss_fn, blocks=blocks, **options)
                before.save(file)
            spectra.append(before)
        stages.append(Stage(*spectra))
    return stages


def _same(spectra: Spectra, model: torch.nn.Module, options: Mapping[str, Any]) -> bool:
    q = spectra.quadrature
    made = {"num_probes": q.num_probes, "num_steps": q.num_steps, "seed": q.seed}
    return spectra.provenance["fingerprints"]["model"] == fingerprint.of_model(model) and made == options


def checkpoints(
    folder: Path,
    architecture: Architecture,
    name: str,
    optimizer: str,
    rate: float,
    num_steps: int,
    steps: Sequence[int],
    seed: int,
) -> list[Path]:
    """Return a checkpoint for each of some steps of a training; trains where one is missing.

    Raises:
        ValueError: the training diverged.
    """
    kept = writable_folder(folder / "checkpoints")
    paths = {step: kept / f"{name}-{optimizer}-{rate:g}-{seed}-{num_steps}-{step}.pt" for step in steps}
    if not all(path.exists() for path in paths.values()):
        training = train(
            architecture.model(seed),
            architecture.batches(num_steps, seed),
            architecture.loss_fn,
            optimizer=optimizer,
            rate=rate,
            num_steps=num_steps,
            warmup=num_steps // 20,
            clip=architecture.clip,
            at_steps={step: partial(save_checkpoint, path=path) for step, path in paths.items()},
        )
        if len(training.losses) < num_steps:
            raise ValueError(f"fig1: rate must keep the training finite, got {rate:g} for {optimizer} on {name}")
    return list(paths.values())


def judge(found: Mapping[str, Sequence[Stage]], num_steps: int, seed: int) -> Result:
    """Return what the stages say about Figure 1 and section 2.2."""
    rows, outlying, ratios, negatives = [], {}, {}, {}
    for name, stages in found.items():
        title = SUBJECTS[name][0]
        outlying[name] = [s.ends[1] / s.tenth for s in stages]
        low, high = stages[0].ends
        ratios[name] = max(-low / high, high / -low) if low < 0 else float("inf")
        negatives[name] = [s.negative for s in stages]
        for share, stage, out in zip(_shares(stages), stages, outlying[name]):
            low, high = stage.ends
            rows.append(
                [
                    title,
                    f"{100 * share:.0f} %",
                    f"{stage.full.provenance['loss_value']:.3f}",
                    f"{low:.3g}",
                    f"{high:.3g}",
                    f"{out:.2f}",
                    f"{stage.negative:.3f}",
                    f"{stage.blocks.js0().value:.3f}",
                ]
            )
    header = ["network", "steps", "loss", "lambda_min", "lambda_max", "over 10th", "negative share", "JS0 of blocks"]
    of = {side: [n for n in found if ARCHITECTURES[n].transformer is side] for side in (True, False)}
    largest = {side: [value for n in names for value in outlying[n]] for side, names in of.items()}
    overlap = min(largest[True]) <= max(largest[False]) and max(largest[True]) <= 3 * max(largest[False])
    symmetric = [n for n in found if ratios[n] <= SYMMETRIC]
    shrinks = [n for n in found if negatives[n][-1] < negatives[n][0]]
    js0 = {n: [s.blocks.js0().value for s in stages] for n, stages in found.items()}
    return Result(
        "fig1",
        f"Figure 1: full Hessian spectra along training, {num_steps} steps",
        {
            "seed": seed,
            "num_steps": num_steps,
            "optimizers": {n: list(SUBJECTS[n]) for n in found},
            "num_probes": next(iter(found.values()))[0].full.quadrature.num_probes,
            "Lanczos steps": next(iter(found.values()))[0].full.quadrature.num_steps,
        },
        (
            Claim(
                "Section 2.2 (1): eigenvalues of CNNs and Transformers are dispersed alike, and Transformers have no "
                "notably large ones.",
                f"largest over 10th largest eigenvalue {min(largest[True]):.2f} ... {max(largest[True]):.2f} of "
                f"Transformers, {min(largest[False]):.2f} ... {max(largest[False]):.2f} of CNNs, over all stages.",
                verdict(overlap, min(largest[True]) <= max(largest[False])),
            ),
            Claim(
                "Section 2.2 (2): on all networks the spectrum is approximately symmetric around 0 at initialisation.",
                "the ends of the range differ by a factor "
                + ", ".join(f"{ratios[n]:.2g} ({n})" for n in found)
                + f"; within {SYMMETRIC:g} on {len(symmetric)} of {len(found)}.",
                verdict(len(symmetric) == len(found), bool(symmetric)),
            ),
            Claim(
                "Section 2.2 (3): as training proceeds the majority of large negative eigenvalues disappear.",
                "negative share of sum |lambda| from start to end "
                + ", ".join(f"{negatives[n][0]:.2f} to {negatives[n][-1]:.2f} ({n})" for n in found)
                + f"; it shrinks on {len(shrinks)} of {len(found)}.",
                verdict(all(negatives[n][-1] < negatives[n][0] / 2 for n in found), len(shrinks) > len(found) / 2),
            ),
        ),
        format_table(header, rows, left=2),
        {
            "largest over 10th": outlying,
            "asymmetry at initialisation": ratios,
            "negative share": negatives,
            "JS0 of the blocks": js0,
        },
        figure=_draw(found),
    )


def _shares(stages: Sequence[Stage]) -> tuple[float, ...]:
    return SHARES if len(stages) == len(SHARES) else QUICK_SHARES


def _draw(found: Mapping[str, Sequence[Stage]]) -> Figure:
    """Rows: networks; columns: stages; eigenvalues divided by the 10th largest, log density, as in the paper."""
    figure = new_figure(11.0, 1.7 * len(found))
    panels = figure.subplots(len(found), len(next(iter(found.values()))), squeeze=False)
    for row, (name, stages) in enumerate(found.items()):
        for column, (share, stage) in enumerate(zip(_shares(stages), stages)):
            panel = panels[row][column]
            grid, density = stage.full.density()
            panel.semilogy((grid / stage.tenth).tolist(), density[0].clamp(min=1e-300).tolist(), linewidth=0.9)
            top = float(density.max())
            panel.set_ylim(top * 1e-8, top * 3)
            panel.set_title(
                f"{SUBJECTS[name][0]}, {100 * share:.0f} %" if share else f"{SUBJECTS[name][0]}, start",
                fontsize="small",
            )
            panel.tick_params(labelsize="x-small")
    for panel in panels[-1]:
        panel.set_xlabel("eigenvalue / 10th largest", fontsize="small")
    return figure
