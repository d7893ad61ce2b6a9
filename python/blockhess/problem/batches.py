"""Conversion of user data to a list of batches, and operations on batches of any type.

Batches are drawn once, so every Hessian-vector product sees the same data even from a DataLoader that shuffles or
augments. Tensors stay on their device. A batch is never changed: operations return it, or a copy of the same type.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import is_dataclass
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

Batch: TypeAlias = Any  # anything the loss accepts: (inputs, targets), a mapping, a tensor, an object

# Most batches of an iterable without a length: an epoch of ImageNet in batches of 320. It may be endless.
MOST_BATCHES = 4096
# Largest share of the device's memory that such batches take; gradients, graphs and vectors need the rest.
MOST_MEMORY = 0.25

# Added to messages about data that are not those of an earlier run.
DRAWN_ANEW = "a loader that shuffles or augments yields other batches every time: pass the same list of batches"

_ATOMS = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)
# What a batch may refer to without holding it.
_OUTSIDE = (
    type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, nn.Module, torch.optim.Optimizer, Dataset,
    DataLoader, Sampler, np.ndarray,
)  # fmt: skip
_CONTAINERS = (dict, tuple, list, UserDict, UserList)


def as_batches(data: Any, *, pairs: bool) -> list[Batch]:
    """Return the batches in `data`, at least one.

    A tensor, tuple, mapping, dataclass or other object with tensors is one batch; a list, a DataLoader or any other
    iterable holds batches. If the loss takes pairs (inputs, targets), a list of exactly two tensors is one batch.

    Raises:
        ValueError: no batch, an empty batch, an iterator or an iterable of more than MOST_BATCHES without a length
            (which may be infinite), a map-style Dataset (which holds samples, not batches), an array or a string.
        RuntimeError: a loader fails.

    Example:
        >>> as_batches([torch.ones(4, 2), torch.zeros(4)], pairs=True)[0][0].shape
        torch.Size([4, 2])
    """
    batches = _list(data, pairs)
    if not batches:
        once = "" if hasattr(data, "__len__") else "; an iterable that can be read only once is empty the second time"
        raise ValueError(f"spectrum: data must hold at least one batch, got an empty {type(data).__name__}{once}")
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
    if isinstance(data, list):
        return data.copy()
    # Graph batches yield their attributes, and can be moved; a loader has no such method.
    holds = any(True for _ in tensors(data))
    is_sequence = hasattr(data, "__getitem__") and hasattr(data, "__len__") and not holds
    if not (isinstance(data, Iterable) or is_sequence) or (hasattr(data, "to") and holds):
        return [data]
    return _drawn(data)


def _drawn(loader: Iterable[Batch]) -> list[Batch]:
    """Return the batches that a loader yields.

    Raises:
        ValueError: it has no length, and yields more than MOST_BATCHES or MOST_MEMORY.
        RuntimeError: it fails.
    """
    try:
        known = len(loader)  # type: ignore[arg-type]
    except TypeError:  # also from a DataLoader whose dataset or sampler has no length
        known = None
    batches: list[Batch] = []
    size, room = 0, float("inf")
    try:
        for batch in loader:
            batches.append(batch)
            if known is None:
                found = list(tensors(batch))
                room = MOST_MEMORY * _memory(found[0].device) if found else room
                size += sum(part.numel() * part.itemsize for tensor in found for part in dense_parts(tensor))
            if len(batches) > (MOST_BATCHES if known is None else max(known, MOST_BATCHES)) or size > room:
                raise ValueError(
                    f"spectrum: data must end, got a {type(loader).__name__} that yields more than {len(batches) - 1} "
                    "batches and may never end: pass list(itertools.islice(data, number_of_batches))"
                )
    except Exception as error:
        if str(error).startswith("spectrum:"):
            raise
        raise RuntimeError(
            f"spectrum: data must yield batches, got {type(error).__name__} after {len(batches)} batches of "
            f"{type(loader).__name__}: {first_line(error)}"
        ) from error
    return batches


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


def known_device(device: str, op: str) -> torch.device:
    """Return a device of this machine.

    Raises:
        ValueError: there is no such device.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"{op}: device must be one of this machine's, got {device!r}: {first_line(error)}") from error


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _attributes(value: Any) -> dict[str, Any]:
    """Return what `__dict__` of an object holds, without calling code of its class."""
    try:
        found: dict[str, Any] = object.__getattribute__(value, "__dict__")
        return found
    except AttributeError:
        return {}


def _slots(value: Any) -> Iterator[tuple[MemberDescriptorType, Any]]:
    """Yield descriptor and content of the slots of an object."""
    for owner in type(value).__mro__:
        for member in vars(owner).values() if "__slots__" in vars(owner) else ():
            if isinstance(member, MemberDescriptorType):
                with suppress(AttributeError):  # not set
                    yield member, member.__get__(value)


def _parts(value: Any) -> list[Any]:
    """Return what an object holds; nothing for what is no part of a batch, such as a module or a function."""
    if isinstance(value, (Tensor, *_ATOMS, *_OUTSIDE)):
        return []
    if isinstance(value, UserDict | UserList):
        return [value.data]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, tuple | list):
        return list(value)
    return [*_attributes(value).values(), *(content for _, content in _slots(value))]


def _walk(batch: Batch, atoms: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield every object in a batch and the one that holds it, depth first. Objects in cycles are entered once.

    Args:
        atoms: also yield numbers, strings and None.
    """
    entered: set[int] = set()
    waiting = [(batch, None)]
    while waiting:
        value, holder = waiting.pop()
        yield value, holder
        if id(value) not in entered:
            entered.add(id(value))
            parts = _parts(value)
            waiting += [(part, value) for part in reversed(parts) if atoms or type(part) not in _ATOMS]


def tensors(batch: Batch) -> Iterator[Tensor]:
    """Yield the tensors in a batch, depth first."""
    return (value for value, _ in _walk(batch) if isinstance(value, Tensor))


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """Return the strided tensors that a nested or sparse tensor consists of, or the tensor."""
    if tensor.is_nested:
        return list(tensor.unbind())
    if tensor.layout == torch.sparse_coo:
        return [tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor]


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """Apply `function` to every tensor in a batch, once.

    What holds a tensor that changes is copied, with its type; all else is the same object as in the batch. The lengths
    in a PackedSequence, which torch wants on the CPU, are not changed.

    Raises:
        TypeError: an object in the batch cannot be copied, as it is not of a class written in Python.
    """
    links = list(_walk(batch))
    holders: dict[int, list[Any]] = {}
    for value, holder in links:
        holders.setdefault(id(value), []).append(holder)
    memo: dict[int, Any] = {}  # object -> what stands in its place in the copy
    changed: list[Any] = []
    for value, holder in links:
        if isinstance(value, Tensor) and id(value) not in memo:
            memo[id(value)] = value if _is_fixed(value, holder) else function(value)
            if memo[id(value)] is not value:
                changed.append(value)
    if not changed:
        return batch
    copied: set[int] = set()
    while changed:
        for holder in holders[id(changed.pop())]:
            if holder is not None and id(holder) not in copied:
                copied.add(id(holder))
                changed.append(holder)
    return _copy(batch, copied, memo)


def _copy(value: Any, copied: set[int], memo: dict[int, Any]) -> Any:
    """Return the copy of a value whose id is in `copied`, or the value, without calling code of its class.

    Args:
        memo: by id, what stands for a value in the copy; gets the copies.
    """
    if isinstance(value, weakref.ref) and id(value()) in copied:  # as in torch_geometric, to the graph of a store
        return weakref.ref(_copy(value(), copied, memo))
    if id(value) not in copied or id(value) in memo:
        return memo.get(id(value), value)
    new: Any
    base: Any
    try:
        if isinstance(value, tuple):
            new = tuple.__new__(type(value), [_copy(item, copied, memo) for item in value])
        else:
            base = next(b for b in (OrderedDict, defaultdict, dict, list, object) if isinstance(value, b))
            new = base.__new__(type(value))
    except TypeError as error:
        raise TypeError(
            f"spectrum: data must hold objects that can be copied, got {type(value).__name__}; convert its tensors, "
            "or pass a mapping or a dataclass"
        ) from error
    memo[id(value)] = new
    if isinstance(value, defaultdict):
        new.default_factory = value.default_factory
    for key, item in value.items() if isinstance(value, dict) else ():
        base.__setitem__(new, key, _copy(item, copied, memo))
    if isinstance(value, list):
        list.extend(new, (_copy(item, copied, memo) for item in value))
    if _attributes(value):
        _attributes(new).update({name: _copy(item, copied, memo) for name, item in _attributes(value).items()})
    for member, item in _slots(value):
        member.__set__(new, _copy(item, copied, memo))
    return new


def to_dtype(batch: Batch, dtype: torch.dtype) -> Batch:
    """Convert the floating-point and complex tensors in a batch."""

    def converted(t: Tensor) -> Tensor:
        if t.is_complex():
            return t.to(dtype.to_complex())
        return t.to(dtype) if t.is_floating_point() else t

    return map_tensors(converted, batch)


def _is_fixed(tensor: Tensor, holder: Any) -> bool:
    return isinstance(holder, PackedSequence) and tensor is holder.batch_sizes


def signature(batch: Batch) -> str | None:
    """Return a text that is equal for batches that differ only in the elements of tensors.

    None for batches that hold anything but strided tensors, numbers, strings, containers and objects of these.
    """
    numbers: dict[int, int] = {}
    words: list[Any] = []
    for value, _ in _walk(batch, atoms=True):
        if isinstance(value, PackedSequence):
            return None
        if isinstance(value, Tensor):
            if value.is_nested or value.layout != torch.strided:
                return None
            words.append((numbers.setdefault(id(value), len(numbers)), tuple(value.shape), value.dtype))
        elif isinstance(value, _ATOMS):
            words.append(value)
        elif isinstance(value, _CONTAINERS) or _parts(value):
            keys = list(value) if isinstance(value, dict) else list(getattr(value, "__dict__", ()))
            words.append((type(value).__qualname__, len(_parts(value)), keys))
        else:
            return None
    return repr(words)


def shapes(batch: Batch) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the tensors in a batch, without those of 0 dimensions."""
    return tuple(
        tuple(part.shape) for t in tensors(batch) for part in (dense_parts(t) if t.is_nested else [t]) if part.dim()
    )


def batch_size(batch: Batch) -> int | None:
    """Return the first dimension that most tensors in a batch share, the first such one, or None without any."""
    counts = Counter(tensor.size(0) for tensor in tensors(batch) if tensor.dim())
    return counts.most_common(1)[0][0] if counts else None


def row_shapes(batch: Batch) -> tuple[tuple[int, ...], ...] | None:
    """Return the shapes of the tensors in a batch without the first dimension, or None unless all agree on that.

    The elements of batches with equal row shapes are proportional to their first dimensions. Sequences of different
    lengths (nested tensors, PackedSequence) have no such shapes.
    """
    found = shapes(batch)
    if any(isinstance(value, PackedSequence) for value, _ in _walk(batch)) or any(t.is_nested for t in tensors(batch)):
        return None
    return tuple(shape[1:] for shape in found) if len({shape[0] for shape in found}) == 1 else None


def split_batch(batch: Batch, parts: int) -> list[Batch]:
    """Split a batch along the first dimension into parts of nearly equal size, in order.

    Tensors of 0 dimensions and objects without tensors go into every part. A batch is not split if its tensors
    disagree on the first dimension, or lie in an object, whose other attributes may depend on its size.
    """
    size = batch_size(batch)
    holders = [holder for value, holder in _walk(batch) if holder is not None and any(True for _ in tensors(value))]
    if parts <= 1 or size is None or row_shapes(batch) is None:
        return [batch]
    if not all(isinstance(holder, Mapping | tuple | list) for holder in holders):
        return [batch]
    edges = [size * i // min(parts, size) for i in range(min(parts, size) + 1)]
    return [
        map_tensors(lambda t, a=a, b=b: t[a:b] if t.dim() else t, batch)  # type: ignore[misc]
        for a, b in itertools.pairwise(edges)
    ]


def check_device(batches: list[Batch], device: torch.device) -> None:
    """Raise a ValueError if a tensor in the batches is not on `device`."""
    for index, batch in enumerate(batches):
        for tensor, holder in _walk(batch):
            if isinstance(tensor, Tensor) and tensor.device != device and not _is_fixed(tensor, holder):
                raise ValueError(
                    f"spectrum: data must be on the model's device {device}, got batch {index} on {tensor.device}"
                )
