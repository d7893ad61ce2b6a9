"""Units of work cut among ranks, so that all have about as much to do.

All recurrences of the units stand in one line, block after block; it is cut into pieces of equal cost. A rank gets a
few probes of its first block, all of those in between, a few of its last: three units at most of each that was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from blockhess.run.recorder import Unit

Item = tuple[int, int]  # block and probe; probe -1 stands for a block written out


def items_of(unit: Unit) -> list[Item]:
    """The recurrences of a unit, block after block."""
    return [(l, p) for l in unit.blocks for p in unit.probes or (-1,)]


def shared(
    units: Sequence[Unit], cost: Callable[[int, int], float], size: int, done: Collection[Item] = ()
) -> list[list[Unit]]:
    """What each of `size` ranks has to do.

    Args:
        units: no two hold the same recurrence.
        cost: of a block's recurrence, or of writing it out; given the block and the probe, -1 where it is written out.
        size: ranks.
        done: recurrences that need not be made.

    Returns:
        One list a rank, whose units together are those given, less what is done.

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
    """Few units that together hold these recurrences of one unit."""
    probes: dict[int, list[int]] = {}
    for l, p in items:
        probes.setdefault(l, []).append(p)
    blocks: dict[tuple[int, int], list[int]] = {}
    for l, ps in probes.items():
        for first, count in _runs(ps):
            blocks.setdefault((first, count), []).append(l)
    return [
        Unit(first, count, tuple(numbers)) if unit.num_probes else Unit(unit.first_probe, 0, tuple(numbers))
        for (first, count), numbers in blocks.items()
    ]


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending integers as (first, how many) of those that follow each other."""
    runs: list[tuple[int, int]] = []
    for n in numbers:
        if runs and n == sum(runs[-1]):
            runs[-1] = runs[-1][0], runs[-1][1] + 1
        else:
            runs.append((n, 1))
    return runs
