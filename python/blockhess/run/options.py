"""The options of `spectrum` that decide what is computed, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from blockhess.hvp import CHOICES
from blockhess_ext import arguments, ops

# Of `spectrum` without counts: the tolerance. Counts that are not given, which with a tolerance are upper limits.
DEFAULT_TOL, DEFAULT_PROBES, DEFAULT_STEPS = 0.01, 10, 100


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


def with_defaults(
    num_probes: int | None, num_steps: int | None, tol: float | None, tol_sigma: float | None, **others: Any
) -> Options:
    """Return the options of a call of `spectrum`, whose counts and tolerances may be None."""
    if num_probes is num_steps is tol is tol_sigma is None:
        tol = DEFAULT_TOL
    num_probes = DEFAULT_PROBES if num_probes is None else num_probes
    num_steps = DEFAULT_STEPS if num_steps is None else num_steps
    return Options(num_probes, num_steps, tol, tol_sigma, **others)
