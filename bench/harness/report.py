"""The tables of what `python -m bench` measured, from its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.end_to_end import end_to_end, same_accuracy
from bench.harness.rows import Judge, Target, judged, short, shown, target_table, unmeasured
from bench.ops import log_determinant, rows, scaling

# Of the machine, above the threads in use: more means that other programs ran.
SPARE_LOAD = 0.5

ROWS = {**rows.ROWS, **log_determinant.ROWS, **scaling.ROWS, **end_to_end.ROWS, **same_accuracy.ROWS}


def judge_of(rows: Mapping[str, Any], size: str = "full") -> Judge:
    """Judges targets by the rows of a result; "-" where a row was not run, or not at full size."""

    def judge(name: str, target: Target) -> tuple[str, str]:
        if name not in rows:
            return "-", "not run"
        value, word = judged(target, rows[name])
        return (value, word) if size == "full" or word not in ("met", "missed") else ("-", f"not judged at {size} size")

    return judge


def targets_of(names: Sequence[str]) -> dict[str, list[Target]]:
    """The targets of those rows, in the order of the table."""
    return {name: targets for name, (_, targets) in ROWS.items() if name in names and targets}


def times_table(rows: Mapping[str, Any]) -> list[str]:
    """Everyone who took part in every row: times, memory, error; or why not."""
    lines = [
        "| work | rival | ms (range) | times ours | first call, ms | peak, MiB | error |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in rows.items():
        if why := unmeasured(row):
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
    """What else was measured of ours, what to know of it, and how busy the machine was."""
    lines = ["| work | also measured | load |", "|---|---|--:|"]
    for name, row in rows.items():
        if unmeasured(row):
            continue
        also = [
            f"{what} {shown(what, x)}" for what, x in row["measured"].items() if not what.startswith("times faster")
        ]
        for what, points in row["curves"].items():
            also.append(f"ns by {what}: " + ", ".join(f"{x:.3g}: {y:.3g}" for x, y in points))
        load = " - ".join(f"{x:.1f}" for x in row["load"])
        lines.append(f"| {name} | {'; '.join(also + row['notes'])} | {load} |")
    return lines


def environment(result: dict[str, Any]) -> str:
    """Machine, threads, versions and commit of a run."""
    return ", ".join(f"{name} {value}" for name, value in result["environment"].items())


def load(result: dict[str, Any]) -> str:
    """How busy the machine was, and what that does to the numbers."""
    loads = [x for row in result["rows"].values() for x in row["load"]]
    text = f"load of the machine {min(loads):.1f} ... {max(loads):.1f}"
    if max(loads) > result["environment"]["threads"] + SPARE_LOAD:
        text += ": other programs took part of it meanwhile, which shares of limits feel more than ratios"
    return text


def report(result: dict[str, Any]) -> str:
    """All tables of a run, and where it was."""
    rows = result["rows"]
    limits = ", ".join(f"{name} {value / 1e9:.3g}" for name, value in result["limits"].items())
    parts = [
        target_table(targets_of(list(rows)), {"measured": judge_of(rows, result["size"])}),
        times_table(rows),
        measured_table(rows),
        [f"Limits of this machine in this run, GB/s and GFLOP/s: {limits}. Sizes: {result['size']}."],
        [f"{environment(result)}; {', '.join(f'{name} {version}' for name, version in result['peers'].items())}."],
        [f"{load(result).capitalize()}."],
    ]
    return "\n\n".join("\n".join(part) for part in parts)
