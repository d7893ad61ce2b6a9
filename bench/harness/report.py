"""The rows of `python -m bench`, and the tables of its results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.end_to_end import fixed_budget, same_accuracy
from bench.harness.environment import one_line
from bench.harness.rows import Judge, Rows, Target, format_value, missing, short, target_table, verdict
from bench.hvp import one_pass, products
from bench.ops import log_determinant, rows, scaling

# A load average above the number of threads by more than this means that other programs ran.
SPARE_LOAD = 0.5

_MODULES: tuple[Any, ...] = (rows, log_determinant, scaling, products, one_pass, fixed_budget, same_accuracy)
ROWS: Rows = {name: row for module in _MODULES for name, row in module.ROWS.items()}


def judge_of(rows: Mapping[str, Any], size: str = "full") -> Judge:
    """Return the judge of targets by the rows of a result; it judges rows at full size only."""

    def judge(name: str, target: Target) -> tuple[str, str]:
        if name not in rows:
            return "-", "not run"
        value, word = verdict(target, rows[name])
        return (value, word) if size == "full" or word not in ("met", "missed") else ("-", f"not judged at {size} size")

    return judge


def targets_of(names: Sequence[str]) -> dict[str, list[Target]]:
    """Return the targets of these rows, in the order of ROWS."""
    return {name: targets for name, (_, targets) in ROWS.items() if name in names and targets}


def times_table(rows: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of times, memory and error of every rival of every row."""
    lines = [
        "| work | rival | ms (range) | times ours | first call, ms | peak, MiB | error |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        if why := missing(row):
            lines.append(f"| {name} | {why}{': ' + row['failure'] if 'failure' in row else ''} | | | | | |")
            continue
        for i, (rival, t) in enumerate(row["times"].items()):
            head = f"| {name if i == 0 else ''} | {rival} |"
            error = "-" if t["error"] is None else f"{t['error']:.1g}"
            if "failure" in t:
                lines.append(f"{head} not timed: {t['failure']} | | | | {error} |")
                continue
            found = row["measured"]
            ratio = found.get(f"times faster than {rival}", found.get(f"times faster than {rival}, again"))
            median, fastest, slowest, first = (short(t[f"{x}_ms"]) for x in ("median", "min", "max", "first"))
            times, peak = ("-" if x is None else f"{x:.2f}" for x in (ratio, t["peak_mib"]))
            lines.append(f"{head} {median} ({fastest} - {slowest}) | {times} | {first} | {peak} | {error} |")
    return lines


def measured_table(rows: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table of all other quantities, notes and load averages."""
    lines = ["| work | also measured | load |", "|---|---|--:|"]
    for name, row in rows.items():
        if missing(row):
            continue
        also = [
            f"{what} {format_value(what, x)}"
            for what, x in row["measured"].items()
            if not what.startswith("times faster")
        ]
        for what, points in row["curves"].items():
            also.append(f"ns by {what}: " + ", ".join(f"{x:.3g}: {y:.3g}" for x, y in points))
        load = " - ".join(f"{x:.1f}" for x in row["load"])
        lines.append(f"| {name} | {'; '.join(also + row['notes'])} | {load} |")
    return lines


def environment(result: dict[str, Any]) -> str:
    """Return machine, threads, versions and commit of a result."""
    return one_line(result["environment"])


def load(result: dict[str, Any]) -> str:
    """Return the range of the load average, and whether other programs ran."""
    loads = [x for row in result["rows"].values() for x in row["load"]]
    text = f"load average {min(loads):.1f} ... {max(loads):.1f}"
    if max(loads) > result["environment"]["threads"] + SPARE_LOAD:
        text += ": other programs were running, which affects shares of limits more than ratios"
    return text


def report(result: dict[str, Any]) -> str:
    """Return all tables of a result, followed by the environment."""
    rows = result["rows"]
    limits = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in result["limits"].items())
    parts = [
        target_table(targets_of(list(rows)), {"measured": judge_of(rows, result["size"])}),
        times_table(rows),
        measured_table(rows),
        [f"Limits of this machine in this run, GB/s and GFLOP/s: {limits}. Sizes: {result['size']}."],
        [f"{environment(result)}; {one_line(result['peers'])}."],
        [f"{load(result).capitalize()}."],
    ]
    return "\n\n".join("\n".join(part) for part in parts)
