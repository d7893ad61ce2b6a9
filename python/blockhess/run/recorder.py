"""The record of the work that a job has done; here in memory, in storage/directory.py on disk."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from blockhess.results.unit import Unit
from blockhess_ext import Quadrature, State


@dataclass(frozen=True)
class UnitResult:
    """The result of a unit."""

    unit: Unit
    part: Quadrature  # its blocks are in the unit's order
    hvps: int  # number of Hessian-vector products computed
    last: State | None = None  # the state after the last step, if vectors are kept


@dataclass
class Recorder:
    """Records the work of a job in memory; nothing is known of earlier work."""

    keep_vectors: bool = False  # whether to keep the state after the last step of every unit
    vectors: list[tuple[Unit, State]] = field(default_factory=list)

    def done(self, unit: Unit) -> UnitResult | None:
        """Return the result of a unit that is already computed, else None."""
        return None

    def finished(self) -> list[UnitResult]:
        """Return the results of all computed units, of any process."""
        return []

    def in_work(self) -> Unit | None:
        """Return the unit that this process was computing when it was interrupted."""
        return None

    def is_cut(self, unit: Unit) -> bool:
        """Return whether a proper part of the unit was computed or begun."""
        return False

    def state(self, unit: Unit) -> tuple[State | None, int]:
        """Return the state in which the unit was interrupted, and the number of products computed until then."""
        return None, 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Enclose the computation of a unit."""
        yield

    def after_step(self, unit: Unit, state: State, hvps: int) -> None:
        """Record a step of a unit. The next step overwrites the state's tensors."""

    def add(self, done: UnitResult) -> None:
        """Record a computed unit. Computing the next one may overwrite its state."""
        if done.last is not None:
            self.vectors.append((done.unit, done.last.copy()))
