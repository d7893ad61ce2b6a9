"""Measure one group of rows of the GPU's speed table.

    python -m bench.gpu.rows GROUP ... --out FOLDER                     full sizes, 80 GB of GPU memory
    python -m bench.gpu.rows GROUP ... --out FOLDER --size quick        less work; targets are not judged
    python -m bench.gpu.rows GROUP ... --out FOLDER --size tiny --device cpu

GROUP is one of ops, nano, gpt2, resnet, reliability. Every row checks its results, and is written into FOLDER as
GROUP.json as soon as it is measured; one that is wrong is marked as failed, and its times are kept. The exit code is 1
if a row failed. Missed targets are no failure.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.gpu import jobs
from bench.gpu.ceilings import ceilings
from bench.harness.command import write_json
from bench.harness.machine import Machine
from bench.harness.rows import Rows, measure_rows
from bench.ops import gpu_rows

GROUPS: dict[str, Rows] = {
    "ops": gpu_rows.ROWS,
    "nano": jobs.NANO,
    "gpt2": jobs.GPT2,
    "resnet": jobs.RESNET,
    "reliability": jobs.RELIABILITY,
}
# Rows that a quick run leaves out.
ONLY_FULL = tuple(name for name in jobs.GPT2 if "float32" in name or "16 x 1,024" in name)
ROWS: Rows = {name: row for rows in GROUPS.values() for name, row in rows.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("group", nargs="+", choices=GROUPS)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "quick", "tiny"), default="full")
    parser.add_argument("--seconds", type=float, default=math.inf, help="time there is, which bounds the largest jobs")
    parser.add_argument("--limits", type=Path, help="file of bench.gpu.ceilings; default: measure them")
    options = parser.parse_args()
    until = time.monotonic() + options.seconds
    device = torch.device(options.device)
    known = options.limits and options.limits.exists()
    limits = json.loads(options.limits.read_text())["limits"] if known else ceilings(device, options.size)
    machine, failed = Machine(device, options.size, limits, until), False
    for group in options.group:
        names = [name for name in GROUPS[group] if options.size != "quick" or name not in ONLY_FULL]
        result: dict[str, Any] = {"rows": {}}
        save = partial(write_json, result, options.out / f"{group}.json")
        measure_rows(GROUPS[group], names, machine, result, save, keep=True)
        failed |= any("failure" in row for row in result["rows"].values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
