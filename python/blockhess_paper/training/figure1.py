"""Figure 1: spectra of the full Hessian and of the blocks after 0, 25, 50 and 100 % of the steps of a training.

Each network is trained with the optimizer of the paper's code bases: SGD for CNNs, AdamW for Transformers. Three
statements of the paper are quantified: dispersion (largest over 10th largest eigenvalue), symmetry at initialization
(most negative over most positive eigenvalue), and evolution (sum of |lambda| over the negative eigenvalues, as a share
of the sum over all).

At scale "mini" the networks are those of architectures.py; at scale "paper" the paper's, trained as in recipes.py, with
the paper's batches and blocks. FOLDER/checkpoints/NAME-STEP.pt and the spectra in FOLDER/evolution let an interrupted
run resume, within a training and within a spectrum too. A training that diverged is reported and excluded from the
claims, and its spectra are not computed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockhess._text import format_table
from blockhess.problem.blocks import BlockSpec
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
    """Spectra of one checkpoint: of the full Hessian and of its blocks."""

    full: Spectra
    blocks: Spectra

    @property
    def nodes_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes and weights of the full Hessian, (n,) each, in ascending order of the nodes."""
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
        """Sum of |lambda| over the negative eigenvalues, as a share of the sum over all."""
        nodes, weights = self.nodes_weights
        size = weights * nodes.abs()
        return float(size[nodes < 0].sum() / size.sum())


@dataclass(frozen=True)
class Panel:
    """A network of the figure, its training and the batch of its Hessian.

    Attributes:
        title: title of the paper's panel.
        trainee: the network.
        optimizer, rate, settings: of the training.
        batch: builds the network with the batch of its Hessian; checkpoints are loaded into its model.
        paper_blocks: whether its blocks are those of the paper's text, else one per parameter tensor.
    """

    title: str
    trainee: Trainee
    optimizer: str
    rate: float
    settings: Settings
    batch: Callable[[], Network]
    paper_blocks: bool = False


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Train, compute the spectra of every checkpoint, and judge the claims.

    Args:
        seed: seed of weights, batches and probes.
        quick: two networks, few steps.
        folder: holds checkpoints and spectra.
        selection: the networks; at scale "mini" of SUBJECTS.
    """
    selection = selection or Selection()
    shares = QUICK_SHARES if quick else SHARES
    if selection.scale == "mini":
        known = dict(list(SUBJECTS.items())[1:4:2]) if quick else SUBJECTS
        panels = {name: small_panel(name, seed, quick, selection.device) for name in selection.of(known, "fig1")}
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


def small_panel(name: str, seed: int, quick: bool, device: str) -> Panel:
    """Return the panel of one of SUBJECTS, on a device."""
    title, optimizer, rate = SUBJECTS[name]
    architecture = replace(ARCHITECTURES[name], device=device)
    source = "Fashion-MNIST" if architecture.images else "Shakespeare"

    def batch() -> Network:
        return Network(name, architecture.model(seed), architecture.batches(1, seed), architecture.loss_fn, source)

    return Panel(title, architecture, optimizer, rate, QUICK_SMALL if quick else SMALL, batch)


def paper_panel(trainee: PaperTrainee, seed: int) -> Panel:
    """Return the panel of one of PANELS, with the optimizer and rate of its code base."""
    optimizer = "AdamW" if trainee.transformer else "SGD"
    rate, batch = trainee.recipe.rates[optimizer][0], partial(trainee.measured_batch, seed)
    return Panel(NETWORKS[trainee.name][0], trainee, optimizer, rate, trainee.settings(seed), batch, paper_blocks=True)


def evolution(
    folder: Path, name: str, panel: Panel, shares: Sequence[float], effort: Effort, seed: int, precision: str
) -> list[Stage]:
    """Return the spectra after these shares of a training, computed or loaded from the folder."""
    steps = [round(share * panel.settings.num_steps) for share in shares]
    net = panel.batch()
    policy = "eval" if has_batchnorm(net.model) else "none"
    spectra = writable_folder(folder / "evolution")
    partitions: dict[str, BlockSpec] = {"full": "full", "parameter": "parameter"}
    if panel.paper_blocks:
        partitions = {"full": "full", "paper": net.model.paper_blocks(figure=False)}  # type: ignore[operator]
    stages = []
    for path in checkpoints(folder, name, panel, steps, seed):
        load_checkpoint(net.model, path)
        full, blocks = (
            measure_once(
                spectra / f"{path.stem}-{name}.npz", net, policy, effort, seed, blocks=partition, precision=precision
            )
            for name, partition in partitions.items()
        )
        stages.append(Stage(full, blocks))
    return stages


class Diverged(Exception):
    """A training diverged; holds the number of steps with finite losses, and of all steps."""


def checkpoints(folder: Path, name: str, panel: Panel, steps: Sequence[int], seed: int) -> list[Path]:
    """Return the checkpoints at some steps of a training, which is done now unless the folder has them.

    Raises:
        Diverged: the training diverged, now or before.
    """
    settings, saved = panel.settings, writable_folder(folder / "checkpoints")
    identity = {"schedule": settings.schedule, "warmup": settings.warmup, **panel.trainee.extra_settings}
    digest = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=4).hexdigest()
    stem = f"{name}-{panel.optimizer}-{panel.rate:g}-{seed}-{settings.num_steps}-{digest}"
    paths = {step: saved / f"{stem}-{step}.pt" for step in steps}
    # Written last: only this file says how the training ended.
    ended = saved / f"{stem}.json"
    end = json.loads(ended.read_text()) if ended.exists() else None
    if end is None or not (end["diverged"] or all(path.exists() for path in paths.values())):
        state = SavedState(saved / f"{stem}.state", identity)
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
            state=state,
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
    """Judge Figure 1 and section 2.2; claims need both CNNs and Transformers."""
    rows = [[panels[name].title, text] for name, text in diverged.items()]
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
                    f"{stage.blocks.js0(axis='linear').value:.3f}",
                ]
            )
    below = "\nDiverged: not finite, or the last losses are above those at the start." if diverged else ""
    header = ["network", "steps", "loss", "lambda_min", "lambda_max", "over 10th", "negative share", "JS0 of blocks"]
    steps = {name: panel.settings.num_steps for name, panel in panels.items()}
    same = len({*steps.values()}) == 1
    numbers = {
        "largest over 10th": {n: [s.ends[1] / s.tenth for s in stages] for n, stages in found.items()},
        "asymmetry at initialization": {n: _asymmetry(*stages[0].ends) for n, stages in found.items()},
        "negative share": {n: [s.negative for s in stages] for n, stages in found.items()},
        "JS0 of the blocks": {n: [s.blocks.js0(axis="linear").value for s in stages] for n, stages in found.items()},
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
            "recipes": {n: panel.trainee.extra_settings for n, panel in panels.items() if panel.trainee.extra_settings},
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
            "Section 2.2 (2): on all networks the spectrum is approximately symmetric around 0 at initialization.",
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
    """Plot log densities of the eigenvalues over the 10th largest, a row per network and a column per checkpoint."""
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
