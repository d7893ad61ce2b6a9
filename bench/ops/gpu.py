"""Measure the speed of the CUDA kernels on this machine's GPU, and print the tables.

    python -m bench.ops.gpu --out DIR            full sizes, 20 GB of GPU memory: DIR/results.json and DIR/results.md
    python -m bench.ops.gpu --out DIR --quick    smaller sizes, also chosen on a small GPU; targets are not judged
    python -m bench.ops.gpu --out DIR --cpu      tiny sizes on the CPU, to check the script without a GPU
    python -m bench.ops.gpu --table FILE         print the tables of a results.json
    python -m bench.ops.gpu --unproven           print the targets without measurements

Every row checks its results before it is timed. The exit code is 1 if a row failed; the other rows are measured.
Missed targets are reported and are no failure.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.harness.command import write_json
from bench.harness.environment import describe_device, one_line
from bench.harness.machine import Machine
from bench.harness.rows import Target, measure_rows, target_table, verdict
from bench.ops.gpu_rows import ROWS

UNPROVEN = "unproven on hardware"
FULL_SIZE_MEMORY = 30 * 2**30


def table(results: dict[str, Any] | None) -> str:
    """Return the table of targets, judged if the results were measured on a GPU at full size."""
    full = results is not None and results["size"] == "full" and results["environment"]["device"] != "cpu"
    rows = (results or {}).get("rows", {})

    def judge(name: str, target: Target) -> tuple[str, str]:
        measured = name in rows and (full or "failure" in rows[name])
        return verdict(target, rows[name]) if measured else ("-", UNPROVEN)

    return "\n".join(target_table({name: targets for name, (_, targets) in ROWS.items()}, {"measured": judge}))


def report(results: dict[str, Any]) -> str:
    """Return the targets, all times and other quantities, and the environment."""
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
    return "\n".join([*lines, f"{one_line(results['environment'])}."])


def size_for(device: torch.device, quick: bool) -> str:
    """Return "tiny" for a CPU, "quick" if requested or if the GPU has too little memory for "full"."""
    if device.type == "cpu":
        return "tiny"
    small = torch.cuda.get_device_properties(device).total_memory < FULL_SIZE_MEMORY
    if small and not quick:
        print("bench.ops.gpu: this GPU has too little memory for the full sizes; using --quick", file=sys.stderr)
    return "quick" if quick or small else "full"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="DIR", help="write results.json and results.md to this folder")
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--cpu", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print the tables of this results.json")
    parser.add_argument("--unproven", action="store_true", help="print the targets without measurements")
    options = parser.parse_args()
    if options.unproven:
        print(table(None))
        return 0
    if options.table:
        print(report(json.loads(options.table.read_text())))
        return 0
    if options.out is None:
        parser.error("--out DIR is required")
    if not options.cpu and not torch.cuda.is_available():
        print("bench.ops.gpu: torch finds no CUDA device; --cpu checks the script without one", file=sys.stderr)
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

    def save() -> None:
        write_json(results, options.out / "results.json")
        (options.out / "results.md").write_text(report(results) + "\n")

    measure_rows(ROWS, ROWS, machine, results, save)
    print(report(results))
    return int(any("failure" in row for row in results["rows"].values()))


if __name__ == "__main__":
    sys.exit(main())
