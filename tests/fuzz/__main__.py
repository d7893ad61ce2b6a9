"""Fuzz every reader with as many inputs as asked, and write what came of it as JSON; exit code 1 where something did.

Every input is a function of (target, seed, index): `--only TARGET --first INDEX --inputs 1` runs one again, and
--out keeps what it holds of other targets. One that takes longer than LIMIT_SECONDS counts as a hang, and memory that
grows by more than LIMIT_MEMORY as a leak or a bomb.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from bench.harness.environment import describe
from tests.fuzz.result_files import ResultFiles
from tests.fuzz.state_crashes import StateCrashes
from tests.fuzz.state_files import StateFiles, StateTexts
from tests.fuzz.targets import Target

TARGETS: dict[str, type[Target]] = {t.name: t for t in (ResultFiles, StateFiles, StateTexts, StateCrashes)}
CHUNK = 10_000  # inputs between two writes of --out
RAM_DISK = "/dev/shm"  # syncs cost nothing there
LIMIT_SECONDS = 10
LIMIT_MEMORY = 128 * 2**20


class Hang(BaseException):
    """A reader took too long; no error that it may catch."""


def fuzz(target: Target, seed: int, indices: range) -> dict[str, Any]:
    """Run the inputs of these indices; count them and collect what was found."""
    counts, found = Counter[str](), dict[str, dict[str, int]]()
    start, slowest = time.perf_counter(), 0.0
    warm = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for index in indices:
        before = time.perf_counter()
        signal.alarm(LIMIT_SECONDS)
        try:
            counts["accepted" if target.run(seed, index) else "refused"] += 1
        except (Exception, Hang) as error:
            counts["findings"] += 1
            place = traceback.extract_tb(error.__traceback__)[-1]
            kind = f"{type(error).__name__}: {re.sub(r'[0-9]+', '#', str(error))[:160]} ({place.name})"
            found.setdefault(kind, {"first": index, "count": 0})["count"] += 1
        finally:
            signal.alarm(0)
        slowest = max(slowest, time.perf_counter() - before)
        if index - indices.start == 1000:
            warm = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - warm) * 1024
    if growth > LIMIT_MEMORY:
        counts["findings"] += 1
        found["memory grew"] = {"first": indices.start, "count": 1}
    return {
        "inputs": len(indices),
        **{name: counts[name] for name in ("accepted", "refused", "findings")},
        "seconds": round(time.perf_counter() - start, 1),
        "slowest_seconds": round(slowest, 3),
        "memory_growth_bytes": growth,
        "found": found,
    }


def added(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """Two results of one target as one."""
    if not a:
        return b
    found = a["found"] | b["found"]
    for kind in a["found"].keys() & b["found"].keys():
        found[kind] = {"first": a["found"][kind]["first"], "count": a["found"][kind]["count"] + found[kind]["count"]}
    most = ("slowest_seconds", "memory_growth_bytes")
    return {key: max(a[key], b[key]) if key in most else a[key] + b[key] for key in b if key != "found"} | {
        "found": found
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1000, help="for every target")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=TARGETS, nargs="+", default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()

    def hang(*_: object) -> None:
        raise Hang(f"no answer within {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, hang)
    indices = range(args.first, args.first + args.inputs)
    made = {"seed": args.seed, "machine": describe()}
    # What was found of other targets stays.
    result = json.loads(args.out.read_text()) if args.out and args.out.exists() else {}
    for name in args.only or TARGETS:
        total: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(dir=RAM_DISK if Path(RAM_DISK).is_dir() else None) as folder:
            target = TARGETS[name](Path(folder))
            for first in range(indices.start, indices.stop, CHUNK):
                total = added(total, fuzz(target, args.seed, range(first, min(first + CHUNK, indices.stop))))
                result[name] = total | made
                if args.out:
                    args.out.write_text(json.dumps(result, indent=1) + "\n")
        print(name, json.dumps(result[name], indent=1), flush=True)
    return int(any(result[name]["findings"] for name in args.only or TARGETS))


if __name__ == "__main__":
    sys.exit(main())
