"""The speed table of the CUDA kernels, measured on this machine's GPU.

    python -m bench.ops.gpu --out DIR            full sizes, 20 GB of device memory: DIR/results.json and DIR/results.md
    python -m bench.ops.gpu --out DIR --quick    the same at smaller sizes, which meet no target; so on a small GPU
    python -m bench.ops.gpu --out DIR --cpu      the same code at tiny sizes on the CPU: checks the script, times nothing
    python -m bench.ops.gpu --table FILE         prints the table of a results.json
    python -m bench.ops.gpu --unproven           prints the table before any GPU has run it

Every row checks its results before it is timed. A row that fails leaves the others to run; the exit code is then 1.
Missed targets are reported and are no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from bench.harness.environment import describe_device
from bench.harness.machine import Machine
from bench.harness.rows import Target, judged, target_table
from bench.ops.gpu_rows import ROWS

UNPROVEN = "unproven on hardware"
FULL_SIZE_MEMORY = 30 * 2**30


def verdict(target: Target, row: dict[str, Any], full: bool) -> tuple[str, str]:
    """What was measured, and whether that is enough."""
    if not full and "failure" not in row:
        return "-", UNPROVEN
    return judged(target, row)


def table(results: dict[str, Any] | None) -> str:
    """The targets and, from results, what was measured."""
    full = results is not None and results["size"] == "full" and results["environment"]["device"] != "cpu"
    rows = (results or {}).get("rows", {})

    def judge(name: str, target: Target) -> tuple[str, str]:
        return verdict(target, rows[name], full) if name in rows else ("-", UNPROVEN)

    return "\n".join(target_table({name: targets for name, (_, targets) in ROWS.items()}, {"measured": judge}))


def report(results: dict[str, Any]) -> str:
    """The table, all times, and where they were measured."""
    lines = [
        table(results),
        "",
        "| row | timed | median, ms | fastest | slowest | repeats |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for name, row in results["rows"].items():
        for what, t in row.get("times", {}).items():
            numbers = f"{t['median_ms']:.4g} | {t['min_ms']:.4g} | {t['max_ms']:.4g} | {t['repeats']}"
            lines.append(f"| {name} | {what} | {numbers} |")
    lines += ["", "| row | also measured |", "|---|---|"]
    for name, row in results["rows"].items():
        if "failure" in row:
            lines.append(f"| {name} | **failed**: {row['failure']} |")
            continue
        also = [f"{what} {value:.4g}" for what, value in row["measured"].items()]
        also += [f"difference from the reference {row['error']:.2g}"]
        if "peak_mib" in row:
            also.append(f"peak device memory {row['peak_mib']:.0f} MiB")
        lines.append(f"| {name} | {', '.join(also)} |")
    bandwidth = results["copy_bandwidth"] / 1e9
    lines += ["", f"Copy bandwidth of this run, read and written: {bandwidth:.4g} GB/s. Sizes: {results['size']}."]
    lines += [", ".join(f"{key} {value}" for key, value in results["environment"].items()) + "."]
    return "\n".join(lines)


def run_row(name: str, machine: Machine) -> dict[str, Any]:
    """One row's numbers, or its failure; the memory that it took is free again."""
    start, found = time.perf_counter(), {}
    if machine.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(machine.device)
    try:
        found = vars(ROWS[name][0](machine))
    except Exception as error:  # the other rows are worth having
        traceback.print_exc()
        found = {"failure": f"{type(error).__name__}: {error}"}
    if machine.device.type == "cuda" and "failure" not in found:
        found["peak_mib"] = torch.cuda.max_memory_allocated(machine.device) / 2**20
    return {**found, "seconds": time.perf_counter() - start}


def size_for(device: torch.device, quick: bool) -> str:
    """The sizes that the device holds: the targets' own need some 20 GB."""
    if device.type == "cpu":
        return "tiny"
    small = torch.cuda.get_device_properties(device).total_memory < FULL_SIZE_MEMORY
    if small and not quick:
        print("bench/ops/gpu.py: this GPU is too small for the full sizes; taking the quick ones", file=sys.stderr)
    return "quick" if quick or small else "full"


def write(results: dict[str, Any], out: Path) -> None:
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "results.md").write_text(report(results) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for results.json and results.md")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of this results.json")
    parser.add_argument("--unproven", action="store_true", help="print the targets, all unproven")
    options = parser.parse_args()
    if options.unproven:
        print(table(None))
        return 0
    if options.table:
        print(report(json.loads(options.table.read_text())))
        return 0
    if options.out is None:
        parser.error("--out DIR is needed")
    if not options.cpu and not torch.cuda.is_available():
        print("bench/ops/gpu.py: torch sees no CUDA device; --cpu checks the script without one", file=sys.stderr)
        return 1

    options.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cpu") if options.cpu else torch.device("cuda", torch.cuda.current_device())
    size = size_for(device, options.quick)
    machine = Machine.measured(device, size)
    results: dict[str, Any] = {
        "environment": describe_device(device),
        "size": size,
        "copy_bandwidth": machine.limits["copy"],
        "rows": {},
    }
    for name in ROWS:
        results["rows"][name] = run_row(name, machine)
        print(f"{results['rows'][name]['seconds']:6.1f} s  {name}", file=sys.stderr, flush=True)
        write(results, options.out)  # after every row, so that a time limit loses one row at most
    print(report(results))
    return int(any("failure" in row for row in results["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
