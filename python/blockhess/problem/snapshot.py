"""The state of a model, read once and put back to the bit.

It is all that can be reached from a module through modules, containers and tensors: the attributes of every module,
also those that are not registered, with the contents of their dicts, lists, sets and deques, and the memory, gradient,
flags and hooks of every tensor. Memory is written only where a bit has changed.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from blockhess.problem.batches import dense_parts
from blockhess.problem.shards import is_shard, local

# Integers of the sizes of numbers: equal as integers means equal to the bit, also for NaN and -0.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


class Snapshot:
    """The state of some modules at the time of the constructor.

    Args:
        modules: what is in them, or reached from them, is restored.
        tensors: also restore hooks, random number generators, and the tensors themselves, whose memory is copied now.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> before = Snapshot([model])
        >>> model.weight.data = torch.zeros(3)
        >>> before.restore()
        >>> model.weight.shape
        torch.Size([2, 2])
    """

    def __init__(self, modules: Iterable[nn.Module], tensors: bool = True) -> None:
        self._containers: list[tuple[Any, list[Any]]] = []
        self._tensors: list[_SavedTensor] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._memory: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        seen: dict[int, Any] = {}
        waiting: list[Any] = list(modules)
        while waiting:
            item = waiting.pop()
            if id(item) in seen or not isinstance(item, _FOLLOWED):
                continue
            seen[id(item)] = item
            if isinstance(item, torch.Generator):
                if tensors:
                    self._generators.append((item, item.get_state()))
            elif isinstance(item, Tensor):
                if not tensors or nn.parameter.is_lazy(item):
                    continue
                self._tensors.append(_SavedTensor(item))
                for bits in _memory(item):
                    self._memory.setdefault((bits.data_ptr(), bits.nbytes), (bits, bits.clone()))
                waiting += [vars(item), *(getattr(item, name) for name in _HOOKS)]
            elif isinstance(item, nn.Module):
                waiting.append(vars(item))
                if not tensors:
                    seen |= {id(value): value for name, value in vars(item).items() if "_hooks" in name}
                if isinstance(item, torch.jit.ScriptModule):  # its tensors are not among its attributes
                    waiting += [*item.children(), *item.parameters(recurse=False), *item.buffers(recurse=False)]
            else:
                if not isinstance(item, tuple):
                    self._containers.append((item, _contents(item)))
                waiting += item.values() if isinstance(item, dict) else item

    def drop_gradients(self) -> None:
        """Set .grad of all tensors to None, so that nothing is added to the gradients, until `restore`."""
        for saved in self._tensors:
            if saved.grad is not None:
                saved.tensor.grad = None

    def restore(self) -> None:
        """Put the state back. A KeyboardInterrupt meanwhile is raised at the end."""
        interrupt = None
        while True:
            try:
                self._restore()
                break
            except KeyboardInterrupt as again:
                interrupt = again
        if interrupt is not None:
            raise interrupt

    @torch.no_grad()
    def _restore(self) -> None:
        for container, contents in self._containers:
            now = _contents(container)
            if len(now) == len(contents) and all(map(operator.is_, now, contents)):
                continue
            container.clear()
            if isinstance(container, dict):
                container.update(zip(contents[::2], contents[1::2]))
            elif isinstance(container, set):
                container.update(contents)
            else:
                container.extend(contents)
        for saved in self._tensors:
            saved.restore()
        for bits, copy in self._memory.values():
            if not torch.equal(bits, copy):
                bits.copy_(copy)
        for generator, state in self._generators:
            generator.set_state(state)


_FOLLOWED = (nn.Module, Tensor, torch.Generator, dict, list, tuple, set, deque)


def _contents(container: Any) -> list[Any]:
    """Return the elements, of a dict its keys and values by turns."""
    return list(chain.from_iterable(container.items()) if isinstance(container, dict) else container)


class _SavedTensor:
    """A tensor and all that belongs to it except the contents of its memory."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self._data, self._is_leaf = tensor, tensor.data, tensor.is_leaf
        self._requires_grad = tensor.requires_grad
        self.grad = tensor.grad if self._is_leaf else None
        self._hooks = [name for name in _HOOKS if getattr(tensor, name)]

    def restore(self) -> None:
        tensor = self.tensor
        if self._is_leaf and not tensor.is_leaf:
            with suppress(RuntimeError):  # a view, which cannot be detached in place
                tensor.detach_()
        if _place(tensor) != _place(self._data):
            tensor.data = self._data
        if self._is_leaf and tensor.is_leaf:
            if tensor.requires_grad != self._requires_grad:
                tensor.requires_grad_(self._requires_grad)
            if tensor.grad is not self.grad:
                tensor.grad = self.grad
        for name in _HOOKS:
            if name not in self._hooks and getattr(tensor, name):
                getattr(tensor, name).clear()  # autograd keeps this dict, also where another one is assigned


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Return what differs if a tensor has other memory, or sees it otherwise."""
    place = tensor.device, tensor.dtype, tuple(tensor.shape), tensor.layout
    if tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return place
    return (*place, tensor.stride(), tensor.data_ptr())


def _memory(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the memory of a tensor as vectors of integers; nothing for tensors that have none of their own."""
    if is_shard(tensor):
        tensor = local(tensor.detach())
    if is_traceable_wrapper_subclass(tensor) or tensor.is_meta:
        return
    for part in dense_parts(tensor):
        if part.layout != torch.strided:
            continue
        unit = min(part.itemsize, 8)
        scale = part.itemsize // unit
        length = scale * (1 + sum((n - 1) * s for n, s in zip(part.shape, part.stride()))) if part.numel() else 0
        offset, storage = scale * part.storage_offset(), part.untyped_storage()
        if length and (offset + length) * unit <= storage.nbytes():  # otherwise the storage is freed
            empty = torch.empty(0, dtype=_BITS[unit], device=part.device)
            yield empty.set_(storage, offset, (length,))  # type: ignore[call-overload]
