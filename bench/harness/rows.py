"""The rows of a speed table: targets, measurements, and how they are formatted."""

from __future__ import annotations

import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bench.harness.machine import Machine, TooSmall
from bench.harness.timing import Entry, WrongResult, wrong_results

# Suffix of a quantity: its value if the same bytes were moved at triad bandwidth.
AT_TRIAD = ", at triad bandwidth"


@dataclass(frozen=True)
class Target:
    """A bound on a measured quantity: at least `value`, or at most."""

    text: str
    quantity: str
    value: float
    at_least: bool

    def met(self, measured: float) -> bool:
        return measured >= self.value if self.at_least else measured <= self.value


def faster(rival: str, times: float, when: str = "") -> Target:
    """Return the target that ours is at least `times` times faster than the rival."""
    return Target(f">= {times:g} x {rival}{when}", f"times faster than {rival}{when}", times, True)


@dataclass
class Row:
    """Measurements of one row."""

    error: float  # largest difference from the reference, in the unit of the row
    measured: dict[str, float] = field(default_factory=dict)  # quantity, such as that of a Target -> value
    times: dict[str, dict[str, Any]] = field(default_factory=dict)  # rival -> times, or why it was not timed
    notes: list[str] = field(default_factory=list)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)  # name -> points (x, y)

    @staticmethod
    def of(entries: Mapping[str, Entry]) -> Row:
        """Return the row of several entries, ours first, with the median over rounds of how many times faster ours is.

        Raises:
            WrongResult: Ours is wrong or failed.
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


Rows = dict[str, tuple[Callable[[Machine], Row], list[Target]]]  # by the name of the row


def measure_row(row_of: Callable[[Machine], Row], machine: Machine, keep: bool = False) -> dict[str, Any]:
    """Return the JSON entry of a row: its measurements, "skipped" or "failure", load average and seconds.

    With `keep`, a row that is wrong has both a "failure" and its measurements.
    """
    start, load, cuda = time.perf_counter(), os.getloadavg()[0], machine.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)
    try:
        with wrong_results() if keep else nullcontext() as wrong:
            found: dict[str, Any] = asdict(row_of(machine))
        if wrong:
            found["failure"] = "; ".join(wrong)
        if cuda:
            found["peak_mib"] = torch.cuda.max_memory_allocated(machine.device) / 2**20
    except TooSmall as error:
        found = {"skipped": str(error)}
    except Exception as error:  # measure the other rows
        traceback.print_exc()
        found = {"failure": f"{type(error).__name__}: {error}"}
    return {**found, "load": [load, os.getloadavg()[0]], "seconds": time.perf_counter() - start}


def measure_rows(
    rows: Rows,
    names: Iterable[str],
    machine: Machine,
    result: dict[str, Any],
    save: Callable[[], object],
    keep: bool = False,
) -> None:
    """Measure these rows into result["rows"], and call `save` after each, so that a time limit loses one at most.

    `keep` as for `measure_row`.
    """
    for name in names:
        row = result["rows"][name] = measure_row(rows[name][0], machine, keep)
        print(f"{row['seconds']:6.1f} s  {name}", file=sys.stderr, flush=True)
        save()


def short(value: float) -> str:
    """Format a number with three digits, or all digits before the point."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def format_value(quantity: str, value: float) -> str:
    """Format a measured value; a share in percent."""
    return f"{100 * value:.1f} %" if "share" in quantity else f"{value:.3g}"


def missing(row: Mapping[str, Any]) -> str:
    """Return why a row has no measurements that hold, or an empty string if it has."""
    return "failed" if "failure" in row else f"skipped: {row['skipped']}" if "skipped" in row else ""


def verdict(target: Target, row: Mapping[str, Any]) -> tuple[str, str]:
    """Return the measured value, or "-", and "met" or "missed", or why it was not measured or does not hold."""
    why = missing(row)
    if why and target.quantity not in row.get("measured", {}):
        return "-", why
    if target.quantity not in row["measured"]:
        rival = target.quantity.removeprefix("times faster than ")
        return "-", f"not measured: {row['times'].get(rival, {}).get('failure', 'no such rival')}"
    value = row["measured"][target.quantity]
    text, at_triad = format_value(target.quantity, value), row["measured"].get(target.quantity + AT_TRIAD)
    if at_triad is not None:
        text += f" (at triad bandwidth {format_value(target.quantity, at_triad)})"
    return text, why or ("met" if target.met(value) else "missed")


Judge = Callable[[str, Target], tuple[str, str]]  # (name of a row, target) -> value and verdict


def target_table(targets: Mapping[str, Sequence[Target]], judges: Mapping[str, Judge]) -> list[str]:
    """Return the lines of the table of all targets, with measured value and verdict of the judge of each column."""
    lines = [
        f"| work | target |{''.join(f' {column} | |' for column in judges)}",
        f"|---|---|{'--:|---|' * len(judges)}",
    ]
    for name, wanted in targets.items():
        for i, target in enumerate(wanted):
            cells = [cell for judge in judges.values() for cell in judge(name, target)]
            lines.append(f"| {name if i == 0 else ''} | {target.text} | {' | '.join(cells)} |")
    return lines
