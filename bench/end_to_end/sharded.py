"""Measure products of a sharded model next to its gradient, and the work of Lanczos next to the products.

    python -m bench.end_to_end.sharded [--json PATH] [--text PATH] [--quick | --show PATH]

Two processes of one thread hold a GPT whose layers are wrapped by `fully_shard`; the blocks are its matrices of 1e6
elements and more. In every round, each process times one gradient as in training, one gather of a block's gradient, one
product with the block, and then a run of `batched_slq` on the block, divided into gradients, gathers and the rest.
Seconds are CPU time (time.process_time) of the busier process, which excludes other programs on the machine, and
wall-clock seconds. Before that, a product is compared with that of autograd and the whole model.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.harness import command
from bench.harness.environment import describe, one_line
from bench.harness.rows import Target
from bench.harness.timing import check, difference
from blockhess._text import format_table
from blockhess.hvp import difference as differences
from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.difference import DifferenceEngine
from blockhess.hvp.operator import BlockOperator, product
from blockhess.models.gpt import GPT, GPTConfig, next_token_loss
from blockhess.problem.prepare import prepared_problem
from blockhess_ext import batched_slq

PROCESSES = 2
CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "wall": time.perf_counter}
TARGETS = [
    Target("<= 2.2", "(product - gather) / gradient", 2.2, False),
    Target("<= 10 %", "share of Lanczos and gathers", 0.1, False),
]


def sizes(quick: bool) -> dict[str, int]:
    """Return the sizes of model and data, the smallest block, and the numbers of steps and rounds."""
    if quick:
        return {"width": 64, "layers": 2, "batch": 2, "least": 2**14, "steps": 2, "rounds": 1}
    return {"width": 512, "layers": 2, "batch": 8, "least": 10**6, "steps": 20, "rounds": 5}


def job(quick: bool) -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]:
    """Return a GPT and a batch of random text."""
    torch.manual_seed(0)
    of = sizes(quick)
    model = GPT(GPTConfig(vocab_size=65, context=64, num_layers=of["layers"], num_heads=4, width=of["width"]))
    tokens = torch.randint(65, (of["batch"], 65))
    return model, (tokens[:, :-1], tokens[:, 1:])


def _prepared(model: nn.Module, data: Any, quick: bool) -> Any:
    names = [name for name, p in model.named_parameters() if p.numel() >= sizes(quick)["least"]]
    return prepared_problem(model, data, next_token_loss, {n: n for n in names}, "eval", None, None, "highest")


def _reference(quick: bool) -> torch.Tensor:
    """Return the product of the first block with its random unit vector, by autograd and the whole model."""
    with sdpa_kernel(SDPBackend.MATH), _prepared(*job(quick), quick) as (problem, *_):
        engine = AutogradEngine(problem)
        engine.prepare(0)
        return product(engine, 0, differences.unit_vector(problem, 0))


def _sharded_model(model: nn.Module) -> nn.Module:
    mesh = dist.init_device_mesh("cpu", (PROCESSES,))
    for layer in model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)  # type: ignore[arg-type]
    return fully_shard(model, mesh=mesh)


def _seconds(call: Callable[[], object]) -> dict[str, float]:
    dist.barrier()
    before = {name: now() for name, now in CLOCKS.items()}
    call()
    return {name: now() - before[name] for name, now in CLOCKS.items()}


@contextmanager
def _timed_parts() -> Any:
    """Add up the seconds of the gradients and of the gathers of products by differences."""
    parts = {name: dict.fromkeys(CLOCKS, 0.0) for name in ("gradients", "gathers")}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            before = {clock: now() for clock, now in CLOCKS.items()}
            result = function(*arguments)
            for clock, now in CLOCKS.items():
                parts[name][clock] += now() - before[clock]
            return result

        return call

    with (
        mock.patch.object(DifferenceEngine, "_gradient", timed("gradients", DifferenceEngine._gradient)),
        mock.patch.object(differences, "flattened", timed("gathers", differences.flattened)),
    ):
        yield parts


def _run_rank(rank: int, quick: bool, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    model, data = job(quick)
    rows: list[dict[str, Any]] = []
    with _prepared(_sharded_model(model), data, quick) as (problem, *_):
        engine = DifferenceEngine(problem)
        engine.prepare(0)
        vectors = [differences.unit_vector(problem, number) for number in range(len(problem.dims))]
        error = difference(product(engine, 0, vectors[0]), torch.load(f"{folder}/reference.pt"))
        check("the product", error, 1e-2)
        for number in range(len(vectors)):
            engine.step(number)
        gradients = problem.gradients(0, create_graph=False)
        for i in range(sizes(quick)["rounds"]):
            number = i % len(vectors)
            row = {
                "gradient": _seconds(lambda: problem.gradients(0, create_graph=False)),
                "gather": _seconds(lambda number=number: differences.flattened(problem, number, gradients)),
                "product": _seconds(lambda number=number: product(engine, number, vectors[number])),
            }
            operator = BlockOperator(problem, engine, [number])
            options = {"num_probes": 1, "num_steps": sizes(quick)["steps"]}
            with _timed_parts() as parts:
                row["run"] = _seconds(lambda: batched_slq(operator, operator.dims, **options))  # noqa: B023
            rows.append(row | parts)
    Path(folder, f"{rank}.json").write_text(json.dumps({"rows": rows, "error": error, "dims": problem.dims}))
    dist.destroy_process_group()


def measure(quick: bool) -> dict[str, Any]:
    """Return the seconds of every round on both processes."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(_reference(quick), f"{folder}/reference.pt")
        load = os.getloadavg()[0]
        mp.start_processes(_run_rank, (quick, folder), nprocs=PROCESSES, start_method="spawn")
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return {"environment": describe(), "load": load, "sizes": sizes(quick), "ranks": ranks}


def measured(result: dict[str, Any], clock: str) -> dict[str, list[float]]:
    """Return the quantities of the targets, for every round."""
    found: dict[str, list[float]] = {target.quantity: [] for target in TARGETS}
    for rounds in zip(*(rank["rows"] for rank in result["ranks"])):
        s = {part: max(row[part][clock] for row in rounds) for part in rounds[0]}
        busier = max(rounds, key=lambda row: row["run"][clock])
        found["(product - gather) / gradient"].append((s["product"] - s["gather"]) / s["gradient"])
        found["share of Lanczos and gathers"].append(1 - busier["gradients"][clock] / busier["run"][clock])
    return found


def text(result: dict[str, Any]) -> str:
    """Return the tables of a result."""
    parts = ("gradient", "gather", "product", "run", "gradients", "gathers")
    rows = []
    for part in parts:
        rounds = [[max(each) for each in zip(*([row[part][c] for row in rank["rows"]] for rank in result["ranks"]))]
                  for c in CLOCKS]  # fmt: skip
        rows.append([f"{'of it ' * (part in parts[4:])}{part}", *(f"{statistics.median(r):.3f}" for r in rounds)])
    judged = []
    for target in TARGETS:
        values = {clock: statistics.median(measured(result, clock)[target.quantity]) for clock in CLOCKS}
        verdict = "met" if target.met(values["processor"]) else "missed"
        judged.append([target.quantity, target.text, *(f"{values[clock]:.3f}" for clock in CLOCKS), verdict])
    of = result["sizes"]
    return "\n".join(
        [
            format_table(["one call", "CPU s", "wall s"], rows),
            "",
            format_table(["", "target", "CPU", "wall", ""], judged, left=2),
            "",
            f"{PROCESSES} gloo processes of one thread; GPT of {of['layers']} layers of width {of['width']}; "
            f"{len(result['ranks'][0]['dims'])} blocks of {min(result['ranks'][0]['dims']):,} elements and more; "
            f"{of['batch'] * 64} tokens; run: {of['steps']} steps with one of them; medians of {of['rounds']} rounds",
            f"{one_line(result['environment'])}; load average {result['load']:.1f}",
        ]
    )


def main() -> None:
    command.run(__doc__, measure, text, quick="one round of a tiny model, to check that it runs")


if __name__ == "__main__":
    main()
