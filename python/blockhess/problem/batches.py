"""Conversion of user data to a list of batches, and operations on batches.

Batches are drawn once, so every Hessian-vector product sees the same data even from a DataLoader that shuffles or
augments. Tensors stay on their device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

Batch: TypeAlias = Any  # anything the loss accepts: (inputs, targets), a mapping, a tensor, an object


def as_batches(data: Any, *, pairs: bool) -> list[Batch]:
    """Return the batches in `data`, at least one.

    A tensor, a tuple or a mapping is one batch; a list, a DataLoader or any other iterable holds batches. If the loss
    takes pairs (inputs, targets), a list of exactly two tensors is one batch.

    Raises:
        ValueError: no batch, an empty batch, an iterator (which may be infinite), a map-style Dataset (which holds
            samples, not batches), an array or a string.

    Example:
        >>> as_batches([torch.ones(4, 2), torch.zeros(4)], pairs=True)[0][0].shape
        torch.Size([4, 2])
    """
    batches = _list(data, pairs)
    if not batches:
        raise ValueError(f"spectrum: data must hold at least one batch, got an empty {type(data).__name__}")
    for index, batch in enumerate(batches):
        if batch_size(batch) == 0:
            raise ValueError(f"spectrum: data must hold samples, got an empty batch {index}")
    return batches


def _list(data: Any, pairs: bool) -> list[Batch]:
    if isinstance(data, Tensor | tuple | Mapping) or is_dataclass(data):
        return [data]
    if pairs and isinstance(data, list) and len(data) == 2 and all(isinstance(item, Tensor) for item in data):
        return [tuple(data)]
    if isinstance(data, np.ndarray | str | bytes) or data is None:
        raise ValueError(f"spectrum: data must be a batch of tensors or a list of batches, got {type(data).__name__}")
    if isinstance(data, Iterator):
        raise ValueError(
            f"spectrum: data must be a batch or a list of batches, got a {type(data).__name__}, which may never end: "
            "pass list(itertools.islice(data, number_of_batches))"
        )
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        raise ValueError(
            f"spectrum: data must hold batches, got the Dataset {type(data).__name__}, which holds samples: "
            "pass torch.utils.data.DataLoader(dataset, batch_size=...)"
        )
    return list(data) if isinstance(data, Iterable) else [data]


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield the tensors in a batch, depth first."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | tuple | list):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors(value)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply `function` to every tensor in a batch. Mappings become dicts."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        return {key: map_tensors(function, value) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        items = [map_tensors(function, value) for value in batch]
        return type(batch)(*items) if hasattr(batch, "_fields") else type(batch)(items)
    return batch


def batch_size(batch: Batch) -> int | None:
    """Return the first dimension of the first tensor that has one, or None."""
    return next((tensor.shape[0] for tensor in tensors(batch) if tensor.dim()), None)


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch along the first dimension into parts of nearly equal size, in order.

    Tensors of another length and objects that are not tensors go into every part.
    """
    size = batch_size(batch)
    if size is None or parts <= 1:
        return [batch]
    edges = [size * i // min(parts, size) for i in range(min(parts, size) + 1)]
    return [
        map_tensors(lambda t, a=a, b=b: t[a:b] if t.dim() and t.shape[0] == size else t, batch)  # type: ignore[misc]
        for a, b in itertools.pairwise(edges)
    ]


def check_device(batches: list[Batch], device: torch.device) -> None:
    """Raise a ValueError if a tensor in the batches is not on `device`."""
    for index, batch in enumerate(batches):
        for tensor in tensors(batch):
            if tensor.device != device:
                raise ValueError(
                    f"spectrum: data must be on the model's device {device}, got batch {index} on {tensor.device}"
                )
