"""Classification of ATen operations for tracing and linearization."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

aten = torch.ops.aten

# A torch.fx.Node. The annotations of its target and arguments are unions of all that a graph may contain.
Node: TypeAlias = Any


class NotTraceable(NotImplementedError):
    """The gradient of a model cannot be traced or linearized; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape, dtype and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor) -> TensorInfo:
        return TensorInfo(tensor.shape, tensor.dtype, tensor.device)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def empty(self, device: torch.device | str | None = None) -> Tensor:
        """Return an uninitialized tensor."""
        return torch.empty(self.shape, dtype=self.dtype, device=device or self.device)


# Identity that marks, in a trace, a tensor that autograd treats as a constant.
_trace_ops = torch.library.Library("blockhess_trace", "DEF")
_trace_ops.define("constant(Tensor(a) x) -> Tensor(a)")
_trace_ops.impl("constant", aten.alias.default, "CompositeExplicitAutograd")
CONSTANT = torch.ops.blockhess_trace.constant.default

# Identities.
SAME = {aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default, CONSTANT}
# Views that depend on strides -> the operation that does not.
RESHAPED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
# Rearrangements of elements.
VIEWS = {
    aten.reshape.default, aten.permute.default, aten.t.default, aten.transpose.int, aten.unsqueeze.default,
    aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int,
}  # fmt: skip
# Operations that return disjoint views of their argument.
SPLITS = {
    aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.unsafe_split.Tensor, aten.chunk.default,
    aten.unsafe_chunk.default,
}  # fmt: skip
# Operations that use only the shape of their argument -> the value they return.
SHAPE_ONLY = {
    aten.zeros_like.default: 0.0, aten.new_zeros.default: 0.0, aten._new_zeros_with_same_feature_meta.default: 0.0,
    aten.empty_like.default: 0.0, aten.new_empty.default: 0.0, aten.ones_like.default: 1.0,
}  # fmt: skip


def functional(target: Any) -> tuple[Any, bool]:
    """Return the functional variant of an operation, and whether the operation was in place."""
    name = getattr(getattr(target, "_schema", None), "name", "")
    if not (name.startswith("aten::") and name.endswith("_") and not name.endswith("__")):
        return target, False
    packet = getattr(aten, name[len("aten::") : -1], None)
    for overload in () if packet is None else packet.overloads():
        found = getattr(packet, overload)
        if _argument_types(found) == _argument_types(target):
            return found, True
    raise NotTraceable(f"{target} changes a tensor in place")


def _argument_types(target: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in target._schema.arguments]


def refuse(target: Any) -> None:
    """Raise NotTraceable unless an operation is a deterministic, functional one of torch."""
    if target is operator.getitem:
        return
    if not isinstance(target, torch._ops.OpOverload):
        raise NotTraceable(f"{target} is no operation of torch")
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise NotTraceable(f"{target} draws random numbers")
    if target._schema.is_mutable:
        raise NotTraceable(f"{target} changes a tensor in place")
