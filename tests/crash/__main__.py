"""Disturb as many runs as asked; print the figures as JSON, and write them where --out says; exit code 1 on failure.

A trial is a function of its seed and number, but for the speed of the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import torch

from bench.harness.environment import describe
from tests.crash.disturb import Trials
from tests.crash.scenarios import SCENARIOS

parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
parser.add_argument("--kills", type=int, default=200)
parser.add_argument("--faults", type=int, default=50)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
parser.add_argument("--out", type=Path)
given = parser.parse_args()
print(f"seed {given.seed}", file=sys.stderr)
machine = describe()
torch.set_num_threads(1)
with tempfile.TemporaryDirectory() as folder:
    trials = Trials(Path(folder), given.seed, given.scenarios)
    number = 0
    while trials.counts["kills"] < given.kills and not trials.failures:
        trials.kill(number)
        number += 1
    for number in range(given.faults):
        trials.fault(number)
report = trials.report() | {"machine": machine}
text = json.dumps(report, indent=1)
print(text)
if given.out:
    given.out.write_text(text + "\n")
print(*trials.failures, sep="\n", file=sys.stderr)
sys.exit(bool(trials.failures))
