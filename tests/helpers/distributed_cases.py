"""What the processes of the distributed tests compute: every case is run by all ranks of one process group."""

from __future__ import annotations

import importlib
import math
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which traces and sharded models load, here once for all processes
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import blockhess
import blockhess.estimate
from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.operator import Column
from blockhess.run.storage import directory

TENSORS = ("nodes", "weights", "alpha", "beta", "steps")
LOSS = nn.CrossEntropyLoss()
OPTIONS: dict[str, Any] = {"num_probes": 3, "num_steps": 6, "progress": False, "engine": "autograd"}
DOUBLE: dict[str, Any] = OPTIONS | {"dtype": torch.float64}


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))


def normalised() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    sizes = (8, 7, 6, 5, 4)  # a rank's share of the weight is none of 1 / world
    return [(torch.randn(n, 5, generator=rng), torch.randint(3, (n,), generator=rng)) for n in sizes]


def values(spectra: blockhess.Spectra) -> dict[str, Any]:
    """What tests compare."""
    found: dict[str, Any] = {name: getattr(spectra.quadrature, name) for name in TENSORS}
    made = spectra.provenance
    names = ("hvps", "processes", "loss_value", "weight", "fingerprints", "gradient_norms")
    return found | {name: made[name] for name in names}


def work(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel="recurrences", **OPTIONS))


def adaptive(rank: int) -> Any:
    options = OPTIONS | {"engine": "auto", "num_probes": 6, "num_steps": 20, "tol": 0.05}
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel="recurrences", **options))


def fresh_seed(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel="recurrences", **OPTIONS | {"seed": None}))


def data(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel="data", **DOUBLE))


def own_data(rank: int) -> Any:
    mine = batches()[:1] if rank == 0 else batches()[1:]
    return values(blockhess.spectrum(model(), mine, LOSS, parallel="data", **DOUBLE))


def summed_loss(rank: int) -> Any:
    loss = nn.CrossEntropyLoss(reduction="sum")
    return values(blockhess.spectrum(model(), batches(), loss, parallel="data", **DOUBLE))


def statistics(rank: int) -> Any:
    options = DOUBLE | {"batchnorm": "frozen_batch_stats"}
    return values(blockhess.spectrum(normalised(), batches(), LOSS, parallel="data", **options))


def mesh(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel=(2, 2), **DOUBLE))


def wrapped(rank: int) -> Any:
    ddp = nn.parallel.DistributedDataParallel(model())
    return values(blockhess.spectrum(ddp, batches(), LOSS, parallel="recurrences", **OPTIONS))


def sign_gain(rank: int) -> Any:
    mine = batches()[:1] if rank == 0 else batches()[1:]
    return blockhess.sign_gain(model(), mine, LOSS, dtype=torch.float64, parallel="data").to_dict()


def other_option(rank: int) -> Any:
    return values(
        blockhess.spectrum(model(), batches(), LOSS, parallel="recurrences", **OPTIONS | {"num_probes": 3 + rank})
    )


def other_model(rank: int) -> Any:
    changed = model()
    with torch.no_grad():
        changed[0].bias[0] += float(rank)
    return values(blockhess.spectrum(changed, batches(), LOSS, parallel="recurrences", **OPTIONS))


def other_version(rank: int) -> Any:
    before = blockhess.estimate.__version__
    blockhess.estimate.__version__ = f"{before}.{rank}"
    try:
        return values(blockhess.spectrum(model(), batches(), LOSS, parallel="recurrences", **OPTIONS))
    finally:
        blockhess.estimate.__version__ = before


def other_mesh(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel="data" if rank else "recurrences", **OPTIONS))


def wrong_mesh(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel=(3, 1), **OPTIONS))


def other_data(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches()[rank:], LOSS, parallel="recurrences", **OPTIONS))


def few_batches(rank: int) -> Any:
    return values(blockhess.spectrum(model(), batches()[:1], LOSS, parallel="data", **OPTIONS))


def little_work(rank: int) -> Any:
    options = OPTIONS | {"num_probes": 1, "blocks": "full"}
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel="recurrences", **options))


def one_bad_option(rank: int) -> Any:
    options = OPTIONS | {"num_steps": 0 if rank == 1 else 6}
    return values(blockhess.spectrum(model(), batches(), LOSS, parallel="recurrences", **options))


@contextmanager
def after_products(count: int, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` after that many products of AutogradEngine."""
    left, multiply = count, AutogradEngine.multiply

    def counting(self: AutogradEngine, columns: Sequence[Column], share: float) -> Iterator[int]:
        nonlocal left
        for made in multiply(self, columns, share):
            left -= made
            if left == 0:
                act()
            yield made

    AutogradEngine.multiply = counting  # type: ignore[method-assign]
    try:
        yield
    finally:
        AutogradEngine.multiply = multiply  # type: ignore[method-assign]


class Failure(Exception):
    """An error that is not explained."""


def _failing(parallel: Any, failure: type[Exception] = Failure) -> Callable[[int], Any]:
    """Rank 1 fails in the middle of Lanczos."""

    def case(rank: int) -> Any:
        def fail() -> None:
            if rank == 1:
                raise failure("on rank 1")

        with after_products(30, fail):  # the check of the products takes 12 of them
            return values(blockhess.spectrum(model(), batches(), LOSS, parallel=parallel, **OPTIONS))

    return case


def slow_rank(rank: int) -> Any:
    """Rank 1 keeps the others waiting for longer than they wait without looking around."""
    with after_products(30, lambda: time.sleep(2.5 if rank == 1 else 0)):
        return values(blockhess.spectrum(model(), batches(), LOSS, parallel="data", **DOUBLE))


def posing_fails(rank: int) -> Any:
    def loss(module: nn.Module, batch: Any) -> Any:
        if rank == 1:
            raise OverflowError("on rank 1")
        return F.cross_entropy(module(batch[0]), batch[1])

    return values(blockhess.spectrum(model(), batches(), loss, parallel="data", **OPTIONS))


CASES: dict[str, Callable[[int], Any]] = {
    function.__name__: function
    for function in (
        work, adaptive, fresh_seed, data, own_data, summed_loss, statistics, mesh, wrapped, sign_gain, other_option,
        other_model, other_version, other_mesh, wrong_mesh, other_data, few_batches, little_work, one_bad_option,
        slow_rank,
    )
}  # fmt: skip
# What comes after a failure is not touched by it.
CASES = {
    "work_fails": _failing("recurrences"),
    "data_fails": _failing("data"),
    "data_fills_memory": _failing("data", torch.OutOfMemoryError),
    "posing_fails": posing_fails,
} | CASES


def _run(rank: int, world: int, folder: Path, names: tuple[str, ...], module: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=world)
    cases, found = importlib.import_module(module).CASES, {}
    for name in names:
        try:
            found[name] = cases[name](rank)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def run(world: int, folder: Path, names: tuple[str, ...], module: str = __name__) -> list[dict[str, Any]]:
    """What every rank of a world got, by case: values, or the text of an error. `module` holds the CASES."""
    mp.start_processes(_run, (world, folder, names, module), nprocs=world, start_method=_imported_once())
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def _imported_once() -> str:
    mp.get_context("forkserver").set_forkserver_preload(["tests.helpers.distributed_cases"])
    return "forkserver"


def _recorded(
    rank: int, world: int, folder: Path, parallel: Any, die_after: int | None, out: str, victim: int, delay: float
) -> None:
    """A run in folder/"run", killed on the rank `victim` `delay` seconds after so many steps, whatever it does then."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / out}.store", rank=rank, world_size=world)
    made = 0
    after_step = directory.RunDirectory.after_step

    def counted(self: Any, unit: Any, state: Any, hvps: int) -> None:
        nonlocal made
        made += 1
        after_step(self, unit, state, hvps)
        if made % 2 and (rank == 0 or parallel not in ("data", "sharded")):
            self.checkpoints.save_now(state, hvps)  # as if time had passed
        if rank == victim and made == die_after:
            if delay:
                threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    directory.RunDirectory.after_step = counted  # type: ignore[method-assign]
    net, options = model(), OPTIONS | {"parallel": parallel}
    if parallel == "sharded":
        fully_shard(net, mesh=dist.init_device_mesh("cpu", (world,)))
        options |= {"parallel": None, "engine": "difference"}
    spectra = blockhess.spectrum(net, batches(), LOSS, run_dir=folder / "run", **options)
    torch.save((values(spectra), made), folder / f"{out}.{rank}.pt")
    dist.destroy_process_group()


def killed_and_resumed(
    folder: Path,
    parallel: Any,
    worlds: list[tuple[int, int | None]],
    moments: Sequence[tuple[int, float]] = (),
) -> tuple[list[Any], int]:
    """Runs one run directory by worlds of so many ranks one after the other, each but the last killed after some steps.

    Args:
        moments: which rank of each world is killed, and how many seconds after its step; by default the last, at once.

    Returns:
        (values, steps made) of every rank of the world that finished, which may be one that was to be killed later;
        and how many were killed.
    """
    for number, (world, die_after) in enumerate(worlds):
        out = f"attempt{number}"
        moment = moments[number] if moments else (world - 1, 0.0)
        given = (world, folder, parallel, die_after, out, *moment)
        try:
            mp.start_processes(_recorded, given, nprocs=world, start_method=_imported_once())
        except mp.ProcessExitedException:
            continue
        return [torch.load(folder / f"{out}.{rank}.pt") for rank in range(world)], number
    raise AssertionError(f"no world finished: {worlds}")


def random_worlds(seed: int, kills: int) -> list[tuple[int, int | None]]:
    """Worlds of 1 to 4 ranks that die after some steps, and one that does not."""
    rng = random.Random(seed)
    return [(rng.choice((1, 2, 4)), rng.randint(1, 12)) for _ in range(kills)] + [(rng.choice((1, 2, 4)), None)]


def close(a: Tensor, b: Tensor, growth: float = 1e4) -> bool:
    """Whether nodes are equal within rounding that grew over the steps."""
    eps = torch.finfo(torch.float64).eps
    return a.shape == b.shape and math.isfinite(float(a.sum())) and float((a - b).abs().max()) <= growth * eps
