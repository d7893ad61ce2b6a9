"""Figure 1: spectra of the full Hessian at 0, 25, 50 and 100 % of the steps of a training, and of the blocks beside.

Each network is trained with what the paper's code bases take, SGD for CNNs, AdamW for Transformers. The paper's three
statements are counted, not looked at: dispersion (largest eigenvalue over the 10th), symmetry at initialisation (most
negative over most positive eigenvalue), and evolution (the share of negative eigenvalues' weight, sum |lambda| over the
negative ones relative to all).

At scale "mini" the networks are those of architectures.py; at scale "paper" the paper's, trained as recipes.py says and
measured with its batches on its blocks. FOLDER/checkpoints/NAME-STEP.pt are kept, with spectra of each in
FOLDER/evolution, so an interrupted run goes on, within a training and within a spectrum too. A training that diverged,
which is not finite or ended above where it began, is told as such and decides nothing; its spectra are not measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockhess._text import format_table
from blockhess.problem.model_state import has_batchnorm
from blockhess.results.files import writable_folder, write_text
from blockhess.spectra import Spectra
from blockhess_paper.networks.initial_spectra import EFFORTS, Effort, measure_once
from blockhess_paper.networks.networks import NETWORKS, Network, Selection
from blockhess_paper.results import Claim, Result, new_figure, verdict
from blockhess_paper.training import SavedState, load_checkpoint, save_checkpoint, train
from blockhess_paper.training.architectures import ARCHITECTURES
from blockhess_paper.training.recipes import PaperTrainee, trainees
from blockhess_paper.training.training_runs import Settings, Trainee

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = (0.0, 0.25, 0.5, 1.0)
QUICK_SHARES = (0.0, 1.0)

# Small network -> the paper's panel, optimizer, learning rate.
SUBJECTS = {
    "vgg-bn": ("VGG16", "SGD", 0.1),
    "resnet": ("ResNet18", "SGD", 0.1),
    "gpt-2": ("GPT2", "AdamW", 3e-3),
    "gpt-1": ("GPT2-nano", "AdamW", 3e-3),
    "vit-2": ("ViT-base", "AdamW", 3e-3),
}

# The paper's panels, in its order.
PANELS = ("vgg16", "resnet18", "gpt2", "gpt2-nano", "vit-base")

SMALL = Settings(300, 15, "cosine")
QUICK_SMALL = Settings(8, 0, "cosine")
EFFORT, QUICK_EFFORT = Effort(2, 40), Effort(1, 5)

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
        nodes, weights = (part[0] for part in self.full.quadrature.merged())
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


@dataclass(frozen=True)
class Panel:
    """A network of the figure, and how it is trained and measured.

    Attributes:
        title: of the paper's panel.
        trainee: the network.
        optimizer, rate, settings: of the training.
        batch: makes a network with the batch that is measured, whose model is exchanged for the trained one.
        blocks: that are measured beside the full Hessian.
    """

    title: str
    trainee: Trainee
    optimizer: str
    rate: float
    settings: Settings
    batch: Callable[[], Network]
    blocks: str = "parameter"


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Train, measure every checkpoint, and judge.

    Args:
        seed: of weights, batches and probes.
        quick: two networks, few steps.
        folder: keeps checkpoints and spectra.
        selection: of the networks; at scale "mini" of SUBJECTS.
    """
    selection = selection or Selection()
    shares = QUICK_SHARES if quick else SHARES
    if selection.scale == "mini":
        known = dict(list(SUBJECTS.items())[1:4:2]) if quick else SUBJECTS
        panels = {name: small_panel(name, seed, quick) for name in selection.small(known, "fig1")}
        effort = QUICK_EFFORT if quick else EFFORT
    else:
        made = trainees(selection.of(PANELS, "fig1"), selection, quick)
        panels = {name: paper_panel(trainee, seed) for name, trainee in made.items()}
        effort = EFFORTS["quick" if quick else "paper"]
    found: dict[str, list[Stage]] = {}
    diverged: dict[str, str] = {}
    for name, panel in panels.items():
        try:
            found[name] = evolution(folder, name, panel, shares, effort, seed, selection.precision)
        except Diverged as made:
            diverged[name] = "diverged after {} of {} steps".format(*made.args)
    return judge(found, diverged, panels, effort, seed, selection)


def small_panel(name: str, seed: int, quick: bool) -> Panel:
    """Return one of SUBJECTS."""
    title, optimizer, rate = SUBJECTS[name]
    architecture = ARCHITECTURES[name]
    source = "Shakespeare" if architecture.draw == "windows" else "Fashion-MNIST"

    def batch() -> Network:
        return Network(name, architecture.model(seed), architecture.batches(1, seed), architecture.loss_fn, source)

    return Panel(title, architecture, optimizer, rate, QUICK_SMALL if quick else SMALL, batch)


def paper_panel(trainee: PaperTrainee, seed: int) -> Panel:
    """Return one of PANELS, with the optimizer and the rate that its code base takes."""
    optimizer = "AdamW" if trainee.transformer else "SGD"
    rate, batch = trainee.recipe.rates[optimizer][0], partial(trainee.measured_batch, seed)
    return Panel(NETWORKS[trainee.name][0], trainee, optimizer, rate, trainee.settings(seed), batch, "paper")


def evolution(
    folder: Path, name: str, panel: Panel, shares: Sequence[float], effort: Effort, seed: int, precision: str
) -> list[Stage]:
    """Return the spectra after these shares of a training, trained and measured unless kept."""
    steps = [round(share * panel.settings.num_steps) for share in shares]
    net = panel.batch()
    policy = "eval" if has_batchnorm(net.model) else "none"
    kept = writable_folder(folder / "evolution")
    stages = []
    for path in checkpoints(folder, name, panel, steps, seed):
        load_checkpoint(net.model, path)
        full, blocks = (
            measure_once(kept / f"{path.stem}-{cut}.npz", net, policy, effort, seed, blocks=cut, precision=precision)
            for cut in ("full", panel.blocks)
        )
        stages.append(Stage(full, blocks))
    return stages


class Diverged(Exception):
    """A training was not finite or ended above where it began; holds the steps with finite losses, of how many."""


def checkpoints(folder: Path, name: str, panel: Panel, steps: Sequence[int], seed: int) -> list[Path]:
    """Return a checkpoint for each of some steps of a training; trains unless it was trained before.

    Raises:
        Diverged: now, or when it was trained before.
    """
    settings, kept = panel.settings, writable_folder(folder / "checkpoints")
    told = {"schedule": settings.schedule, "warmup": settings.warmup, **panel.trainee.told}
    digest = blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=4).hexdigest()
    stem = f"{name}-{panel.optimizer}-{panel.rate:g}-{seed}-{settings.num_steps}-{digest}"
    paths = {step: kept / f"{stem}-{step}.pt" for step in steps}
    # Written last: how the training ended is known only then, whatever checkpoints there are.
    ended = kept / f"{stem}.json"
    end = json.loads(ended.read_text()) if ended.exists() else None
    if end is None or not (end["diverged"] or all(path.exists() for path in paths.values())):
        state = SavedState(kept / f"{stem}.state", told)
        training = train(
            panel.trainee.model(seed),
            panel.trainee.batches(settings.num_steps, seed),
            panel.trainee.loss_fn,
            optimizer=panel.optimizer,
            rate=panel.rate,
            num_steps=settings.num_steps,
            schedule=settings.schedule,
            warmup=settings.warmup,
            at_steps={step: partial(save_checkpoint, path=path) for step, path in paths.items()},
            kept=state,
            **panel.trainee.options,
        )
        end = {"steps": len(training.losses), "diverged": training.diverged}
        write_text(json.dumps(end) + "\n", ended)
        state.remove()
    if end["diverged"]:
        raise Diverged(end["steps"], settings.num_steps)
    return list(paths.values())


def judge(
    found: Mapping[str, Sequence[Stage]],
    diverged: Mapping[str, str],
    panels: Mapping[str, Panel],
    effort: Effort,
    seed: int,
    selection: Selection,
) -> Result:
    """Return what the stages say about Figure 1 and section 2.2; claims where there are CNNs and Transformers."""
    rows = [[panels[name].title, told] for name, told in diverged.items()]
    for name, stages in found.items():
        for share, stage in zip(_shares(stages), stages):
            low, high = stage.ends
            rows.append(
                [
                    panels[name].title,
                    f"{100 * share:.0f} %",
                    f"{stage.full.provenance['loss_value']:.3f}",
                    f"{low:.3g}",
                    f"{high:.3g}",
                    f"{high / stage.tenth:.2f}",
                    f"{stage.negative:.3f}",
                    f"{stage.blocks.js0().value:.3f}",
                ]
            )
    below = "\nDiverged: not finite, or the last losses are above those at the start." if diverged else ""
    header = ["network", "steps", "loss", "lambda_min", "lambda_max", "over 10th", "negative share", "JS0 of blocks"]
    steps = {name: panel.settings.num_steps for name, panel in panels.items()}
    same = len({*steps.values()}) == 1
    numbers = {
        "largest over 10th": {n: [s.ends[1] / s.tenth for s in stages] for n, stages in found.items()},
        "asymmetry at initialisation": {n: _asymmetry(*stages[0].ends) for n, stages in found.items()},
        "negative share": {n: [s.negative for s in stages] for n, stages in found.items()},
        "JS0 of the blocks": {n: [s.blocks.js0().value for s in stages] for n, stages in found.items()},
    }
    kinds = {panels[name].trainee.transformer for name in found}
    return Result(
        "fig1",
        "Figure 1: full Hessian spectra along training"
        + (f", {next(iter(steps.values()))} steps" if same else ", the paper's networks"),
        {
            "seed": seed,
            "scale": selection.scale,
            "device": selection.device,
            "precision": selection.precision,
            "num_steps": steps,
            "optimizers": {n: [panel.title, panel.optimizer, panel.rate] for n, panel in panels.items()},
            "recipes": {n: panel.trainee.told for n, panel in panels.items() if panel.trainee.told},
            "num_probes": effort.num_probes,
            "Lanczos steps": effort.num_steps,
        },
        _claims(found, numbers, {n: panels[n].trainee.transformer for n in found}) if len(kinds) == 2 else (),
        format_table(header, [[*row, *[""] * (len(header) - len(row))] for row in rows], left=2) + below,
        {**numbers, "diverged": diverged},
        figure=_draw(found, panels) if found else None,
    )


def _asymmetry(low: float, high: float) -> float:
    return max(-low / high, high / -low) if low < 0 else float("inf")


def _claims(
    found: Mapping[str, Sequence[Stage]], numbers: Mapping[str, Any], transformer: Mapping[str, bool]
) -> tuple[Claim, ...]:
    outlying, ratios, negatives = list(numbers.values())[:3]
    largest = {side: [v for n in found if transformer[n] is side for v in outlying[n]] for side in (True, False)}
    overlap = min(largest[True]) <= max(largest[False]) and max(largest[True]) <= 3 * max(largest[False])
    symmetric = [n for n in found if ratios[n] <= SYMMETRIC]
    shrinks = [n for n in found if negatives[n][-1] < negatives[n][0]]
    return (
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
    )


def _shares(stages: Sequence[Stage]) -> tuple[float, ...]:
    return SHARES if len(stages) == len(SHARES) else QUICK_SHARES


def _draw(found: Mapping[str, Sequence[Stage]], panels: Mapping[str, Panel]) -> Figure:
    """Rows: networks; columns: stages; eigenvalues divided by the 10th largest, log density, as in the paper."""
    figure = new_figure(11.0, 1.7 * len(found))
    axes = figure.subplots(len(found), len(next(iter(found.values()))), squeeze=False)
    for row, (name, stages) in enumerate(found.items()):
        for column, (share, stage) in enumerate(zip(_shares(stages), stages)):
            panel = axes[row][column]
            grid, density = stage.full.density()
            panel.semilogy((grid / stage.tenth).tolist(), density[0].clamp(min=1e-300).tolist(), linewidth=0.9)
            top = float(density.max())
            panel.set_ylim(top * 1e-8, top * 3)
            panel.set_title(
                f"{panels[name].title}, {100 * share:.0f} %" if share else f"{panels[name].title}, start",
                fontsize="small",
            )
            panel.tick_params(labelsize="x-small")
    for panel in axes[-1]:
        panel.set_xlabel("eigenvalue / 10th largest", fontsize="small")
    return figure
