"""Trainings of the architectures, each kept in one file; the best learning rate of a grid that grows, then is refined.

A grid of decades grows by decades while its best rate is the first or the last; then the half decades beside that are
tried. Loss against rate has several minima where large rates lead to dead units, so the decades come first.

FOLDER/runs/ARCHITECTURE/OPTIMIZER-RATE-SEED.json holds one finished training. A file is taken instead of training again
if the settings in it are the same, so a run that was interrupted goes on with the training it was at; to redo an
architecture, remove its folder.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from blockhess.paper.architectures import ARCHITECTURES
from blockhess.training import Training, train

# Rates tried first, and how many decades may be added to them.
RATES = (1e-4, 1e-3, 1e-2, 1e-1)
GRIDS = {"SGD": RATES, "AdamW": RATES}
MOST_ADDED = 3


@dataclass(frozen=True)
class Settings:
    """How everything is trained.

    Attributes:
        num_steps, warmup, schedule: see training.train.
        seeds: the first chooses the rate, all measure it.
        grids: optimizer -> rates tried first.
        most_added: decades added beyond the grid at most.
    """

    num_steps: int = 600
    warmup: int = 30
    schedule: str = "cosine"
    seeds: tuple[int, ...] = (0, 1, 2)
    grids: dict[str, Sequence[float]] = field(default_factory=lambda: dict(GRIDS))
    most_added: int = MOST_ADDED


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


def trained(folder: Path, name: str, optimizer: str, rate: float, seed: int, settings: Settings) -> Training:
    """Return a training that is there, or do it and keep it.

    Args:
        folder: where FOLDER/runs is, or is made.
        name: of ARCHITECTURES.
    """
    path = _path(folder, name, optimizer, rate, seed)
    asked = {
        "architecture": name,
        "optimizer": optimizer,
        "rate": float(f"{rate:.6g}"),
        "seed": seed,
        "num_steps": settings.num_steps,
        "warmup": settings.warmup,
        "schedule": settings.schedule,
    }
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        if kept["settings"] == asked:
            return Training(**{**kept["training"], "losses": tuple(kept["training"]["losses"])})
    architecture = ARCHITECTURES[name]
    start = time.process_time()
    training = train(
        architecture.model(seed),
        architecture.batches(settings.num_steps, seed),
        architecture.loss_fn,
        optimizer=optimizer,
        rate=rate,
        num_steps=settings.num_steps,
        schedule=settings.schedule,
        warmup=settings.warmup,
        clip=architecture.clip,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    content = {"settings": asked, "training": asdict(training), "cpu_seconds": time.process_time() - start}
    beside.write_text(json.dumps(content, allow_nan=False) + "\n")
    os.replace(beside, path)
    return training


def _path(folder: Path, name: str, optimizer: str, rate: float, seed: int) -> Path:
    return folder / "runs" / name / f"{optimizer}-{rate:.4g}-{seed}.json"


def cpu_seconds(folder: Path, name: str, optimizer: str, found: Best, settings: Settings) -> float:
    """Return the processor time of the trainings behind a Best, whenever they were made."""
    searched = {(rate, settings.seeds[0]) for rate in found.tried} | {(found.rate, seed) for seed in settings.seeds}
    paths = [_path(folder, name, optimizer, rate, seed) for rate, seed in searched]
    return float(sum(json.loads(path.read_text())["cpu_seconds"] for path in paths))


def best(folder: Path, name: str, optimizer: str, settings: Settings) -> Best:
    """Search the rate at the first seed and train at the best one with all seeds.

    Where every rate diverged it is the smallest, and its trainings gain nothing.
    """
    rates = sorted(settings.grids[optimizer])
    first = settings.seeds[0]

    def final(rate: float) -> float:
        value = trained(folder, name, optimizer, rate, first, settings).final
        return math.inf if value is None else value

    for _ in range(settings.most_added):
        chosen = min(rates, key=final)
        if not math.isfinite(final(chosen)) or chosen == rates[0]:
            rates.insert(0, rates[0] / 10)
        elif chosen == rates[-1]:
            rates.append(rates[-1] * 10)
        else:
            break
    middle = min(rates, key=final)
    rates = sorted([*rates, middle / 10**0.5, middle * 10**0.5])
    chosen = min(rates, key=final)
    trainings = tuple(trained(folder, name, optimizer, chosen, seed, settings) for seed in settings.seeds)
    tried = {rate: trained(folder, name, optimizer, rate, first, settings).final for rate in rates}
    return Best(chosen, chosen in (rates[0], rates[-1]), tried, trainings)
