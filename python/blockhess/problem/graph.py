"""Properties of the autograd graph of a loss: its operations, whether they are twice differentiable, its size."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from blockhess.problem.batches import dense_parts
from blockhess.problem.shards import local


class DispatchMode(TorchDispatchMode):
    """Sees every operation. The first one does not import torch._dynamo, which would take over a second."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # compiled modules run uncompiled, see `model_state`
        return False


class FlopCounter(DispatchMode):
    """Counts the floating-point operations of matrix products and convolutions, by what their two factors depend on.

    Dependence is followed by memory, so that it is that of all tensors that share it.

    Args:
        sources: tensors on which factors may depend. The i-th one has bit 1 << i.

    Attributes:
        total: of all of them.
        by_factors: (whether it is a convolution, bits of the sources of one factor, and of the other) -> operations.
    """

    def __init__(self, sources: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.total = 0
        self.by_factors: Counter[tuple[bool, int, int]] = Counter()
        self._bits: dict[StorageWeakRef, int] = {}  # a weak reference keeps the address from being used again
        for i, source in enumerate(sources):
            self._depend([source], 1 << i)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            flops = count(*args, **(kwargs or {}), out_val=out)
            self.total += flops
            first = 1 if func._overloadpacket in _WITH_SUMMAND else 0
            a, b = map(self._bits_of, args[first : first + 2])
            self.by_factors["convolution" in func._overloadpacket.__name__, a, b] += flops
        bits = 0
        for tensor in tree_leaves((args, kwargs)):
            bits |= self._bits_of(tensor)
        if bits:
            self._depend([t for t in tree_leaves(out) if isinstance(t, Tensor) and _is_differentiable(t)], bits)
        return out

    def _bits_of(self, value: Any) -> int:
        bits = 0
        for storage in _storages(value):
            bits |= self._bits.get(storage, 0)
        return bits

    def _depend(self, tensors: Iterable[Tensor], bits: int) -> None:
        for storage in (storage for tensor in tensors for storage in _storages(tensor)):
            self._bits[storage] = self._bits.get(storage, 0) | bits


# Operations whose first argument is added to the product of the next two.
_WITH_SUMMAND = {torch.ops.aten.addmm, torch.ops.aten.baddbmm}


def _is_differentiable(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _storages(value: Any) -> Iterator[StorageWeakRef]:
    if isinstance(value, Tensor):
        value = local(value)
        if not is_traceable_wrapper_subclass(value):
            for part in dense_parts(value):
                yield StorageWeakRef(part.untyped_storage())


class OperationRecorder(DispatchMode):
    """Records every operation and the module that calls it.

    Attributes:
        places: name of an operation -> the module that calls it first.
        random: "operation in module" of those that draw random numbers; a dict, to keep the order.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.places: dict[str, str] = {}
        self.random: dict[str, None] = {}
        self._inside: list[str] = []
        self._model = model

    def __enter__(self) -> Any:
        self._handles = []
        for name, module in self._model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):  # these take no hooks
                continue
            label = f"{name or 'the model'} ({type(module).__name__})"
            self._handles.append(module.register_forward_pre_hook(lambda *_, label=label: self._inside.append(label)))
            self._handles.append(module.register_forward_hook(lambda *_: self._inside.pop() and None, always_call=True))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, where = func.overloadpacket.__name__, self._inside[-1] if self._inside else "loss_fn"
        self.places.setdefault(name, where)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random.setdefault(f"{name} in {where}")
        return func(*args, **(kwargs or {}))

    def randomness(self) -> str:
        """Return the likely reason why two evaluations differ."""
        if self.random:
            return "random numbers are drawn by " + ", ".join(list(self.random)[:5])
        return "no random number is drawn by torch, so the model changes its own state, or another generator is used"


# Part of an operation's name -> what to use in place of it, for operations without a second derivative.
_ALTERNATIVES = {
    "attention": "take away the sdpa_kernel() that asks for it, or use SDPBackend.MATH",
    "rnn": "set torch.backends.cudnn.enabled = False around it",
    "cdist": "use (x[:, None] - y).norm(dim=-1)",
    "embedding_bag": "use nn.Embedding and a sum or mean",
    "hardsigmoid": "use F.relu6(x + 3) / 6",
}


def alternative(operation: str) -> str:
    """Return what to use in place of an operation without a second derivative."""
    return next((text for part, text in _ALTERNATIVES.items() if part in operation), "write it in plain PyTorch")


# Graph nodes whose second derivative is missing or wrong, without an error from autograd.
_NOT_TWICE_DIFFERENTIABLE = {
    "torch::autograd::Error": "an operation marked once_differentiable (a torch.autograd.Function), which has no "
    "second derivative; write that operation in plain PyTorch, or pass engine='difference'",
    "CheckpointFunctionBackward": "reentrant activation checkpointing, which hides parameters from autograd.grad; "
    "pass use_reentrant=False",
    "WeightNormInterfaceBackward0": "torch's fused weight norm, whose second derivative is wrong; write g v / |v| in "
    "plain PyTorch, remove the parametrization, or pass engine='difference'",
}

# Graph nodes whose third derivative is wrong: torch treats statistics that depend on the input as constants.
_NOT_THRICE_DIFFERENTIABLE = ("NativeLayerNormBackwardBackward0", "BatchNormBackwardBackward0")


def refuse_third_derivatives(nodes: Iterable[Node]) -> None:
    """Check the graph of a loss that itself contains derivatives.

    Raises:
        NotImplementedError: it differentiates through a normalization whose third derivative torch gets wrong.
    """
    for node in nodes:
        fixed = not getattr(node, "_saved_train", getattr(node, "_saved_training", True))  # BatchNorm in eval mode
        if node.name().endswith(_NOT_THRICE_DIFFERENTIABLE) and not fixed:
            layer = "LayerNorm" if "Layer" in node.name() else "BatchNorm"
            raise NotImplementedError(
                f"spectrum: loss_fn differentiates through {layer}, whose third derivative torch gets wrong; write the "
                "normalization in plain PyTorch, or use nn.GroupNorm"
            )


def differentiable_nodes(roots: Iterable[Node | None], second_order: bool = True) -> set[Node]:
    """Return all nodes of a graph.

    Raises:
        NotImplementedError: one of them has no second derivative, or a wrong one, and `second_order` is True.
    """
    waiting = list(roots)
    seen: set[Node] = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if second_order and node.name() in _NOT_TWICE_DIFFERENTIABLE:
            raise NotImplementedError(f"spectrum: the model has {_NOT_TWICE_DIFFERENTIABLE[node.name()]}")
        waiting.extend(edge[0] for edge in node.next_functions)
    return seen


def largest_eps(nodes: Iterable[Node]) -> float:
    """Return the largest machine epsilon of the operations of a graph."""
    dtypes = {made.dtype for node in nodes for made in node._input_metadata}
    return max(torch.finfo(dtype).eps for dtype in dtypes if dtype.is_floating_point)


@functools.cache
def _saved_names(kind: type[Node]) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


def saved_bytes(nodes: Iterable[Node], others: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors that the nodes saved for backward, not counting the storage of `others`."""
    counted = {part.untyped_storage().data_ptr() for t in others for part in dense_parts(local(t))}
    total = 0
    for node in nodes:
        for name in _saved_names(type(node)):
            saved = getattr(node, name)
            found = saved if isinstance(saved, (tuple, list)) else (saved,)
            for part in (p for tensor in found if isinstance(tensor, Tensor) for p in dense_parts(local(tensor))):
                if part.untyped_storage().data_ptr() not in counted:
                    counted.add(part.untyped_storage().data_ptr())
                    total += part.untyped_storage().nbytes()
    return total
