"""Figure 10: AdamW and SGD on CNNs, each at its best learning rate, CPU-sized; figure11.py does Transformers alike.

The paper's training accuracies over 90 epochs of ImageNet become training losses over some hundred steps here, of the
architectures of architectures.py. "Similar" is a gap of at most NEEDED_GAP, the share of AdamW's gain that SGD does not
make, averaged over the seeds. A rate that diverged is told as such and never chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from blockhess.calibration import NEEDED_GAP
from blockhess.paper.calibrate import gaps
from blockhess.paper.pictures import ADAM_COLOR, GD_COLOR, new_figure
from blockhess.paper.results import Claim, Result, verdict
from blockhess.paper.training_runs import QUICK, Best, Settings, best, cpu_seconds
from blockhess.table import format_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The paper's panels, and what stands for them.
CNNS = {"resnet": "ResNet18", "vgg": "VGG16", "vgg-bn": "VGG16 with BatchNorm (not in the paper)"}

# Losses are drawn as running means over so many steps.
SMOOTHED = 15


def run(*, seed: int = 0, quick: bool = False, folder: Path) -> Result:
    """Train the CNNs.

    Args:
        seed, quick: see runner.run_experiments.
        folder: keeps every training, so that an interrupted run goes on; those of `calibrate` serve here too.
    """
    claim = "Figure 10: SGD and AdamW perform similarly on CNNs."
    return compare("fig10", claim, dict(list(CNNS.items())[:1]) if quick else CNNS, True, seed, quick, folder)


def compare(
    name: str, claim: str, subjects: Mapping[str, str], similar: bool, seed: int, quick: bool, folder: Path
) -> Result:
    """Train architectures with both optimizers at their best rates and judge a claim about all of them.

    Args:
        name, claim: of the result.
        subjects: of ARCHITECTURES -> title.
        similar: whether the paper says that SGD is on par, or that it is worse.
        seed, quick, folder: see run.
    """
    settings = QUICK if quick else Settings(seeds=(seed, seed + 1, seed + 2))
    found = {
        key: {optimizer: best(folder, key, optimizer, settings) for optimizer in ("SGD", "AdamW")} for key in subjects
    }
    every = {key: gaps(key, both["SGD"], both["AdamW"]) for key, both in found.items()}
    mean = {key: fmean(values) for key, values in every.items()}
    spent = sum(cpu_seconds(folder, key, o, b, settings) for key, both in found.items() for o, b in both.items())
    holds = [(mean[key] <= NEEDED_GAP) == similar for key in subjects]
    rows = [
        [
            title,
            f"{fmean(found[key]['SGD'].initial):.3f}",
            *(f"{fmean(b.final):.3f} at {b.rate:.2g}{'*' if b.at_edge else ''}" for b in found[key].values()),
            f"{mean[key]:+.3f} ({min(every[key]):+.3f} ... {max(every[key]):+.3f})",
            _diverged(found[key]),
        ]
        for key, title in subjects.items()
    ]
    measured = "; ".join(f"{title}: gap {mean[key]:+.3f}" for key, title in subjects.items())
    return Result(
        name,
        f"{claim.split(':')[0]}: AdamW and SGD, {settings.num_steps} steps, {len(settings.seeds)} seeds",
        {"seed": seed, "num_steps": settings.num_steps, "seeds": list(settings.seeds), "subjects": dict(subjects)},
        (
            Claim(
                claim,
                f"share of AdamW's gain that SGD does not make, {'at most' if similar else 'above'} {NEEDED_GAP:g} "
                f"expected: {measured}.",
                verdict(all(holds), any(holds)),
            ),
        ),
        format_table(["network", "initial", "SGD", "AdamW", "gap (over seeds)", "rates that diverged"], rows)
        + "\n* best rate at the end of the grid that was tried\n"
        + f"the trainings took {spent:.0f} s of one processor, whenever they were made",
        {"gaps": every, "rates": {key: {o: b.rate for o, b in both.items()} for key, both in found.items()}},
        {f"{key} {o}": _losses(b) for key, both in found.items() for o, b in both.items()},
        _draw(found, subjects),
    )


def _diverged(both: Mapping[str, Best]) -> str:
    lost = [f"{o} {rate:.2g}" for o, b in both.items() for rate, final in b.tried.items() if final is None]
    return ", ".join(lost) or "none"


def _losses(found: Best) -> torch.Tensor:
    """Losses (n_seeds, num_steps); a training that broke off is continued by the last loss it had."""
    rows = [list(t.losses) + [t.losses[-1]] * (t.num_steps - len(t.losses)) for t in found.trainings]
    return torch.tensor(rows, dtype=torch.float64)


def _draw(found: Mapping[str, Mapping[str, Best]], subjects: Mapping[str, str]) -> Figure:
    figure = new_figure(3.6 * len(subjects) + 0.4, 3.4)
    panels = figure.subplots(1, len(subjects), squeeze=False)[0]
    for panel, letter, (key, title) in zip(panels, "abcdef", subjects.items()):
        for (optimizer, chosen), color in zip(found[key].items(), (GD_COLOR, ADAM_COLOR)):
            losses = _losses(chosen)
            width = min(SMOOTHED, losses.shape[1])
            smooth = losses.unfold(1, width, 1).mean(-1)
            steps = range(width, losses.shape[1] + 1)
            for row in smooth.tolist():
                panel.plot(steps, row, color=color, linewidth=0.6, alpha=0.5)
            panel.plot(steps, smooth.mean(0).tolist(), color=color, label=f"{optimizer}, rate {chosen.rate:.2g}")
        panel.set_title(f"({letter}) {title}", fontsize="small")
        panel.set_xlabel("step")
        panel.legend(frameon=False, fontsize="x-small")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("training loss, nats")
    return figure
