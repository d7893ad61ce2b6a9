"""Models of which every process holds a part: DTensor parameters, also those of `torch.distributed.fsdp.fully_shard`.

All processes run the model on the same batches. Gradients arrive in `.grad` of the shards, as in training. FSDP gathers
parameters from memory of its own, so that steps are written there, and a kept copy of the shard is put back.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def is_shard(tensor: Any) -> bool:
    """Return whether a tensor is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_sharded(model: Any) -> bool:
    """Return whether a model has DTensor parameters, also where FSDP has gathered them, which ends."""
    if not isinstance(model, nn.Module):
        return False
    reshard(model)
    return any(map(is_shard, model.parameters()))


def holders(model: Any) -> list[int]:
    """Return the ranks that hold the shards of a model together with this one, or none if it is not sharded."""
    meshes = [p.device_mesh.mesh for p in model.parameters() if is_shard(p)] if is_sharded(model) else []
    return sorted(max((mesh.flatten().tolist() for mesh in meshes), key=len, default=[]))


def local(tensor: Any) -> Tensor:
    """Return the part of a DTensor that this process holds, or the tensor."""
    part: Tensor = tensor.to_local() if is_shard(tensor) else tensor
    return part


def device_of(tensor: Any) -> torch.device:
    """Return the device of a tensor, of shards that FSDP offloads to the CPU that on which they are used."""
    kind = tensor.device_mesh.device_type if is_shard(tensor) else tensor.device.type
    if kind == tensor.device.type:
        device: torch.device = tensor.device
        return device
    return torch.device(kind, torch.get_device_module(kind).current_device())


def whole(tensor: Any) -> Tensor:
    """Return the whole DTensor, for which all its processes must call this, or the tensor."""
    gathered: Tensor = tensor.to(device_of(tensor)).full_tensor() if is_shard(tensor) else tensor
    return gathered


def part_of(tensor: Tensor, like: Any) -> Tensor:
    """Return the part of a whole tensor that this process holds of the DTensor `like`, on the device of that."""
    from torch.distributed.tensor import distribute_tensor

    part = distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local()
    return part.to(like.device)


def reshard(model: nn.Module) -> None:
    """Free the gathered parameters of FSDP, so that the next evaluation gathers them anew."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            module.reshard()  # type: ignore[operator]


def check(model: nn.Module, dtype: torch.dtype | None, engine: str) -> None:
    """Check that the parameters of a model are whole, or sharded in a supported way.

    Raises:
        NotImplementedError: they are sharded by FSDP1, or have unsupported placements or hooks.
        ValueError: an argument is not one for sharded models.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise NotImplementedError(
                "spectrum: model must not be wrapped in FullyShardedDataParallel (FSDP1), got "
                f"{name or 'the model'!r}; use torch.distributed.fsdp.fully_shard instead"
            )
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            _check(name, parameter, dtype)
    if is_sharded(model) and engine not in ("auto", "difference"):
        raise ValueError(f"spectrum: engine must be 'auto' or 'difference' for a sharded model, got {engine!r}")


def _check(name: str, parameter: Any, dtype: torch.dtype | None) -> None:
    placements, mesh = parameter.placements, parameter.device_mesh
    if not {type(placement).__name__ for placement in placements} <= {"Shard", "_StridedShard", "Replicate"}:
        raise NotImplementedError(
            f"spectrum: parameters must have placements Shard or Replicate, got {placements} of {name!r}"
        )
    sizes = [(placement.dim, mesh.size(i)) for i, placement in enumerate(placements) if hasattr(placement, "dim")]
    parts = {dim: math.prod(size for other, size in sizes if other == dim) for dim, _ in sizes}
    # Several mesh dimensions give some processes other entries than their placements say, unless they divide evenly.
    uneven = [dim for dim, count in parts.items() if parameter.shape[dim] % count]
    if len(sizes) > 1 and uneven:
        raise NotImplementedError(
            f"spectrum: parameters sharded over {len(sizes)} mesh dimensions must be divided evenly, got shape "
            f"{tuple(parameter.shape)} of {name!r} in {parts[uneven[0]]} parts along dim {uneven[0]}"
        )
    if mesh.get_coordinate() is None:
        raise NotImplementedError(
            f"spectrum: model must be sharded over all {dist.get_world_size()} processes, got {name!r} on a mesh "
            f"without rank {dist.get_rank()}"
        )
    if parameter.dtype.itemsize < 4:
        raise ValueError(
            f"spectrum: parameters of a sharded model must be float32 or float64, got {parameter.dtype} of {name!r}, "
            "whose rounding hides the steps of engine='difference'; convert the model before fully_shard, with "
            "MixedPrecisionPolicy(param_dtype=torch.bfloat16)"
        )
    if dtype not in (None, parameter.dtype):
        raise ValueError(
            f"spectrum: dtype must be that of the parameters of a sharded model, {parameter.dtype}, got {dtype}; "
            "convert the model before fully_shard"
        )
    if getattr(parameter, "_post_accumulate_grad_hooks", None):
        raise NotImplementedError(
            f"spectrum: parameters of a sharded model must have no hooks that run after a backward pass, got one of "
            f"{name!r}; remove it"
        )


def backward(loss: Tensor, parameters: Sequence[Tensor], every: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Return the gradient of a loss with respect to parameters as DTensors, by a backward pass as in training.

    Args:
        every: all parameters that get a gradient, which is None before and after.
    """
    try:
        loss.backward()  # type: ignore[no-untyped-call]
        return tuple(p.grad for p in parameters)
    finally:
        for p in every:
            p.grad = None
