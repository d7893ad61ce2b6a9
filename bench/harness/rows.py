"""A row of a speed table: what it must reach, what was measured, and the words for it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness.timing import Entry, WrongResult

# After a quantity: what moving the same bytes as fast as triad would give.
AT_TRIAD = ", at triad bandwidth"


@dataclass(frozen=True)
class Target:
    """What a row must reach: `value`, as the least or as the most."""

    text: str
    quantity: str
    value: float
    at_least: bool

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.at_least else measured <= self.value


def faster(rival: str, times: float, when: str = "") -> Target:
    """Ours is at least so many times faster than the rival."""
    return Target(f">= {times:g} x {rival}{when}", f"times faster than {rival}{when}", times, True)


@dataclass
class Row:
    """What one row gave."""

    error: float  # largest difference from the reference, in the unit that the row says
    measured: dict[str, float] = field(default_factory=dict)  # by Target.quantity, and more
    times: dict[str, dict[str, Any]] = field(default_factory=dict)  # of everyone who took part, or why not
    notes: list[str] = field(default_factory=list)  # what the numbers do not tell
    curves: dict[str, list[list[float]]] = field(default_factory=dict)  # points (x, y) by name

    @staticmethod
    def of(entries: Mapping[str, Entry]) -> Row:
        """The row of a contest, ours first: its times, and how many times faster ours is, the median of the rounds.

        Raises:
            WrongResult: ours is wrong or failed.
        """
        (name, ours), *others = entries.items()
        if ours.failure or ours.error is None:
            raise WrongResult(f"{name}: {ours.failure}; nothing was timed")
        row = Row(ours.error, times={rival: entry.summary() for rival, entry in entries.items()})
        for rival, entry in others:
            if not entry.failure:
                ratio = statistics.median(a / b for a, b in zip(entry.seconds, ours.seconds))
                row.measured[f"times faster than {rival}"] = ratio
        return row


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def shown(quantity: str, value: float) -> str:
    """A measured value as tables have it."""
    return f"{100 * value:.1f} %" if "share" in quantity else f"{value:.3g}"


def unmeasured(row: Mapping[str, Any]) -> str:
    """Why a row has no numbers, or nothing."""
    return "failed" if "failure" in row else f"skipped: {row['skipped']}" if "skipped" in row else ""


def judged(target: Target, row: Mapping[str, Any]) -> tuple[str, str]:
    """What was measured, and whether that is enough: "met", "missed", or why nobody knows."""
    if why := unmeasured(row):
        return "-", why
    if target.quantity not in row["measured"]:
        rival = target.quantity.removeprefix("times faster than ")
        return "-", f"not measured: {row['times'].get(rival, {}).get('failure', 'no such rival')}"
    value = row["measured"][target.quantity]
    text, at_triad = shown(target.quantity, value), row["measured"].get(target.quantity + AT_TRIAD)
    if at_triad is not None:
        text += f" (at triad bandwidth {shown(target.quantity, at_triad)})"
    return text, "met" if target.met(value) else "missed"


Judge = Callable[[str, Target], tuple[str, str]]


def target_table(targets: Mapping[str, Sequence[Target]], judges: Mapping[str, Judge]) -> list[str]:
    """Every target of every row, and for each column what its judge says: what was measured, and the verdict."""
    lines = [
        f"| work | target |{''.join(f' {column} | |' for column in judges)}",
        f"|---|---|{'--:|---|' * len(judges)}",
    ]
    for name, wanted in targets.items():
        for i, target in enumerate(wanted):
            cells = [cell for judge in judges.values() for cell in judge(name, target)]
            lines.append(f"| {name if i == 0 else ''} | {target.text} | {' | '.join(cells)} |")
    return lines
