"""Partition of units of work among ranks, with about equal cost.

The recurrences of all units form one list, block after block, which is cut into contiguous pieces of equal cost. A rank
gets some probes of its first block, all probes of the blocks in between, and some of its last: at most three units.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby

from blockhess.results.unit import Unit

Item = tuple[int, int]  # block and probe; probe -1 stands for the exact computation of the block


def items_of(unit: Unit) -> list[Item]:
    """Return the recurrences of a unit, block after block."""
    return [(l, p) for l in unit.blocks for p in unit.probes or (-1,)]


def shared(
    units: Sequence[Unit], cost: Callable[[int, int], float], size: int, done: Collection[Item] = ()
) -> list[list[Unit]]:
    """Return one list of units for each of `size` ranks; together they hold all recurrences but those in `done`.

    Args:
        units: without common recurrences.
        cost: of a recurrence, given block and probe; probe -1 stands for the exact computation of the block.
        size: number of ranks.
        done: recurrences to omit.

    Example:
        >>> shared([Unit(0, 3, (0, 1))], lambda block, probe: 1.0, 2)
        [[Unit(first_probe=0, num_probes=3, blocks=(0,))], [Unit(first_probe=0, num_probes=3, blocks=(1,))]]
    """
    line = [(number, item) for number, unit in enumerate(units) for item in items_of(unit) if item not in done]
    costs = [cost(*item) for _, item in line]
    total, before = sum(costs), 0.0
    chosen: list[dict[int, list[Item]]] = [{} for _ in range(size)]
    for (number, item), c in zip(line, costs):
        rank = min(int((before + c / 2) / total * size), size - 1) if total else 0
        chosen[rank].setdefault(number, []).append(item)
        before += c
    return [[part for number, items in own.items() for part in _rectangles(units[number], items)] for own in chosen]


def _rectangles(unit: Unit, items: Sequence[Item]) -> list[Unit]:
    """Return few units that together hold these recurrences of one unit."""
    blocks: dict[tuple[int, int], list[int]] = {}  # (first probe, number of probes) -> blocks
    # Consecutive probes of one block have the same difference from their position.
    for (l, _), run in groupby(enumerate(items), lambda entry: (entry[1][0], entry[1][1] - entry[0])):
        probes = [p for _, (_, p) in run]
        span = (probes[0], len(probes)) if unit.num_probes else (unit.first_probe, 0)
        blocks.setdefault(span, []).append(l)
    return [Unit(first, count, tuple(numbers)) for (first, count), numbers in blocks.items()]
