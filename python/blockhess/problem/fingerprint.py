"""Hashes of models and data that differ whenever a bit of a tensor differs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from blockhess.problem.batches import Batch, dense_parts, tensors
from blockhess.problem.shards import whole


def of_model(model: nn.Module) -> str:
    """Hash the names and values of all parameters and buffers, of a sharded model as of the whole one."""
    return _digest("model", [*model.named_parameters(), *model.named_buffers()])


def of_data(batches: Iterable[Batch]) -> str:
    """Hash all tensors in the batches, in order."""
    return _digest("data", ((str(i), tensor) for i, batch in enumerate(batches) for tensor in tensors(batch)))


def of_names(names: object) -> str:
    """Hash a value that is the same for equal text."""
    return hashlib.blake2b(repr(names).encode(), digest_size=16).hexdigest()


def _digest(argument: str, named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        if tensor.is_meta:
            raise ValueError(f"spectrum: {argument} must hold values, got {name!r} on the meta device; load it first")
        if tensor.layout != torch.strided and not tensor.is_nested:
            digest.update(repr((tensor.layout, tuple(tensor.shape))).encode())
        for part in dense_parts(whole(tensor.detach())):
            digest.update(repr((name, part.dtype, tuple(part.shape))).encode())
            flat = part.resolve_conj().resolve_neg().cpu().contiguous().flatten()
            # A one-element slice may have any stride, but a view as bytes needs stride 1.
            flat = flat.as_strided((flat.numel(),), (1,), flat.storage_offset())
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
