"""Measure runs of one and two processes: time, efficiency, and the time predicted by `forecast`.

    python -m bench.end_to_end.distributed [--json PATH] [--text PATH] [--quick | --show PATH]

Every process has one thread. Seconds are CPU time (time.process_time) of the busiest rank, which excludes other
programs on the machine; wall-clock seconds are recorded, too. A rank that waits for another takes almost no CPU time,
and the threads of gloo are included.
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
from bench.harness import command
from bench.harness.environment import describe
from blockhess._text import format_table
from blockhess.estimate import job_arguments
from blockhess.models.gpt import GPT, GPTConfig, next_token_loss
from blockhess.problem.prepare import prepared_problem
from blockhess.run.forecast import forecast

ROUNDS = 3
OPTIONS: dict[str, Any] = {"num_probes": 2, "num_steps": 20, "engine": "autograd", "progress": False}
# Name -> number of processes that share (recurrences, batches).
SHAPES = {"one process": (1, 1), "two share recurrences": (2, 1), "two share batches": (1, 2)}


def job(quick: bool) -> dict[str, Any]:
    """Return a small GPT with four batches of random text."""
    torch.manual_seed(0)
    width = 16 if quick else 64
    model = GPT(GPTConfig(vocab_size=65, context=32, num_layers=1, num_heads=2, width=width))
    tokens = torch.randint(65, (4, 8, 33))
    return {"model": model, "data": [(t[:, :-1], t[:, 1:]) for t in tokens], "loss_fn": next_token_loss}


def _run_rank(rank: int, shape: tuple[int, int], quick: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=shape[0] * shape[1])
    blockhess.spectrum(**job(quick), parallel=shape, **OPTIONS | {"num_steps": 1})  # warms up
    dist.barrier()
    wall, processor = time.perf_counter(), time.process_time()
    spectra = blockhess.spectrum(**job(quick), parallel=shape, **OPTIONS)
    seconds = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    Path(folder, f"{rank}.json").write_text(json.dumps(seconds | {"node": float(spectra.quadrature.nodes.abs().max())}))
    dist.destroy_process_group()


def measure(quick: bool) -> dict[str, Any]:
    """Return the result of several rounds; each round makes a forecast and a run for every shape."""
    found: dict[str, Any] = {name: {"predicted": [], "processor": [], "wall": []} for name in SHAPES}
    blockhess.plan(**job(quick), processes=(1, 1), **OPTIONS)  # warms up
    for _ in range(1 if quick else ROUNDS):
        nodes = []
        for name, shape in SHAPES.items():
            given, options = job_arguments(**job(quick), **OPTIONS)
            predicted = forecast(prepared_problem(**given), options, *shape, clock=time.process_time)
            with tempfile.TemporaryDirectory() as folder:
                mp.start_processes(_run_rank, (shape, quick, folder), nprocs=shape[0] * shape[1], start_method="spawn")
                ranks = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(shape[0] * shape[1])]
            found[name]["predicted"].append(predicted.seconds)
            for clock in ("processor", "wall"):
                found[name][clock].append(max(rank[clock] for rank in ranks))
            found[name]["balance"] = predicted.balance
            found[name]["traffic_bytes"] = predicted.traffic_bytes
            nodes.append(ranks[0]["node"])
        assert max(nodes) - min(nodes) < 1e-3 * abs(nodes[0]), "all shapes must give the same spectra"
    return {"environment": describe(), "cores": os.cpu_count(), "load": os.getloadavg()[0], "rows": found}


def text(result: dict[str, Any]) -> str:
    """Return the table of a result."""
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
    header = ["", "predicted s", "taken s", "taken / predicted", "balance", "efficiency", "wall clock"]
    machine = result["environment"]
    return "\n".join(
        [
            format_table(header, rows),
            "",
            "CPU seconds of the busiest rank; efficiency: one process / (processes x busiest rank); medians",
            f"{machine['cpu']}, {result['cores']} cores, load average "
            f"{result['load']:.1f}, torch {machine['torch']}, commit {machine['commit']}",
        ]
    )


def main() -> None:
    command.run(__doc__, measure, text, quick="one round of a tiny model, to check that it runs")


if __name__ == "__main__":
    main()
