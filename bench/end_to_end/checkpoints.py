"""Measure the cost of a run directory: the same job with and without one, in turns.

    python -m bench.end_to_end.checkpoints [--json PATH] [--text PATH] [--quick | --show PATH]

The result for docs/reliability.md is bench/results/reliability/checkpoints.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import blockhess
from bench.harness import command
from bench.harness.environment import describe
from blockhess.cli.demo import gpt_job
from blockhess.run.storage import directory
from blockhess.run.storage.checkpoint import Checkpoints
from blockhess_ext import State


class CountingCheckpoints(Checkpoints):
    """Checkpoints that record the size of the state and stay available after the run."""

    latest: CountingCheckpoints
    nbytes = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        CountingCheckpoints.latest = self

    def after_step(self, state: State, hvps: int) -> None:
        self.nbytes = max(self.nbytes, state.nbytes)
        super().after_step(state, hvps)


def run(path: Path | None, steps: int, probes: int) -> tuple[blockhess.Spectra, float]:
    """Run the job; return its spectra and the seconds that it took."""
    job = gpt_job() | {"num_steps": steps, "num_probes": probes, "engine": "autograd", "progress": False}
    start = time.perf_counter()
    spectra = blockhess.spectrum(**job, run_dir=path)
    return spectra, time.perf_counter() - start


def measure(quick: bool) -> dict[str, Any]:
    """Return the result."""
    steps, probes, pairs = (2, 1, 1) if quick else (20, 4, 3)
    ratios, shares, saves, machine = [], [], [], describe()
    for _ in range(pairs):
        plain, without = run(None, steps, probes)
        with tempfile.TemporaryDirectory() as folder, mock.patch.object(directory, "Checkpoints", CountingCheckpoints):
            saved, seconds = run(Path(folder) / "run", steps, probes)
        assert torch.equal(plain.quadrature.nodes, saved.quadrature.nodes)
        latest = CountingCheckpoints.latest
        ratios.append(seconds / without)
        shares.append(latest.seconds / seconds)
        saves.append(latest.count)
        print(f"  {without:.1f} s without, {seconds:.1f} s with {latest.count} saves", file=sys.stderr, flush=True)
    return {
        "parameters": sum(plain.dims),
        "state in MiB": round(latest.nbytes / 2**20, 1),
        "saves of a run": statistics.median(saves),
        "seconds of a run": round(seconds, 1),
        "share of the time spent saving, in percent": round(100 * statistics.median(shares), 2),
        "time with a run directory / without, median": round(statistics.median(ratios), 3),
        "pairs": pairs,
        "machine": machine,
    }


def text(result: dict[str, Any]) -> str:
    """Return the result as JSON."""
    return json.dumps(result, indent=1)


def main() -> None:
    command.run(__doc__, measure, text, quick="one pair of short runs, to check that it runs")


if __name__ == "__main__":
    main()
