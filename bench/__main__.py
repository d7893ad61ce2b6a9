"""The speed of blockhess on this machine's CPU, beside every rival: prints the table.

    python -m bench                      all rows, on one thread
    python -m bench --only lanczos_step  rows whose names hold this; may be repeated
    python -m bench --quick              tiny sizes: that everything runs and is right; times mean nothing
    python -m bench --clock cpu          seconds of the processor, where other programs keep it busy
    python -m bench --compare OLD.json   also the ratios to an earlier run
    python -m bench --show NEW.json      measures nothing: the tables of a kept run

README.md in this folder says how it is measured. Exit codes:

    0  rows were measured, or skipped with the reason; rivals that are wrong are refused, targets may be missed
    1  a row failed: our own result was wrong, or something broke; the other rows were measured
    2  arguments or files are not as they must be; nothing was measured
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.harness.environment import describe, peers
from bench.harness.machine import Machine, TooSmall
from bench.harness.report import ROWS, report
from bench.harness.result_file import SCHEMA, check_comparable, check_writable, comparison, read, write
from bench.harness.timing import CLOCKS, CPU, use_clock


def run_row(name: str, machine: Machine) -> dict[str, Any]:
    """One row's numbers, or why there are none."""
    start, load = time.perf_counter(), os.getloadavg()[0]
    try:
        found: dict[str, Any] = asdict(ROWS[name][0](machine))
    except TooSmall as error:
        found = {"skipped": str(error)}
    except Exception as error:  # the other rows are worth having
        traceback.print_exc()
        found = {"failure": f"{type(error).__name__}: {error}"}
    return {**found, "load": [load, os.getloadavg()[0]], "seconds": time.perf_counter() - start}


def run(names: list[str], size: str, clock: str, path: Path | None) -> dict[str, Any]:
    """Measure rows; the file is written after each, so that what is done is kept."""
    result: dict[str, Any] = {
        "schema": SCHEMA,
        "size": size,
        "environment": {**describe(), "clock": clock},
        "peers": peers(),
        "limits": {},
        "rows": {},
    }
    machine = Machine.measured(CPU, size)
    result["limits"] = machine.limits
    for name in names:
        result["rows"][name] = run_row(name, machine)
        print(f"{result['rows'][name]['seconds']:6.1f} s  {name}", file=sys.stderr, flush=True)
        if path:
            write(result, path)
    return result


def refused(row: dict[str, Any]) -> dict[str, str]:
    """Rival -> why it was not timed, of those that are there but failed or returned other numbers."""
    failures = {rival: times.get("failure", "") for rival, times in row.get("times", {}).items()}
    return {rival: failure for rival, failure in failures.items() if failure and not failure.startswith("absent")}


def chosen(only: Sequence[str] | None, names: Iterable[str]) -> list[str]:
    """The names that were asked for, in their order.

    Raises:
        ValueError: one matches no row.
    """
    names = list(names)
    for text in only or ():
        if not any(text in name for name in names):
            raise ValueError(f"bench: --only must be part of a row's name, got {text!r}; rows: {'; '.join(names)}")
    return [name for name in names if not only or any(text in name for text in only)]


def with_rows(result: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The result with these rows alone, as far as it has them."""
    return {**result, "rows": {name: result["rows"][name] for name in names if name in result["rows"]}}


def main() -> int:
    parser = argparse.ArgumentParser("python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", metavar="ROW", help="rows whose names hold this; may be repeated")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks, no times worth quoting")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write everything measured to this file")
    parser.add_argument("--compare", type=Path, metavar="OLD.json", help="also ratios to an earlier run")
    parser.add_argument("--show", type=Path, metavar="NEW.json", help="measure nothing: tables of a file of --json")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch, for everybody (default 1)")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of the processor, for a busy machine and one thread",
    )
    options = parser.parse_args()
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.threads > 1 and options.clock == "cpu":
        parser.error("--clock cpu adds up the seconds of all threads: --threads must be 1")
    if options.show and (options.json or options.quick):
        parser.error("--show measures nothing: --json and --quick must not be given")
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    size = "quick" if options.quick else "full"
    try:  # all that can be wrong, before hours are spent
        shown = read(options.show) if options.show else None
        names = chosen(options.only, ROWS if shown is None else shown["rows"])
        old = read(options.compare) if options.compare else None
        if old is not None:
            check_comparable(old, size if shown is None else shown["size"])
        if options.json:
            check_writable(options.json)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if shown is None:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # so that nothing is compiled already
            os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # nor goes on compiling beside what is timed
            result = run(names, size, options.clock, options.json)
    else:
        result = with_rows(shown, names)
    print(report(result))
    if old is not None:
        print(f"\n{comparison(with_rows(old, names) if options.only else old, result)}")
    rows = result["rows"].items()
    lines = [f"{name}: not timed: {rival}, {why}" for name, row in rows for rival, why in refused(row).items()]
    failed = [f"{name}: failed: {row['failure']}" for name, row in rows if "failure" in row]
    print("".join(f"bench: {line}\n" for line in lines + failed), end="", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
