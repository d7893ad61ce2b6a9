"""The work of a job, cut into units, and what keeps them once they are done.

A unit is some probes of some blocks: recurrences that need nothing of any other, so units may be computed in any order,
on any machine, and later be put together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from blockhess_ext import Quadrature, State


@dataclass(frozen=True)
class Unit:
    """Probes first_probe ... first_probe + num_probes - 1 of some blocks; with no probe, blocks to be written out.

    Attributes:
        blocks: their numbers.
    """

    first_probe: int
    num_probes: int
    blocks: tuple[int, ...]

    @property
    def probes(self) -> range:
        """The probes."""
        return range(self.first_probe, self.first_probe + self.num_probes)

    def halves(self) -> tuple[Unit, ...]:
        """The unit in two, by its probes or else by its blocks; nothing where it is a single recurrence.

        Example:
            >>> Unit(0, 3, (4, 5)).halves()
            (Unit(first_probe=0, num_probes=1, blocks=(4, 5)), Unit(first_probe=1, num_probes=2, blocks=(4, 5)))
        """
        first, middle = self.first_probe, self.num_probes // 2
        if self.num_probes > 1:
            return Unit(first, middle, self.blocks), Unit(first + middle, self.num_probes - middle, self.blocks)
        middle = len(self.blocks) // 2
        if middle:
            return tuple(Unit(first, self.num_probes, part) for part in (self.blocks[:middle], self.blocks[middle:]))
        return ()

    def covers(self, other: Unit) -> bool:
        """Whether the other one is a piece of it, or all."""
        inside = set(other.probes) <= set(self.probes) and set(other.blocks) <= set(self.blocks)
        return inside and (self.num_probes > 0) == (other.num_probes > 0)

    def holds(self, other: Unit) -> bool:
        """Whether the other one is a piece of it, and not all."""
        return self.covers(other) and other != self


@dataclass(frozen=True)
class UnitResult:
    """A unit that is done: its quadratures, one of each block in the unit's order, the products that they took, and the
    state after the last step where it was to be kept."""

    unit: Unit
    part: Quadrature
    hvps: int
    last: State | None = None


@dataclass
class Recorder:
    """What a job keeps while it runs: here in memory, and no more than the result needs.

    Attributes:
        keep_vectors: whether the state after the last step of every unit is kept.
        vectors: those states.
    """

    keep_vectors: bool = False
    vectors: list[tuple[Unit, State]] = field(default_factory=list)

    def done(self, unit: Unit) -> UnitResult | None:
        """The unit, if it was done before."""
        return None

    def finished(self) -> list[UnitResult]:
        """All units that were done before, by any process."""
        return []

    def in_work(self) -> Unit | None:
        """The unit that this process had in work when it was broken off."""
        return None

    def is_cut(self, unit: Unit) -> bool:
        """Whether work on pieces of the unit was begun before."""
        return False

    def state(self, unit: Unit) -> tuple[State | None, int]:
        """Where work on a unit was broken off, and the products that had taken."""
        return None, 0

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around the work on a unit."""
        yield

    def after_step(self, unit: Unit, state: State, hvps: int) -> None:
        """Told after every step on a unit; the next step changes the state's tensors."""

    def add(self, done: UnitResult) -> None:
        """Told of a unit that is done, with its state where it is to be kept: now, as the next unit may change it."""
        if done.last is not None:
            self.vectors.append((done.unit, done.last.copy()))
