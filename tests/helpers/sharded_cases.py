"""What the processes of the tests of sharded models compute: every case is run by all ranks of one process group."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DeviceMesh, DTensor, Partial, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import blockhess
from blockhess.run.distributed import RankError
from tests.helpers.distributed_cases import values
from tests.helpers.tiny_llama import LlamaLayer

LOSS = nn.CrossEntropyLoss()
# One block of each kind; parameters of other layers of that kind only move the loss.
BLOCKS: dict[str, Any] = {
    name: name for name in ("0.weight", "1.norm.weight", "1.up.weight", "2.up.bias", "2.down.weight", "3.weight")
}
OPTIONS: dict[str, Any] = {"num_probes": 1, "num_steps": 3, "progress": False, "blocks": BLOCKS}
LLAMA_BLOCKS: dict[str, Any] = {
    name: name for name in ("0.weight", "1.before_attention.weight", "1.key.weight", "2.query.weight", "2.gate.weight")
} | {"values": ["1.value.weight", "2.value.weight"]}


class Residual(nn.Module):
    """A block of a transformer, without heads."""

    def __init__(self, width: int, hidden: int = 10) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


def model(dtype: torch.dtype = torch.float64, tied: bool = False, layer: Any = Residual) -> nn.Sequential:
    """Sizes that neither 2 nor 4 ranks divide."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(11, 6), layer(6), layer(6), nn.Linear(6, 11, bias=False))
    if tied:
        net[3].weight = net[0].weight
    return net.to(dtype)


def whole(name: str) -> nn.Sequential:
    """The model of a case, in float64."""
    layer = LlamaLayer if "Llama" in name else partial(Residual, hidden=8) if "FSDP and" in name else Residual
    return model(torch.float64, name == "tied", layer)


def batches() -> list[tuple[Tensor, Tensor]]:
    rng = torch.Generator().manual_seed(1)
    return [(torch.randint(11, (n,), generator=rng), torch.randint(11, (n,), generator=rng)) for n in (8, 5)]


def shard(net: nn.Sequential, **options: Any) -> nn.Sequential:
    mesh = mesh_of_all()
    for layer in (net[1], net[2]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(net, mesh=mesh, **options)
    return net


def mesh_of_all() -> DeviceMesh:
    return dist.init_device_mesh("cpu", (dist.get_world_size(),))


def kept(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.to_local().clone() if isinstance(p, DTensor) else p.clone() for name, p in net.named_parameters()}


def checked(net: nn.Module, **options: Any) -> Any:
    """Values of the spectra of a model, which is the same afterwards, and works."""
    before, (inputs, targets) = kept(net), batches()[0]
    spectra = blockhess.spectrum(net, batches(), LOSS, **OPTIONS | options)
    assert_same(net, before)
    loss = LOSS(net(inputs), targets)
    loss.backward()
    made = spectra.provenance
    found = {"names": spectra.names, "error": made["hvp_error"]} | {
        name: made[name] for name in ("engine", "unchecked")
    }
    return values(spectra) | found


def assert_same(net: nn.Module, before: dict[str, Tensor]) -> None:
    after = kept(net)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.grad is None for p in net.parameters())


def fsdp(dtype: torch.dtype, again: bool, tied: bool = False) -> Callable[[int], Any]:
    blocks = "parameter" if tied else BLOCKS
    return lambda rank: checked(shard(model(dtype, tied), reshard_after_forward=again), blocks=blocks)


def llama(dtype: torch.dtype, again: bool) -> Callable[[int], Any]:
    return lambda rank: checked(shard(model(dtype, layer=LlamaLayer), reshard_after_forward=again), blocks=LLAMA_BLOCKS)


def gathered(rank: int) -> Any:
    """FSDP has gathered the parameters of the root before, and keeps them after a forward pass."""
    net = shard(model(), reshard_after_forward=False)
    net(batches()[0][0])
    spectra = blockhess.spectrum(net, batches(), LOSS, **OPTIONS)
    assert_same(net, kept(shard(model())))
    return values(spectra)


def mixed_precision(rank: int) -> Any:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    return checked(shard(model(torch.float32), mp_policy=policy))


def offloaded(rank: int) -> Any:
    """Shards that FSDP keeps on the CPU, here also the device of the computation."""
    return checked(shard(model(), offload_policy=CPUOffloadPolicy(pin_memory=False)))


def hybrid(rank: int) -> Any:
    """HSDP: shards over one dimension of the mesh, replicas over the other."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("replicate", "shard"))
    net = model()
    fully_shard(net[1], mesh=mesh)
    fully_shard(net, mesh=mesh)
    return checked(net)


def tensor_parallel(rank: int) -> Any:
    net = model()
    for layer in (net[1], net[2]):
        parallelize_module(layer, mesh_of_all(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return checked(net)


def combined(hidden: int) -> Callable[[int], Any]:
    """FSDP over one dimension of the mesh, tensor parallelism over the other."""

    def case(rank: int) -> Any:
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("data", "tensor"))
        net = model(layer=partial(Residual, hidden=hidden))
        for layer in (net[1], net[2]):
            parallelize_module(layer, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
            fully_shard(layer, mesh=mesh["data"])
        return checked(fully_shard(net, mesh=mesh["data"]))

    return case


def grouped(rank: int) -> Any:
    """Two ranks hold a model; such groups compute different recurrences."""
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("groups", "shards"))
    net = model()
    fully_shard(net[1], mesh=mesh["shards"])
    return checked(fully_shard(net, mesh=mesh["shards"]), parallel="recurrences", num_probes=2)


def distant(rank: int) -> Any:
    """Ranks that are not neighbors hold a model."""
    mesh = dist.init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("shards", "groups"))
    return checked(fully_shard(model(), mesh=mesh["shards"]), parallel="recurrences")


def recorded(rank: int) -> Any:
    """A run directory: the second call loads the result of the first one, which has made no product."""
    folder: list[Any] = [tempfile.mkdtemp() if rank == 0 else None]
    dist.broadcast_object_list(folder)
    first = checked(shard(model()), run_dir=folder[0])
    second = checked(shard(model()), run_dir=folder[0])
    assert all(torch.equal(first[name], second[name]) for name in ("nodes", "weights"))
    return second


def fails(rank: int) -> str:
    """All ranks raise an error while the parameters are moved; then the model is what it was."""
    net, calls = shard(model()), itertools.count()
    before, moved = kept(net), []

    def loss_fn(module: nn.Module, batch: Any) -> Tensor:
        loss = LOSS(module(batch[0]), batch[1])
        if next(calls) == 20:
            moved.append(True)
            raise OverflowError("beside the parameters")
        return loss

    try:
        blockhess.spectrum(net, batches()[:1], loss_fn, **OPTIONS)
    except ValueError as error:
        assert moved
        assert_same(net, before)
        return str(error)
    return "no error"


def one_fails(rank: int) -> str:
    """Rank 1 raises an error in the model, and ends; the others learn that within a collective operation."""
    net, calls = shard(model()), itertools.count()

    def hook(*_: Any) -> None:
        if rank == 1 and next(calls) == 20:
            raise OverflowError("beside the parameters")

    net[2].register_forward_pre_hook(hook)
    before = kept(net)
    try:
        checked(net)
    except RankError as error:
        assert_same(net, before)
        return f"{error} <- {error.__cause__}"
    return "no error"


class Halved(torch.autograd.Function):
    """The identity, with half its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient / 2


def wrong_gradient(rank: int) -> Any:
    net = shard(model())
    net[2].register_forward_pre_hook(lambda module, given: Halved.apply(given[0]))
    return blockhess.spectrum(net, batches(), LOSS, **OPTIONS)


def refused(**options: Any) -> Callable[[int], Any]:
    return lambda rank: checked(shard(model()), **options)


def other_data(rank: int) -> Any:
    data = batches() if rank else batches()[:1]
    return blockhess.spectrum(shard(model()), data, LOSS, **OPTIONS)


def other_model(rank: int) -> Any:
    net = model()
    if rank:
        net[2].up = nn.Linear(6, 10, bias=False)
    mesh = mesh_of_all()
    for name, p in net[0].named_parameters():
        setattr(net[0], name, nn.Parameter(distribute_tensor(p.detach(), mesh, src_data_rank=None)))
    return blockhess.spectrum(net, batches(), LOSS, **OPTIONS)


def other_values(rank: int) -> Any:
    """A parameter that is not sharded differs."""
    net = model()
    net[1].norm.weight.data.add_(float(rank))
    parallelize_module(net[2], mesh_of_all(), {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return blockhess.spectrum(net, batches(), LOSS, **OPTIONS)


def other_wrapping(rank: int) -> Any:
    net, mesh = model(), mesh_of_all()
    if rank:
        fully_shard(net[1], mesh=mesh)
    return blockhess.spectrum(fully_shard(net, mesh=mesh), batches(), LOSS, **OPTIONS)


def unused_on_one(size: int) -> Callable[[int], Any]:
    """The first layer has no gradient for the batch of this size, but on rank 1."""

    def case(rank: int) -> Any:
        net = model()
        net[3].weight = nn.Parameter(distribute_tensor(net[3].weight.detach(), mesh_of_all(), src_data_rank=None))

        def loss_fn(module: Any, batch: Any) -> Tensor:
            x = module[0](batch[0])
            return module[2](module[1](x) if rank or len(x) != size else x).square().mean()

        return blockhess.spectrum(net, batches(), loss_fn, **OPTIONS)

    return case


def half(rank: int) -> Any:
    return blockhess.spectrum(shard(model(torch.bfloat16)), batches(), LOSS, **OPTIONS)


def first_fsdp(rank: int) -> Any:
    class FullyShardedDataParallel(nn.Sequential):  # the one of torch needs an accelerator
        pass

    return blockhess.spectrum(FullyShardedDataParallel(*model()), batches(), LOSS, **OPTIONS)


def partial_sums(rank: int) -> Any:
    net, mesh = model(), mesh_of_all()
    net[3].weight = nn.Parameter(DTensor.from_local(net[3].weight.detach(), mesh, [Partial()]))
    return blockhess.spectrum(net, batches(), LOSS, **OPTIONS)


CASES: dict[str, Callable[[int], Any]] = {
    "float64": fsdp(torch.float64, True),
    "float32": fsdp(torch.float32, True),
    "float64 gathered in backward": fsdp(torch.float64, False),
    "float32 gathered in backward": fsdp(torch.float32, False),
    "float64, Llama": llama(torch.float64, True),
    "float32, Llama, gathered in backward": llama(torch.float32, False),
    "tied": fsdp(torch.float64, True, tied=True),
    "gathered before": gathered,
    "bfloat16 in modules": mixed_precision,
    "CPU offload": offloaded,
    "HSDP": hybrid,
    "tensor parallelism": tensor_parallel,
    "FSDP and tensor parallelism": combined(8),
    "uneven parts of parts": combined(9),
    "groups": grouped,
    "groups of distant ranks": distant,
    "run directory": recorded,
    "wrong gradient": wrong_gradient,
    "fails": fails,
    "engine": refused(engine="autograd"),
    "dtype": refused(dtype=torch.float32),
    "parallel": refused(parallel="data"),
    "other data": other_data,
    "other model": other_model,
    "other values": other_values,
    "other wrapping": other_wrapping,
    "unused on one": unused_on_one(8),
    "unused on one later": unused_on_one(5),
    "bfloat16": half,
    "FSDP1": first_fsdp,
    "partial sums": partial_sums,
    "one fails": one_fails,  # the last, since its processes cannot communicate afterwards
}
