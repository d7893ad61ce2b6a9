"""What `forecast` predicts for 1 and 2 processes against what they take, and how well two share a job.

    python -m bench.end_to_end.distributed [--json PATH] [--text PATH] [--quick | --show PATH]

Processes have one thread each. Seconds are those of the processor (time.process_time), the busiest rank's, so that a
machine with other work on it does not count; seconds of the clock stand beside them. A rank that waits for another
spends no processor time worth naming, and what gloo's threads spend is counted.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import blockhess
from bench.harness.command import arguments, result_of, tell
from bench.harness.environment import describe
from blockhess._text import format_table
from blockhess.estimate import job_arguments
from blockhess.models.gpt import GPT, GPTConfig, next_token_loss
from blockhess.problem.prepare import prepared_problem
from blockhess.run.forecast import Forecast, forecast

ROUNDS = 3
OPTIONS: dict[str, Any] = {"num_probes": 2, "num_steps": 20, "engine": "autograd", "progress": False}
# Name -> (work, data) processes.
SHAPES = {"one process": (1, 1), "two share recurrences": (2, 1), "two share batches": (1, 2)}


def job(quick: bool) -> dict[str, Any]:
    """A small GPT on four batches of random text."""
    torch.manual_seed(0)
    width = 16 if quick else 64
    model = GPT(GPTConfig(vocab_size=65, context=32, num_layers=1, num_heads=2, width=width))
    tokens = torch.randint(65, (4, 8, 33))
    return {"model": model, "data": [(t[:, :-1], t[:, 1:]) for t in tokens], "loss_fn": next_token_loss}


def _rank(rank: int, shape: tuple[int, int], quick: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=shape[0] * shape[1])
    blockhess.spectrum(**job(quick), parallel=shape, **OPTIONS | {"num_steps": 1})  # warms up
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    spectra = blockhess.spectrum(**job(quick), parallel=shape, **OPTIONS)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    Path(folder, f"{rank}.json").write_text(json.dumps(seconds | {"node": float(spectra.quadrature.nodes.sum())}))
    dist.destroy_process_group()


def predicted(quick: bool, shape: tuple[int, int]) -> Forecast:
    """The forecast for a mesh of processes, in seconds of the processor."""
    given, options = job_arguments(**job(quick), **OPTIONS)
    return forecast(prepared_problem(**given), options, *shape, clock=time.process_time)


def measured(quick: bool) -> dict[str, Any]:
    """Rounds of all shapes, one after the other, and the forecast made between them."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {name: {"predicted": [], "processor": [], "wall": []} for name in SHAPES}
    predicted(quick, (1, 1))  # warms up
    for _ in range(1 if quick else ROUNDS):
        nodes = []
        for name, shape in SHAPES.items():
            told = predicted(quick, shape)
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(_rank, (shape, quick, folder), nprocs=shape[0] * shape[1], start_method="spawn")
                ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(shape[0] * shape[1])]
            found[name]["predicted"].append(told.seconds)
            for clock in ("processor", "wall"):
                found[name][clock].append(max(rank[clock] for rank in ranks))
            found[name]["balance"] = told.balance
            found[name]["traffic_bytes"] = told.traffic_bytes
            nodes.append(ranks[0]["node"])
        assert max(nodes) - min(nodes) < 1e-3 * abs(nodes[0]), "all shapes must give the same spectra"
    return {"environment": describe(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": found}


def text(result: dict[str, Any]) -> str:
    """The table of a result."""
    alone = result["rows"]["one process"]
    rows = []
    for name, row in result["rows"].items():
        ratio = statistics.median(m / p for m, p in zip(row["processor"], row["predicted"]))
        size = SHAPES[name][0] * SHAPES[name][1]
        share = [
            statistics.median(a / (size * m) for a, m in zip(alone[clock], row[clock]))
            for clock in ("processor", "wall")
        ]
        rows.append(
            [name, f"{statistics.median(row['predicted']):.2f}", f"{statistics.median(row['processor']):.2f}",
             f"{ratio:.2f}", f"{row['balance']:.0%}", f"{share[0]:.0%}", f"{share[1]:.0%}"]
        )  # fmt: skip
    header = ["", "predicted s", "taken s", "taken / predicted", "balance", "efficiency", "by the clock"]
    machine = result["environment"]
    return "\n".join(
        [
            format_table(header, rows),
            "",
            "seconds of the processor, busiest rank; efficiency: one process / (processes x busiest rank); medians",
            f"{machine['cpu']}, {result['cores']} cores, load "
            f"{result['load']:.1f}, torch {machine['torch']}, commit {machine['commit']}",
        ]
    )


def main() -> None:
    options = arguments(__doc__, "one round of a tiny model, to see that it runs").parse_args()
    result = result_of(options, measured)
    tell(options, result, text(result))


if __name__ == "__main__":
    main()
