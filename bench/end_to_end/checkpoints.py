"""What saving the state of a run costs: a GPT on text, with and without a run directory, in turns.

python -m bench.end_to_end.checkpoints --out bench/results/reliability/checkpoints.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import blockhess
from bench.harness.environment import describe
from blockhess.cli.demo import gpt_job
from blockhess.run.storage.checkpoint import Checkpoints
from blockhess_ext import State


class Counted(Checkpoints):
    """Checkpoints whose figures outlive the run."""

    latest: Counted
    nbytes = 0

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        Counted.latest = self

    def after_step(self, state: State, hvps: int) -> None:
        self.nbytes = max(self.nbytes, state.nbytes)
        super().after_step(state, hvps)


def run(directory: Path | None, steps: int, probes: int) -> tuple[blockhess.Spectra, float]:
    """A run and the seconds that it took."""
    job = gpt_job() | {"num_steps": steps, "num_probes": probes, "engine": "autograd", "progress": False}
    start = time.perf_counter()
    spectra = blockhess.spectrum(**job, run_dir=directory)
    return spectra, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--probes", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    import blockhess.run.storage.directory

    blockhess.run.storage.directory.Checkpoints = Counted  # type: ignore[misc]
    ratios, shares, saves = [], [], []
    machine = describe()
    for _ in range(given.pairs):
        plain, without = run(None, given.steps, given.probes)
        with tempfile.TemporaryDirectory() as folder:
            saved, seconds = run(Path(folder) / "run", given.steps, given.probes)
        assert torch.equal(plain.quadrature.nodes, saved.quadrature.nodes)
        ratios.append(seconds / without)
        shares.append(Counted.latest.seconds / seconds)
        saves.append(Counted.latest.count)
        print(f"{without:.1f} s without, {seconds:.1f} s with, {saves[-1]} saves, {100 * shares[-1]:.2f} %", flush=True)
    result = {
        "parameters": sum(plain.dims),
        "state in MiB": round(Counted.latest.nbytes / 2**20, 1),
        "saves of a run": statistics.median(saves),
        "seconds of a run": round(seconds, 1),
        "share of the time spent saving, in percent": round(100 * statistics.median(shares), 2),
        "time with a run directory / without, median": round(statistics.median(ratios), 3),
        "pairs": given.pairs,
        "machine": machine,
    }
    print(json.dumps(result, indent=1))
    if given.out:
        given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
