"""Trainings of the architectures, each kept in one file; the best learning rate of a grid that grows, then is refined.

A grid of decades grows by decades while its best rate is the first or the last; then the half decades beside that are
tried. Loss against rate has several minima where large rates lead to dead units, so the decades come first.

FOLDER/runs/ARCHITECTURE/OPTIMIZER-RATE-SEED.json holds one finished training. A file is taken instead of training again
if the settings in it are the same; that of a training under way, which ends in .state, brings an interrupted run back
to the step it was at. To redo an architecture, remove its folder.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from blockhess_paper.training import SavedState, Training, train
from blockhess_paper.training.architectures import ARCHITECTURES

# Rates tried first, and how many decades may be added to them.
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
GRIDS = {"SGD": RATES, "AdamW": RATES}
MOST_ADDED = 3


class Trainee(Protocol):
    """What can be made and trained: architectures.Architecture, or recipes.PaperTrainee."""

    @property
    def transformer(self) -> bool:
        """Whether it is one."""
        ...

    @property
    def loss_fn(self) -> Any:
        """Of spectrum and train."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of train beside those of Settings."""
        ...

    @property
    def told(self) -> dict[str, Any]:
        """What tells its trainings from others, beside Settings."""
        ...

    def model(self, seed: int) -> nn.Module:
        """The model at the initialisation of a seed."""
        ...

    def batches(self, num_batches: int, seed: int) -> Sequence[Any]:
        """Batches of a training."""
        ...


@dataclass(frozen=True)
class Settings:
    """How everything is trained.

    Attributes:
        num_steps, warmup, schedule: see training.train.
        seeds: the first chooses the rate, all measure it.
        grids: optimizer -> rates tried first.
        most_added: decades added beyond the grid at most.
        refined: whether the half decades beside the best are tried.
    """

    num_steps: int = 600
    warmup: int = 30
    schedule: str = "cosine"
    seeds: tuple[int, ...] = (0, 1, 2)
    grids: Mapping[str, Sequence[float]] = field(default_factory=lambda: dict(GRIDS))
    most_added: int = MOST_ADDED
    refined: bool = True


QUICK = Settings(6, 1, seeds=(0, 1), grids={"SGD": (0.03, 0.1), "AdamW": (1e-3, 1e-2)}, most_added=0)


@dataclass(frozen=True)
class Best:
    """An optimizer on an architecture at its best rate.

    Attributes:
        rate: with the lowest final loss at the first seed.
        at_edge: the best rate is the first or last that was tried, so a better one may lie outside.
        tried: rate -> final loss at the first seed, None where it diverged.
        trainings: at the best rate, one a seed.
    """

    rate: float
    at_edge: bool
    tried: dict[float, float | None]
    trainings: tuple[Training, ...]

    @property
    def initial(self) -> tuple[float, ...]:
        """Loss before training, one a seed."""
        return tuple(t.initial for t in self.trainings)

    @property
    def final(self) -> tuple[float, ...]:
        """Loss after training, one a seed; where one diverged, the loss before: nothing was gained."""
        return tuple(t.initial if t.final is None else t.final for t in self.trainings)


def trained(
    folder: Path, name: str, optimizer: str, rate: float, seed: int, settings: Settings, trainee: Trainee | None = None
) -> Training:
    """Return a training that is there, or do it and keep it.

    Args:
        folder: where FOLDER/runs is, or is made.
        name: of the trainee.
        trainee: by default that of ARCHITECTURES.
    """
    trainee = trainee or ARCHITECTURES[name]
    path = _path(folder, name, optimizer, rate, seed)
    asked = {
        "architecture": name,
        "optimizer": optimizer,
        "rate": float(f"{rate:.6g}"),
        "seed": seed,
        "num_steps": settings.num_steps,
        "warmup": settings.warmup,
        "schedule": settings.schedule,
        **trainee.told,
    }
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text())
        if before["settings"] == asked:
            return Training(**{**before["training"], "losses": tuple(before["training"]["losses"])})
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = SavedState(path.with_suffix(".state"), asked)
    training = train(
        trainee.model(seed),
        trainee.batches(settings.num_steps, seed),
        trainee.loss_fn,
        optimizer=optimizer,
        rate=rate,
        num_steps=settings.num_steps,
        schedule=settings.schedule,
        warmup=settings.warmup,
        kept=kept,
        **trainee.options,
    )
    beside = path.with_suffix(".tmp")
    content = {"settings": asked, "training": asdict(training), "cpu_seconds": kept.cpu_seconds}
    beside.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(beside, path)
    kept.remove()
    return training


def _path(folder: Path, name: str, optimizer: str, rate: float, seed: int) -> Path:
    return folder / "runs" / name / f"{optimizer}-{rate:.4g}-{seed}.json"


def cpu_seconds(folder: Path, name: str, optimizer: str, found: Best, settings: Settings) -> float:
    """Return the processor time of the trainings behind a Best, whenever they were made."""
    searched = {(rate, settings.seeds[0]) for rate in found.tried} | {(found.rate, seed) for seed in settings.seeds}
    paths = [_path(folder, name, optimizer, rate, seed) for rate, seed in searched]
    return float(sum(json.loads(path.read_text())["cpu_seconds"] for path in paths))


def find_best(folder: Path, name: str, optimizer: str, settings: Settings, trainee: Trainee | None = None) -> Best:
    """Search the rate at the first seed and train at the best one with all seeds.

    Where every rate diverged it is the smallest, and its trainings gain nothing.
    """
    rates = sorted(settings.grids[optimizer])
    first = settings.seeds[0]

    def final(rate: float) -> float:
        value = trained(folder, name, optimizer, rate, first, settings, trainee).final
        return math.inf if value is None else value

    for _ in range(settings.most_added):
        chosen = min(rates, key=final)
        if not math.isfinite(final(chosen)) or chosen == rates[0]:
            rates.insert(0, rates[0] / 10)
        elif chosen == rates[-1]:
            rates.append(rates[-1] * 10)
        else:
            break
    if settings.refined:
        middle = min(rates, key=final)
        rates = sorted([*rates, middle / 10**0.5, middle * 10**0.5])
    chosen = min(rates, key=final)
    trainings = tuple(trained(folder, name, optimizer, chosen, seed, settings, trainee) for seed in settings.seeds)
    tried = {rate: trained(folder, name, optimizer, rate, first, settings, trainee).final for rate in rates}
    return Best(chosen, len(rates) > 1 and chosen in (rates[0], rates[-1]), tried, trainings)
