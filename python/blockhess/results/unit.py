"""A unit of work: some probes of some blocks, whose recurrences depend on no others."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Unit:
    """Probes first_probe ... first_probe + num_probes - 1 of some blocks, given by their indices."""

    first_probe: int
    num_probes: int  # 0 for blocks whose Hessians are computed exactly
    blocks: tuple[int, ...]

    @property
    def probes(self) -> range:
        """Indices of the probes."""
        return range(self.first_probe, self.first_probe + self.num_probes)

    def halves(self) -> tuple[Unit, ...]:
        """Split the unit in two by its probes, or by its blocks if it has one probe; () if it cannot be split.

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
        """Return whether the other unit is a part of this one, or equal to it."""
        inside = set(other.probes) <= set(self.probes) and set(other.blocks) <= set(self.blocks)
        return inside and (self.num_probes > 0) == (other.num_probes > 0)

    def holds(self, other: Unit) -> bool:
        """Return whether the other unit is a proper part of this one."""
        return self.covers(other) and other != self
