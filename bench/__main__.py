"""Measure the speed of blockhess on the CPU next to other implementations, and print the tables.

README.md in this folder describes the commands and the method. Exit codes:

    0  rows were measured or skipped; wrong rivals and missed targets are reported and are no failure
    1  a row failed: our own result was wrong, or an error occurred; the other rows were measured
    2  invalid arguments or files; nothing was measured
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.command import write_json
from bench.harness.environment import describe, peers
from bench.harness.machine import Machine
from bench.harness.report import ROWS, report
from bench.harness.result_file import SCHEMA, check_comparable, check_writable, comparison, read
from bench.harness.rows import measure_rows
from bench.harness.timing import CLOCKS, CPU, use_clock


def run(names: list[str], size: str, clock: str, path: Path | None) -> dict[str, Any]:
    """Return the result of these rows, written to the file after each row."""
    machine = Machine.measured(CPU, size)
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "size": size,
        "environment": {**describe(), "clock": clock},
        "peers": peers(),
        "limits": machine.limits,
        "rows": {},
    }
    measure_rows(ROWS, names, machine, result, lambda: path and write_json(result, path))
    return result


def not_timed(row: dict[str, Any]) -> dict[str, str]:
    """Return rival -> reason for every rival that is installed but failed or was wrong."""
    failures = {rival: times.get("failure", "") for rival, times in row.get("times", {}).items()}
    return {rival: failure for rival, failure in failures.items() if failure and not failure.startswith("absent")}


def select(only: Sequence[str] | None, names: Iterable[str]) -> list[str]:
    """Return the names that contain one of these texts, in their order.

    Raises:
        ValueError: A text matches no row.
    """
    names = list(names)
    for text in only or ():
        if not any(text in name for name in names):
            raise ValueError(f"bench: --only must be part of a row's name, got {text!r}; rows: {'; '.join(names)}")
    return [name for name in names if not only or any(text in name for text in only)]


def with_rows(result: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the result with only those of these rows that it has."""
    return {**result, "rows": {name: result["rows"][name] for name in names if name in result["rows"]}}


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="ROW", help="rows whose name contains this; repeatable")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that everything runs")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result to this file")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="also print ratios to an earlier result")
    parser.add_argument("--show", type=Path, metavar="NEW.json", help="measure nothing; print the tables of a result")
    parser.add_argument("--threads", type=int, default=1, help="number of threads of PyTorch (default 1)")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="wall clock, or CPU seconds of one thread")
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.threads > 1 and options.clock == "cpu":
        parser.error("--clock cpu sums the seconds of all threads: --threads must be 1")
    if options.show and (options.json or options.quick):
        parser.error("--show measures nothing and excludes --json and --quick")
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    size = "quick" if options.quick else "full"
    try:  # check all inputs before measuring
        loaded = read(options.show) if options.show else None
        names = select(options.only, ROWS if loaded is None else loaded["rows"])
        old = read(options.compare) if options.compare else None
        if old is not None:
            check_comparable(old, size if loaded is None else loaded["size"])
        if options.json:
            check_writable(options.json)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if loaded is None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # nothing is compiled yet
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # no compilation in the background
            result = run(names, size, options.clock, options.json)
    else:
        result = with_rows(loaded, names)
    print(report(result))
    if old is not None:
        print(f"\n{comparison(with_rows(old, names) if options.only else old, result)}")
    rows = result["rows"].items()
    lines = [f"{name}: not timed: {rival}, {why}" for name, row in rows for rival, why in not_timed(row).items()]
    failed = [f"{name}: failed: {row['failure']}" for name, row in rows if "failure" in row]
    print("".join(f"bench: {line}\n" for line in lines + failed), end="", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
