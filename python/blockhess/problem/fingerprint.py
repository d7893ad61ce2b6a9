"""Short texts that tell two models, or two sets of batches, apart by every bit of their tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from blockhess.problem.batches import Batch, tensors


def of_model(model: nn.Module) -> str:
    """Of all parameters and buffers, with their names."""
    return _digest([*model.named_parameters(), *model.named_buffers()])


def of_data(batches: Iterable[Batch]) -> str:
    """Of all tensors in the batches, in order."""
    return _digest((str(index), tensor) for index, batch in enumerate(batches) for tensor in tensors(batch))


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in named:
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
        dense = tensor.detach().to_dense() if tensor.layout != torch.strided else tensor.detach()
        flat = dense.cpu().contiguous().flatten()
        # The one element of a slice may have any stride, which a view as bytes does not take.
        flat = flat.as_strided((flat.numel(),), (1,), flat.storage_offset())
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
