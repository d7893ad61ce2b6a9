"""The speed of blockhess on this machine's CPU, beside every rival: prints the table.

    python -m bench                      all rows, on one thread
    python -m bench --only lanczos_step  rows whose names hold this; may be repeated
    python -m bench --quick              tiny sizes: that everything runs and is right; times mean nothing
    python -m bench --clock cpu          seconds of the processor, where other programs keep it busy
    python -m bench --compare OLD.json   also the ratios to an earlier run
    python -m bench --show NEW.json      measures nothing: the tables of a kept run

README.md in this folder says how it is measured. Exit code 1: something was wrong; missed targets are no failure.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.environment import describe, peers
from bench.machine import Machine, TooSmall
from bench.report import ROWS, report
from bench.result_file import SCHEMA, comparison, read, write
from bench.timing import CLOCKS, CPU, use_clock


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


def is_wrong(row: dict[str, Any]) -> bool:
    """Whether a row failed, or a rival in it returned other numbers."""
    return "failure" in row or any(t.get("failure", "").startswith("wrong") for t in row.get("times", {}).values())


def chosen(only: list[str] | None) -> list[str]:
    """The rows asked for, in the order of the table.

    Raises:
        ValueError: one matches no row.
    """
    for text in only or ():
        if not any(text in name for name in ROWS):
            raise ValueError(f"bench: --only must be part of a row's name, got {text!r}; rows: {'; '.join(ROWS)}")
    return [name for name in ROWS if not only or any(text in name for text in only)]


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
    torch.set_num_threads(options.threads)
    use_clock(options.clock)
    try:
        names = chosen(options.only)
        old = read(options.compare) if options.compare else None  # before hours are spent
        if options.show:
            result = read(options.show)
        else:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder  # so that nothing is compiled already
                os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # nor goes on compiling beside what is timed
                result = run(names, "quick" if options.quick else "full", options.clock, options.json)
        print(report(result))
        if old is not None:
            print(f"\n{comparison(old, result)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    wrong = [name for name, row in result["rows"].items() if is_wrong(row)]
    print("".join(f"bench: wrong or failed: {name}\n" for name in wrong), end="", file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
