"""What a user may ask of a run, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import blockhess_ext
from blockhess.hvp import CHOICES


@dataclass(frozen=True)
class Options:
    """The options of `spectrum` that decide what is computed, once the problem is posed."""

    num_probes: int
    num_steps: int
    tol: float | None
    sigma: float | None
    engine: str
    distribution: str
    reorthogonalize: str
    memory_budget: int | str | None
    first_probe: int = 0
    keep_vectors: bool = False

    def __post_init__(self) -> None:
        for name in ("num_probes", "num_steps"):
            object.__setattr__(self, name, count(name, getattr(self, name)))
        object.__setattr__(self, "first_probe", count("first_probe", self.first_probe, least=0))
        choice("keep_vectors", self.keep_vectors, (True, False))
        blockhess_ext.arguments.tolerance(self.tol, self.sigma, "spectrum")
        for name, choices in (
            ("distribution", blockhess_ext.ops.DISTRIBUTIONS),
            ("reorthogonalize", blockhess_ext.arguments.REORTHOGONALIZE),
            ("engine", CHOICES),
        ):
            choice(name, getattr(self, name), choices)


def choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuses a value that is none of the choices."""
    blockhess_ext.arguments.choice(name, value, choices, "spectrum")


def count(name: str, value: Any, op: str = "spectrum", least: int = 1) -> int:
    """The value as an int of at least so much."""
    return blockhess_ext.arguments.integer(name, value, least, op=op)
