"""Ranks killed at random: every run is resumed, by worlds of other sizes too, to the bits of one that was left alone.

    python -m tests.helpers.rank_kills [--runs N] [--kills N] [--seed N] [--json PATH]

Prints the seed of every run, and a summary.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

import blockhess
from bench.harness.environment import describe
from blockhess.run.split_work import items_of
from blockhess.run.storage import directory
from tests.helpers import distributed_cases as cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="a run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write the summary")
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    expected = cases.values(blockhess.spectrum(cases.model(), cases.batches(), cases.LOSS, **cases.OPTIONS))
    everything = [(block, probe) for block in range(6) for probe in range(3)]
    kills = 0
    for seed in range(options.seed, options.seed + options.runs):
        worlds = cases.random_worlds(seed, options.kills)
        with tempfile.TemporaryDirectory() as folder:
            found, killed = cases.killed_and_resumed(Path(folder), "recurrences", worlds)
            kills += killed
            run = Path(folder) / "run"
            done = directory.parts(run, directory.read_run(run)["id"])
            parts = [item for _, part, _ in done for item in items_of(part.unit)]
        for spectra, _ in found:
            assert all(torch.equal(spectra[name], expected[name]) for name in cases.TENSORS), f"seed {seed}: other bits"
        assert sorted(parts) == everything, f"seed {seed}: work was done twice or not at all"
        print(f"seed {seed}: worlds {worlds}, resumed to the same bits", flush=True)
    if options.json:
        told = {"runs": options.runs, "first_seed": options.seed, "ranks_killed": kills}
        told |= {"resumed to other bits, or work done twice": 0, "machine": machine}
        options.json.write_text(json.dumps(told, indent=1) + "\n")
    print(f"{options.runs} runs, {kills} ranks killed: same bits, no recurrence made twice")


if __name__ == "__main__":
    main()
