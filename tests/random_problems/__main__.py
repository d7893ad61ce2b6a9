"""Draw as many problems as asked; print what became of them by kind, and every failure."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

import torch

from tests.random_problems.judge import OracleError, Verdict, judge

parser = argparse.ArgumentParser(prog="python -m tests.random_problems", description=__doc__)
parser.add_argument("--draws", type=int, default=200)
parser.add_argument("--first", type=int, default=0, help="seed of the first problem")
parser.add_argument("--force", nargs="*", default=[], metavar="KIND", help="kinds to choose wherever they can be")
given = parser.parse_args()
torch.set_num_threads(1)
outcomes: Counter[str] = Counter()
start = time.perf_counter()
for seed in range(given.first, given.first + given.draws):
    try:
        problem, verdict = judge(seed, frozenset(given.force))
    except OracleError as error:
        problem, verdict = seed, Verdict("the test is wrong", str(error))
    outcomes[verdict.outcome] += 1
    if not verdict.good:
        print(f"{verdict.outcome}: {verdict.text}\n    {problem}", flush=True)
seconds = (time.perf_counter() - start) / given.draws
print(", ".join(f"{count} {name}" for name, count in outcomes.most_common()), f"; {seconds:.2g} s a draw")
sys.exit(any(not Verdict(name).good for name in outcomes))
