"""The options of `spectrum` that decide what is computed, checked once."""

from __future__ import annotations

from dataclasses import dataclass

from blockhess.hvp import CHOICES
from blockhess_ext import arguments, ops


@dataclass(frozen=True)
class Options:
    """Options of `spectrum` that decide what is computed for a given problem."""

    num_probes: int
    num_steps: int
    tol: float | None
    tol_sigma: float | None
    engine: str
    distribution: str
    reorthogonalize: str
    memory_budget: int | str | None
    first_probe: int = 0
    keep_vectors: bool = False

    def __post_init__(self) -> None:
        for name, least in (("num_probes", 1), ("num_steps", 1), ("first_probe", 0)):
            value = arguments.integer(name, getattr(self, name), least, op="spectrum")
            object.__setattr__(self, name, value)
        arguments.tolerance(self.tol, self.tol_sigma, "spectrum", "tol_sigma")
        for name, choices in (
            ("keep_vectors", (True, False)),
            ("distribution", ops.DISTRIBUTIONS),
            ("reorthogonalize", arguments.REORTHOGONALIZE),
            ("engine", CHOICES),
        ):
            arguments.choice(name, getattr(self, name), choices, "spectrum")
