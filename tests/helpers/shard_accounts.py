"""Bytes that the processes of a sharded model hold and send, counted from every operation of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blockhess
from blockhess.hvp.difference import DifferenceEngine
from blockhess.hvp.operator import product
from blockhess.problem.prepare import prepared_problem
from blockhess.run.sharding import block_traffic, sharding

WIDTH, LAYERS = 64, (3, 5)
LAYER_BYTES = 4 * WIDTH**2
LOSS = nn.MSELoss()


def local_tensors(*values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and not isinstance(t, DTensor)]


class Held(TorchDispatchMode):
    """The largest memory of all tensors at a time, beside that of given ones."""

    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}
        self._have_grown(given)
        self._before, self.peak = self._now(), 0

    def _have_grown(self, tensors: Iterable[Tensor]) -> bool:
        """Whether the memory of any of the tensors is new or larger than before."""
        grown = False
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._storages:
                self._storages[key] = StorageWeakRef(storage)
            elif size <= self._sizes[key]:
                continue
            self._sizes[key], grown = size, True
        return grown

    def _now(self) -> int:
        living = {key: torch.UntypedStorage._new_with_weak_ptr(key) for key in self._storages}
        self._storages = {key: self._storages[key] for key, storage in living.items() if storage is not None}
        self._sizes = {key: storage.nbytes() for key, storage in living.items() if storage is not None}
        return sum(self._sizes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._have_grown(local_tensors(args, kwargs, out)):
            self.peak = max(self.peak, self._now() - self._before)
        return out


class Sent(TorchDispatchMode):
    """The bytes that this process sends in collective operations on rings."""

    total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace not in ("c10d", "_c10d_functional"):
            return out
        name, sizes = func.overloadpacket.__name__, [t.nbytes for t in local_tensors(args)]
        if "wrap" in name or "wait" in name:
            return out
        if func.namespace == "_c10d_functional":
            sizes += [t.nbytes for t in local_tensors(out)]
        if "reduce" in name and "scatter" not in name:
            self.total += sizes[0]  # 2 (r - 1) / r of them, for r = 2 replicas
        else:
            assert len(sizes) == 2 and ("gather" in name or "scatter" in name), name
            self.total += max(sizes) - min(sizes)
        return out


def model(layers: int) -> nn.Sequential:
    """Equal layers, each a block and a wrapped module, and a last one that is neither of that size."""
    torch.manual_seed(0)
    hidden = (nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh()) for _ in range(layers))
    return nn.Sequential(*hidden, nn.Linear(WIDTH, 4, bias=False))


def sharded(layers: int, shape: tuple[int, ...] | None = None, **options: Any) -> nn.Sequential:
    net = model(layers)
    shape = shape or (dist.get_world_size(),)
    mesh = dist.init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])
    for layer in net[:-1]:
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(2, WIDTH), torch.randn(2, 4)


def held(**options: Any) -> Callable[[int], Any]:
    """By number of layers: the least peak memory of `spectrum` of one block after the other, and that of the plan."""

    def case(rank: int) -> Any:
        found = {}
        for layers in LAYERS:
            job = {"num_probes": 1, "num_steps": 2, "reorthogonalize": "none"}
            net = sharded(layers, **options)
            job["memory_budget"] = sum(p.to_local().nbytes for p in net.parameters()) + 6 * LAYER_BYTES
            plan = blockhess.plan(net, data(), LOSS, **job)
            peaks = []
            for _ in range(2):  # when other programs take the processors, operations may keep tensors for longer
                with Held(p.to_local() for p in net.parameters()) as memory:
                    spectra = blockhess.spectrum(net, data(), LOSS, progress=False, **job)
                peaks.append(memory.peak)
            assert len(spectra.provenance["plan"]["passes"]) == layers + 1
            found[layers] = min(peaks), plan.peak_bytes
        return found

    return case


def sent(shape: tuple[int, ...] | None = None, **options: Any) -> Callable[[int], Any]:
    """By block: the bytes that a product sends, and those counted from sizes."""

    def case(rank: int) -> Any:
        net, found = sharded(3, shape, **options), {}
        with prepared_problem(net, data(), LOSS, "parameter", "eval", None, None, "highest") as (problem, *_):
            engine = DifferenceEngine(problem)
            for number, block in enumerate(problem.blocks):
                engine.step(number)
                with Sent() as traffic:
                    product(engine, number, torch.ones(1, block.info.dim))
                found[block.info.name] = traffic.total, 2 * sharding(net).gradient_traffic + block_traffic(block)
        return found

    return case


def planned(rank: int) -> Any:
    net, options = sharded(3), {"num_probes": 2, "num_steps": 5}
    plan = blockhess.plan(net, data(), LOSS, **options)
    forecast = blockhess.plan(net, data(), LOSS, **options, processes=(1, 1))
    made = blockhess.spectrum(net, data(), LOSS, progress=False, **options).provenance["plan"]
    return str(plan), plan.to_dict(), str(forecast), forecast.to_dict(), made


HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
CASES: dict[str, Callable[[int], Any]] = {
    "held": held(reshard_after_forward=True),
    "held, gathered in backward": held(reshard_after_forward=False),
    "sent": sent(),
    "sent, freed": sent(reshard_after_forward=True),
    "sent, gathered in backward": sent(reshard_after_forward=False),
    "sent, bfloat16 in modules": sent(mp_policy=HALF),
    "planned": planned,
    "HSDP": sent((2, 2)),
}
