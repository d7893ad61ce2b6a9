"""How many times more steps SGD needs than AdamW to reach the same loss.

    target = AdamW's loss after T steps;    ratio = (SGD's steps to the target) / (AdamW's steps to the target)

The loss is that of data which are the same for all trainings of an architecture, evaluated every EVERY steps; means
of WINDOW evaluations are compared. Both learning rates are constant after a warm-up, so that one training shows the
steps to every loss, and each is the best for its own aim: the lowest target, and the fewest steps to it. SGD gets
MOST_RATIO times the steps of AdamW. Where it does not reach the target, the ratio is at least MOST_RATIO.

Rates are searched with the first seed, from a given rate up or down by a factor of 2 until the first worse one on each
side. FOLDER/races/ARCHITECTURE/OPTIMIZER-RATE-SEED.json holds one training: an interrupted search loses at most one.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, geometric_mean
from typing import Any

import torch
from torch import nn

from blockhess.problem.losses import make_loss
from blockhess_paper.training.architectures import Architecture
from blockhess_paper.training.loop import train

EVERY, WINDOW, MOST_RATIO, FACTOR = 10, 3, 4, 2.0

# Images, and windows of text, of an evaluation; and the seed that draws them.
IMAGES, WINDOWS, EVALUATION_SEED = 512, 64, 1_000

# A training is given up when its loss is above this multiple of the initial one.
LOST = 2.0

# Smaller is better; compared in this order.
Score = tuple[float, float]


@dataclass(frozen=True)
class Conditions:
    """How all networks are trained.

    Attributes:
        num_steps: AdamW's steps.
        warmup: steps of linear warm-up.
        seeds: of weights and batches; the first one chooses the rates.
    """

    num_steps: int = 400
    warmup: int = 8
    seeds: tuple[int, ...] = (0, 1, 2)


@dataclass(frozen=True)
class Race:
    """Both optimizers on an architecture at their best rates.

    Attributes:
        rates: optimizer -> best rate.
        tried: optimizer -> rates that were tried with the first seed, in order of size.
        targets: seed by seed, AdamW's final loss.
        adamw: seed by seed, AdamW's steps to the target.
        sgd: seed by seed, SGD's steps to the target; None where it does not reach it.
    """

    rates: dict[str, float]
    tried: dict[str, list[float]]
    targets: tuple[float, ...]
    adamw: tuple[float, ...]
    sgd: tuple[float | None, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """Seed by seed, the ratio of the steps of SGD and AdamW, at most MOST_RATIO."""
        return tuple(MOST_RATIO if s is None else min(MOST_RATIO, s / a) for s, a in zip(self.sgd, self.adamw))

    @property
    def ratio(self) -> float:
        """The geometric mean of the ratios."""
        return geometric_mean(self.ratios)


class _Ended(Exception):
    """A training reached its target, or is lost."""


def curve(
    folder: Path,
    name: str,
    architecture: Architecture,
    optimizer: str,
    rate: float,
    seed: int,
    num_steps: int,
    warmup: int,
    target: float | None = None,
) -> list[float]:
    """Return the means of WINDOW evaluations, of the steps WINDOW x EVERY, (WINDOW + 1) x EVERY, ...

    The training is done now unless the folder has it. It ends early at the target, or where it is lost.

    Args:
        folder: parent of FOLDER/races.
        name, architecture: of the network.
        optimizer, rate, seed, num_steps, warmup: of the training.
        target: None for none.
    """
    path = folder / "races" / name / f"{optimizer}-{rate:.4g}-{seed}.json"
    asked = {"num_steps": num_steps, "warmup": warmup, "target": target, "batch": architecture.size}
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text())
        if before["settings"] == asked:
            return smoothed(before["losses"])
    loss_of = make_loss(architecture.loss_fn)
    (data,) = architecture.batches(1, EVALUATION_SEED, batch_size=IMAGES if architecture.images else WINDOWS)
    losses: list[float] = []

    @torch.no_grad()
    def evaluate(model: nn.Module) -> None:
        losses.append(float(loss_of(model, data)[0]))
        found = smoothed(losses)
        if not losses[-1] <= LOST * losses[0] or (target is not None and found and found[-1] <= target):
            raise _Ended

    start = time.process_time()
    try:
        train(
            architecture.model(seed),
            architecture.batches(num_steps, seed),
            architecture.loss_fn,
            optimizer=optimizer,
            rate=rate,
            num_steps=num_steps,
            schedule="constant",
            warmup=warmup,
            at_steps=dict.fromkeys(range(0, num_steps + 1, EVERY), evaluate),
            **architecture.options,
        )
    except _Ended:
        losses = [loss for loss in losses if math.isfinite(loss)]
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    content = {"settings": asked, "losses": losses, "cpu_seconds": time.process_time() - start}
    beside.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(beside, path)
    return smoothed(losses)


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the means over WINDOW losses, without the loss before training.

    Example:
        >>> smoothed([9.0, 3.0, 2.0, 1.0, 0.0])
        [2.0, 1.0]
    """
    return [fmean(losses[end - WINDOW : end]) for end in range(WINDOW + 1, len(losses) + 1)]


def steps_to(means: Sequence[float], target: float) -> float | None:
    """Return the number of steps to a target, interpolated between evaluations; None if it is not reached.

    Args:
        means: as of curve.

    Example:
        >>> steps_to([3.0, 2.0, 1.0], 1.5)
        45.0
    """
    for k, mean in enumerate(means):
        if mean <= target:
            part = (means[k - 1] - target) / (means[k - 1] - mean) if k else 1.0
            return EVERY * (WINDOW + k - 1 + part)
    return None


def climb(score: Callable[[float], Score], start: float) -> dict[float, Score]:
    """Return rate -> score, going up, else down, by FACTOR from the start until the first worse rate on each side.

    Example:
        >>> climb(lambda rate: (abs(rate - 4), 0.0), 1.0)
        {1.0: (3.0, 0.0), 2.0: (2.0, 0.0), 4.0: (0.0, 0.0), 8.0: (4.0, 0.0)}
    """
    scores = {start: score(start)}
    for factor in (FACTOR, 1 / FACTOR):
        best = min(scores, key=lambda rate: scores[rate])
        while (rate := float(f"{best * factor:.6g}")) not in scores:
            scores[rate] = score(rate)
            if scores[rate] >= scores[best]:
                break
            best = rate
    return scores


def race(
    folder: Path, name: str, architecture: Architecture, first_rates: Mapping[str, float], conditions: Conditions
) -> Race:
    """Train with both optimizers, or load what the folder has.

    Args:
        folder, name, architecture: see curve.
        first_rates: optimizer -> rate that is tried first.
        conditions: of the trainings.

    Raises:
        ValueError: AdamW diverges at every rate that was tried.
    """
    most, first = MOST_RATIO * conditions.num_steps, conditions.seeds[0]

    def trained(optimizer: str, rate: float, seed: int, num_steps: int, target: float | None = None) -> list[float]:
        return curve(folder, name, architecture, optimizer, rate, seed, num_steps, conditions.warmup, target)

    def final(means: Sequence[float], num_steps: int) -> float:
        return means[-1] if len(means) == num_steps // EVERY - WINDOW + 1 else math.inf

    def adamw_score(rate: float) -> Score:
        return final(trained("AdamW", rate, first, conditions.num_steps), conditions.num_steps), 0.0

    adamw = climb(adamw_score, first_rates["AdamW"])
    best_adamw = min(adamw, key=lambda rate: adamw[rate])
    aim, fewest = adamw[best_adamw][0], most
    if not math.isfinite(aim):
        raise ValueError(f"race: AdamW must converge on {name}, got divergence at the rates {sorted(adamw)}")

    def sgd_score(rate: float) -> Score:
        nonlocal fewest
        means = trained("SGD", rate, first, fewest, aim)
        steps = steps_to(means, aim)
        if steps is None:
            return math.inf, final(means, fewest)
        fewest = min(fewest, EVERY * math.ceil(steps / EVERY))
        return steps, 0.0

    sgd = climb(sgd_score, first_rates["SGD"])
    best_sgd = min(sgd, key=lambda rate: sgd[rate])
    targets, adamw_steps, sgd_steps = [], [], []
    for seed in conditions.seeds:
        means = trained("AdamW", best_adamw, seed, conditions.num_steps)
        targets.append(means[-1])
        adamw_steps.append(steps_to(means, means[-1]) or float(conditions.num_steps))
        if seed == first:
            sgd_steps.append(sgd[best_sgd][0] if math.isfinite(sgd[best_sgd][0]) else None)
        else:
            sgd_steps.append(steps_to(trained("SGD", best_sgd, seed, most, targets[-1]), targets[-1]))
    return Race(
        {"SGD": best_sgd, "AdamW": best_adamw},
        {"SGD": sorted(sgd), "AdamW": sorted(adamw)},
        tuple(targets),
        tuple(adamw_steps),
        tuple(sgd_steps),
    )
