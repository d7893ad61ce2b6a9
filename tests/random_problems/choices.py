"""The choices of which a random problem is made, as a function of its seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Choices:
    """The choices of one problem, for the problem as a user would write it or for its plain twin in float64.

    Args:
        seed: of all choices.
        plain: whether the twin is built.
        forced: names that are chosen wherever they can be.

    Attributes:
        kinds: what has been chosen.
        stored: dtype of the model and of what belongs to it.
        compute: dtype in which `spectrum` computes.
        held: modules that the loss function holds.
        before: what the twin does once, after it has the parameters of the problem.
    """

    def __init__(self, seed: int, plain: bool, forced: frozenset[str] = frozenset()) -> None:
        self.seed, self.plain, self.forced = seed, plain, forced
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.kinds: dict[str, None] = {}
        self.stored = self.compute = torch.float32
        self.held: list[nn.Module] = []
        self.before: list[Callable[[], None]] = []

    def note(self, *kinds: str) -> None:
        self.kinds.update(dict.fromkeys(kinds))

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def pick(self, weights: Mapping[str, float]) -> str:
        """Choose a name by weight, and note it."""
        chosen = self.random.choices(list(weights), list(weights.values()))[0]
        chosen = next((name for name in weights if name in self.forced), chosen)
        self.note(chosen)
        return chosen

    def make(self, options: Mapping[str, tuple[float, Callable[[Choices], Any]]]) -> Any:
        """Choose a name by weight, and call its function."""
        return options[self.pick({name: weight for name, (weight, _) in options.items()})][1](self)

    def tensor(self, values: Tensor) -> Tensor:
        """The values as the problem stores them, rounded to the dtype of the model."""
        values = values.to(self.stored)
        return values.double() if self.plain else values

    def randn(self, *shape: int) -> Tensor:
        return self.tensor(torch.randn(shape, generator=self.generator))

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def hold(self, module: nn.Module) -> nn.Module:
        """A module that the loss function holds and that is no part of the model."""
        self.held.append(module.to(torch.float64 if self.plain else self.stored))
        return module
