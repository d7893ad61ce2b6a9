"""What the processes that hold shards of a model send to each other, and the memory of what they gather, by counting.

    all-gather, reduce-scatter:  (s - 1) / s of the bytes,     all-reduce:  2 (r - 1) / r of the bytes,

sent by every process, for s shards and r replicas. FSDP gathers the parameters of a module before its forward pass,
again before its backward pass if it has freed them, and sums the shards of its gradients. Operations between shards
that are part of the model, such as those of tensor parallelism, are not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blockhess.problem.blocks import Block
from blockhess.problem.problem import Problem
from blockhess.problem.shards import is_shard, local

# Assumed bytes per second between processes: about 100 Gbit/s.
BANDWIDTH = 1e10


@dataclass(frozen=True)
class Sharding:
    """Bytes per process in the evaluations of a sharded model.

    Attributes:
        processes: number of processes that hold a model.
        modules: number of modules whose parameters FSDP gathers.
        shard_bytes: of the parameters that this process holds.
        gathered_bytes: largest memory of gathered parameters and of their gradients during a gradient of the loss.
        gradient_traffic: sent by every process for a gradient of the loss.
    """

    processes: int
    modules: int
    shard_bytes: int
    gathered_bytes: int
    gradient_traffic: float


def sharding(model: nn.Module) -> Sharding:
    """Return the counts of a sharded model. `fully_shard` fixes some of its choices in the first forward pass."""
    parameters = [p for p in model.parameters() if is_shard(p)]
    groups = [_Group(group) for group in _fsdp_groups(model)]
    around, inside = [g for g in groups if g.is_around], [g for g in groups if not g.is_around]
    freed = sorted((g.bytes for g in inside if g.kept_bytes < g.bytes), reverse=True)
    # Modules around others are whole with their gradients all the time. Of those that are freed after their forward
    # pass, there are parameters and gradients of one, parameters of the next one, and gradients of the one before;
    # beside those that are kept, there are two buffers.
    at_a_time = 2 * sum(freed[:1]) + sum(freed[1:3])
    gathered = 2 * sum(g.bytes for g in around) + sum(g.kept_bytes for g in inside)
    gathered += max([at_a_time, *(2 * g.kept_bytes for g in inside)])
    return Sharding(
        processes=parameters[0].device_mesh.size(),  # type: ignore[attr-defined]
        modules=len(groups),
        shard_bytes=sum(local(p).numel() * p.itemsize for p in parameters),
        gathered_bytes=gathered,
        gradient_traffic=sum(g.traffic for g in groups),
    )


def sharded_costs(problem: Problem, counts: Sequence[int], expected: int) -> dict[str, Any]:
    """Return the entries of a `Plan` for a sharded model.

    Args:
        counts: number of products of every block at most.
        expected: number of products expected, in the same proportions.
    """
    found = sharding(problem.model)
    gathers = sum(count * block_traffic(block) for count, block in zip(counts, problem.blocks))
    gathers *= expected / max(1, sum(counts))
    return {
        "processes": found.processes,
        "shard_bytes": found.shard_bytes,
        "gathered_bytes": max(found.gathered_bytes, *(block_bytes(b, problem.dtype.itemsize) for b in problem.blocks)),
        "traffic_bytes": 2 * expected * found.gradient_traffic + gathers,
        "gather_traffic_bytes": gathers,
    }


def block_traffic(block: Block) -> float:
    """Return the bytes that every process sends to gather the gradient of a block."""
    return sum(_share(_shards(p)) * p.numel() * p.itemsize for p in _sharded_parameters(block))


def block_bytes(block: Block, itemsize: int) -> int:
    """Return the memory of the gathered gradient of a block, and of the vector into which it is added."""
    return sum(p.numel() * p.itemsize for p in _sharded_parameters(block)) + itemsize * block.info.dim


def _sharded_parameters(block: Block) -> list[Tensor]:
    found = {piece.name: piece.tensor for piece in block.pieces}
    return [p for p in found.values() if is_shard(p)]


def _shards(parameter: Any) -> int:
    sizes = zip(parameter.device_mesh.shape, parameter.placements)
    return math.prod(size for size, placement in sizes if hasattr(placement, "dim"))


def _share(processes: int) -> float:
    return (processes - 1) / processes


def _fsdp_groups(model: nn.Module) -> list[Any]:
    """Return the groups of parameters that FSDP gathers together."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    states = {id(state): state for state in (module._get_fsdp_state() for module in modules)}
    found: list[Any] = []
    for state in states.values():
        found += getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]  # the latter before torch 2.13
    return [group for group in found if group is not None]


class _Group:
    """Counts of a group of parameters that FSDP gathers together."""

    def __init__(self, group: Any) -> None:
        policy, mesh, mesh_after = group.mp_policy, group.mesh_info, group.post_forward_mesh_info
        inner = (child for module in group.modules for child in module.modules() if child not in group.modules)
        self.is_around = any(hasattr(child, "_get_fsdp_state") for child in inner)
        sums = 0.0
        self.bytes = 0
        for p in group.fsdp_params:
            like, count = p.sharded_param, p._orig_size.numel()  # of the part that tensor parallelism leaves
            dtype = policy.param_dtype or like.dtype
            self.bytes += count * dtype.itemsize
            sums += like.requires_grad * count * (policy.reduce_dtype or dtype).itemsize
        shards, replicas = getattr(mesh, "shard_mesh_size", 1), getattr(mesh, "replicate_mesh_size", 1)
        shards_after = mesh_after.shard_mesh_size if mesh_after else 1
        # Between forward and backward pass, beside the shards of parameters.
        self.kept_bytes = 0 if mesh_after is mesh else self.bytes // shards_after
        self.traffic = _share(shards) * (self.bytes + sums) + 2 * _share(replicas) * sums / shards
        self.traffic += _share(shards_after) * self.bytes
