"""Figures 10 and 11: AdamW and SGD on CNNs and on Transformers, each at its best learning rate.

The paper shows training accuracies over 90 epochs of ImageNet. Here training losses are compared: over some hundred
steps of the networks of architectures.py or, at the paper's size, as recipes.py says. "Similar" means that the gap, the
share of AdamW's decrease of the loss that SGD does not reach, is at most NEEDED_GAP on average over the seeds. Rates
that diverged are listed and never chosen. Where AdamW does not lower the loss the gap is undefined and no claim holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import torch

from blockhess._text import format_table, plural
from blockhess_paper.networks.networks import NETWORKS, Selection
from blockhess_paper.results import ADAM_COLOR, GD_COLOR, Claim, Result, new_figure, verdict
from blockhess_paper.training.architectures import ARCHITECTURES
from blockhess_paper.training.calibration import NEEDED_GAP, gap
from blockhess_paper.training.recipes import trainees
from blockhess_paper.training.training_runs import QUICK, Best, Settings, Trainee, cpu_seconds, find_best

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Small networks -> the paper's panels.
CNNS = {"resnet": "ResNet18", "vgg": "VGG16", "vgg-bn": "VGG16 with BatchNorm (not in the paper)"}
TRANSFORMERS = {"vit-2": "ViT", "bert-2": "BERT", "gpt-1": "GPT2-nano", "gpt-2": "GPT2"}

# Losses are plotted as running means over this many steps.
SMOOTHED = 15


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Figure 10: train the CNNs.

    Args:
        seed, quick: see experiments.run_experiments.
        folder: every training is saved here, so that an interrupted run resumes; trainings of `calibrate` are reused.
        selection: of the networks; at scale "mini" of CNNS.
    """
    subjects = dict(list(CNNS.items())[:1]) if quick else CNNS
    claim = "Figure 10: SGD and AdamW perform similarly on CNNs."
    return run_comparison("fig10", claim, subjects, False, seed, quick, folder, selection or Selection())


def run_figure11(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Figure 11: train the Transformers. Args: see run."""
    subjects = {"gpt-1": "GPT2-nano"} if quick else TRANSFORMERS
    claim = "Figure 11: SGD performs significantly worse than AdamW on Transformers."
    return run_comparison("fig11", claim, subjects, True, seed, quick, folder, selection or Selection())


def run_comparison(
    name: str,
    claim: str,
    subjects: Mapping[str, str],
    transformers: bool,
    seed: int,
    quick: bool,
    folder: Path,
    selection: Selection,
) -> Result:
    """Compare both optimizers on the small architectures, or on the paper's networks of the same kind.

    Args:
        name: name of the result.
        claim: the paper's claim.
        subjects: key of ARCHITECTURES -> title, for scale "mini".
        transformers: whether the networks are Transformers, on which the paper says that SGD is worse.
        seed, quick, folder, selection: see run.
    """
    if selection.scale == "mini":
        settings = QUICK if quick else Settings(seeds=(seed, seed + 1, seed + 2))
        chosen = {key: subjects[key] for key in selection.of(subjects, name)}
        small = {key: replace(ARCHITECTURES[key], device=selection.device) for key in chosen}
        return compare(name, claim, chosen, not transformers, dict.fromkeys(chosen, settings), folder, small)
    shown = [key for key, (_, _, transformer) in NETWORKS.items() if transformer is transformers]
    made = trainees(selection.of(shown, name), selection, quick)
    titles = {key: NETWORKS[key][0] for key in made}
    each = {key: trainee.settings(seed) for key, trainee in made.items()}
    return compare(name, claim, titles, not transformers, each, folder, made)


def compare(
    name: str,
    claim: str,
    subjects: Mapping[str, str],
    similar: bool,
    settings: Mapping[str, Settings],
    folder: Path,
    made: Mapping[str, Trainee],
) -> Result:
    """Train networks with both optimizers at their best rates and judge a claim about all of them.

    Args:
        name: name of the result.
        claim: the paper's claim.
        subjects: key -> title.
        similar: whether the paper says that SGD is on par, else that it is worse.
        settings: key -> training settings.
        folder: see run.
        made: key -> network.
    """
    found = {
        key: {o: find_best(folder, key, o, settings[key], made[key]) for o in ("SGD", "AdamW")} for key in subjects
    }
    every = {key: _gaps(both["SGD"], both["AdamW"]) for key, both in found.items()}
    mean = {key: fmean(values) if values else None for key, values in every.items()}
    spent = sum(cpu_seconds(folder, key, o, b, settings[key]) for key, both in found.items() for o, b in both.items())
    holds = [(value <= NEEDED_GAP) == similar for value in mean.values() if value is not None]
    steps = {key: each.num_steps for key, each in settings.items()}
    seeds = next(iter(settings.values())).seeds
    recipes = {key: trainee.extra_settings for key, trainee in made.items() if trainee.extra_settings}
    rows = [
        [
            title,
            f"{fmean(found[key]['SGD'].initial):.3f}",
            *(f"{fmean(b.final):.3f} at {b.rate:.2g}{'*' if b.at_edge else ''}" for b in found[key].values()),
            f"{_gap(mean[key])} ({min(every[key]):+.3f} ... {max(every[key]):+.3f})" if every[key] else _gap(None),
            _diverged(found[key]),
        ]
        for key, title in subjects.items()
    ]
    measured = "; ".join(f"{title}: gap {_gap(mean[key])}" for key, title in subjects.items())
    return Result(
        name,
        f"{claim.split(':')[0]}: AdamW and SGD, {_steps(steps)} steps, {plural(len(seeds), 'seed')}",
        {
            "seed": seeds[0],
            "num_steps": steps if len({*steps.values()}) > 1 else next(iter(steps.values())),
            "seeds": list(seeds),
            "subjects": dict(subjects),
            **({"recipes": recipes} if recipes else {}),
        },
        (
            Claim(
                claim,
                f"share of AdamW's gain that SGD does not make, {'at most' if similar else 'above'} {NEEDED_GAP:g} "
                f"expected: {measured}.",
                verdict(all(holds) and len(holds) == len(mean), any(holds)),
            ),
        ),
        format_table(["network", "initial", "SGD", "AdamW", "gap (over seeds)", "rates that diverged"], rows)
        + "\n* best rate at the end of the grid that was tried\n"
        + f"the trainings took {spent:.0f} s of one processor, whenever they were made",
        {"gaps": every, "rates": {key: {o: b.rate for o, b in both.items()} for key, both in found.items()}},
        {f"{key} {o}": _losses(b) for key, both in found.items() for o, b in both.items()},
        _draw(found, subjects),
    )


def _gaps(sgd: Best, adamw: Best) -> list[float]:
    """Return the gaps of the seeds for which AdamW lowers the loss."""
    return [gap(i, s, a) for i, s, a in zip(adamw.initial, sgd.final, adamw.final) if a < i]


def _gap(value: float | None) -> str:
    return "none: AdamW gained nothing" if value is None else f"{value:+.3f}"


def _steps(steps: Mapping[str, int]) -> str:
    return " ... ".join(f"{number}" for number in sorted({min(steps.values()), max(steps.values())}))


def _diverged(both: Mapping[str, Best]) -> str:
    lost = [f"{o} {rate:.2g}" for o, b in both.items() for rate, final in b.tried.items() if final is None]
    return ", ".join(lost) or "none"


def _losses(found: Best) -> torch.Tensor:
    """Return the losses (n_seeds, num_steps); a training that ended early is continued by its last loss."""
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
