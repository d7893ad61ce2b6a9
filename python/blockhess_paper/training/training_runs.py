"""Trainings of the architectures, one file each, and the search for the best learning rate.

A grid of decades is extended while its best rate is the first or the last; then the half decades next to the best rate
are tried. Decades come first, since the loss has several minima over the rate where large rates lead to dead units.

FOLDER/runs/ARCHITECTURE/OPTIMIZER-RATE-SEED.json holds one finished training and is reused if its settings are the
same. The .state file of an unfinished training lets an interrupted run resume at its last saved step. To repeat the
trainings of an architecture, remove its folder.
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

# Rates tried first, and the largest number of decades added to them.
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
GRIDS = {"SGD": RATES, "AdamW": RATES}
MOST_ADDED = 3


class Trainee(Protocol):
    """A network that can be built and trained: architectures.Architecture or recipes.PaperTrainee."""

    @property
    def transformer(self) -> bool:
        """Whether the network is a Transformer."""
        ...

    @property
    def loss_fn(self) -> Any:
        """The argument of spectrum and train."""
        ...

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of train besides those in Settings."""
        ...

    @property
    def extra_settings(self) -> dict[str, Any]:
        """Settings that identify its trainings, besides those in Settings; JSON values."""
        ...

    def model(self, seed: int) -> nn.Module:
        """Return the model at the initialization of a seed."""
        ...

    def batches(self, num_batches: int, seed: int) -> Sequence[Any]:
        """Return the batches of a training."""
        ...


@dataclass(frozen=True)
class Settings:
    """How the networks are trained.

    Attributes:
        num_steps, warmup, schedule: see training.train.
        seeds: the rate is chosen with the first seed; the losses are those of all seeds.
        grids: optimizer -> rates tried first.
        most_added: largest number of decades added to the grid.
        refined: whether the half decades next to the best rate are tried.
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
        rate: the rate with the lowest final loss for the first seed.
        at_edge: the best rate is the smallest or largest tried, so a better one may lie outside.
        tried: rate -> final loss for the first seed, None where it diverged.
        trainings: trainings at the best rate, one per seed.
    """

    rate: float
    at_edge: bool
    tried: dict[float, float | None]
    trainings: tuple[Training, ...]

    @property
    def initial(self) -> tuple[float, ...]:
        """Losses before training, one per seed."""
        return tuple(t.initial for t in self.trainings)

    @property
    def final(self) -> tuple[float, ...]:
        """Losses after training, one per seed; for a training that diverged, the loss before it."""
        return tuple(t.initial if t.final is None else t.final for t in self.trainings)


def load_or_train(
    folder: Path, name: str, optimizer: str, rate: float, seed: int, settings: Settings, trainee: Trainee | None = None
) -> Training:
    """Load a training from its file, or train and write the file.

    Args:
        folder: parent of FOLDER/runs, which is created if missing.
        name: name of the trainee.
        optimizer, rate, seed, settings: of the training.
        trainee: None means ARCHITECTURES[name].
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
        **trainee.extra_settings,
    }
    if path.exists():
        before: dict[str, Any] = json.loads(path.read_text())
        if before["settings"] == asked:
            return Training(**{**before["training"], "losses": tuple(before["training"]["losses"])})
    path.parent.mkdir(parents=True, exist_ok=True)
    state = SavedState(path.with_suffix(".state"), asked)
    training = train(
        trainee.model(seed),
        trainee.batches(settings.num_steps, seed),
        trainee.loss_fn,
        optimizer=optimizer,
        rate=rate,
        num_steps=settings.num_steps,
        schedule=settings.schedule,
        warmup=settings.warmup,
        state=state,
        **trainee.options,
    )
    beside = path.with_suffix(".tmp")
    content = {"settings": asked, "training": asdict(training), "cpu_seconds": state.cpu_seconds}
    beside.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(beside, path)
    state.remove()
    return training


def _path(folder: Path, name: str, optimizer: str, rate: float, seed: int) -> Path:
    return folder / "runs" / name / f"{optimizer}-{rate:.4g}-{seed}.json"


def cpu_seconds(folder: Path, name: str, optimizer: str, found: Best, settings: Settings) -> float:
    """Return the total processor time of the trainings behind a Best."""
    searched = {(rate, settings.seeds[0]) for rate in found.tried} | {(found.rate, seed) for seed in settings.seeds}
    paths = [_path(folder, name, optimizer, rate, seed) for rate, seed in searched]
    return float(sum(json.loads(path.read_text())["cpu_seconds"] for path in paths))


def find_best(folder: Path, name: str, optimizer: str, settings: Settings, trainee: Trainee | None = None) -> Best:
    """Find the best rate with the first seed and train at this rate with all seeds.

    If every rate diverged, the smallest is taken.
    """
    rates = sorted(settings.grids[optimizer])
    first = settings.seeds[0]

    def final(rate: float) -> float:
        value = load_or_train(folder, name, optimizer, rate, first, settings, trainee).final
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
    trainings = tuple(
        load_or_train(folder, name, optimizer, chosen, seed, settings, trainee) for seed in settings.seeds
    )
    tried = {rate: load_or_train(folder, name, optimizer, rate, first, settings, trainee).final for rate in rates}
    return Best(chosen, len(rates) > 1 and chosen in (rates[0], rates[-1]), tried, trainings)
