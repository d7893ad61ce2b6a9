"""Trace of the gradient of a loss: a graph of functional ATen operations, with gradients stopped where autograd does.

NotTraceable names what a trace cannot represent, such as random numbers, control flow that depends on its inputs, or
the custom derivative of a torch.autograd.Function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, has_proxy_slot, make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from blockhess.hvp.traced.operations import CONSTANT, SPLITS, NotTraceable, aten, functional

# Composite operations that are not decomposed, because their own tangent is cheaper than that of their parts.
_NOT_DECOMPOSED = (
    aten.embedding_dense_backward.default, aten._softmax.default, aten._log_softmax.default,
    aten._safe_softmax.default, aten.gelu.default, aten.gelu_backward.default, aten.silu.default,
)  # fmt: skip

# Core operations that are decomposed nevertheless, so that forward and backward share the tangents of the statistics.
_DECOMPOSED = (
    aten.native_layer_norm, aten.native_layer_norm_backward, aten.native_group_norm, aten.native_group_norm_backward,
    aten.native_batch_norm, aten.native_batch_norm_backward, aten.cudnn_batch_norm, aten.cudnn_batch_norm_backward,
)  # fmt: skip


# Outputs saved for a backward function, which accounts for their derivatives; autograd does not differentiate them.
_STATISTICS = {"mean", "rstd", "save_mean", "save_invstd", "save_var", "buffer"}


class _GradientStops(TorchDispatchMode):
    """Marks as CONSTANT, in a trace, the tensors where autograd stops: from detach(), no_grad(), .data and new leaves.

    The parameters must not be leaves. Results of an autograd.Function are refused, since its derivative is arbitrary.
    """

    def __init__(self, values: bool) -> None:
        super().__init__()
        self._values = values
        self._without_graph: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves, spec = tree_flatten((args, kwargs))
        target, in_place = functional(func)
        if self._values and not func._schema.is_mutable and not any(map(_is_traced, leaves)):
            with disable_proxy_modes_tracing():
                return func(*args, **kwargs)
        # Tensors saved for backward pass through detach; the other operations here compute nothing.
        if func is aten.detach.default or func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        if func is aten.copy_.default:  # its result does not depend on the first argument
            return func(args[0], self._operand(args[1]), *args[2:], **kwargs)
        if self._values and in_place and not _is_traced(args[0]):
            with disable_proxy_modes_tracing():
                leaves[0] = args[0].detach().clone()  # a constant of the trace, not to be overwritten
        arguments = func._schema.arguments if "backward" in func.name() else ()
        statistics = [args[i] for i, argument in enumerate(arguments) if argument.name in _STATISTICS]
        operands = [leaf if any(leaf is s for s in statistics) else self._operand(leaf) for leaf in leaves]
        args_now, kwargs_now = tree_unflatten(operands, spec)
        results = target(*args_now, **kwargs_now)
        if in_place:
            self._without_graph.pop(args[0], None)
            return aten.copy_.default(args[0], results)
        if not torch.is_grad_enabled():
            for result in tree_flatten(results)[0]:
                if isinstance(result, Tensor):
                    self._without_graph[result] = True
        return results

    def _operand(self, value: Any) -> Any:
        """Return the value, marked as CONSTANT if autograd does not differentiate it."""
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        if not value.requires_grad or value.is_leaf:
            return CONSTANT(value)
        if value in self._without_graph:
            raise NotTraceable("a torch.autograd.Function has a derivative of its own")
        return value


def _is_traced(value: Any) -> bool:
    mode = get_proxy_mode()
    return isinstance(value, Tensor) and mode is not None and has_proxy_slot(value, mode.tracer)


def trace_gradient(
    gradient: Callable[[list[Tensor], Any], Any], parameters: list[Tensor], batch: Any, values: bool
) -> fx.GraphModule:
    """Return the graph of `gradient(parameters, batch)` in functional operations of torch.ops.

    Args:
        gradient: differentiates with create_graph=True.
        parameters, batch: inputs of the graph.
        values: trace with real instead of fake tensors, so that control flow may depend on other tensors than the
            inputs.

    Raises:
        NotTraceable: the gradient draws random numbers, modifies a view in place, has control flow that depends on
            the values of its inputs, or a torch.autograd.Function.
    """

    def differentiated(parameters: list[Tensor], batch: Any) -> Any:
        tracked = [p.detach().requires_grad_().view_as(p) for p in parameters]
        with _GradientStops(values):
            return gradient(tracked, batch)

    rules: dict[Any, Any] = dict(core_aten_decompositions()) | get_decompositions(_DECOMPOSED)
    rules = {operation: rule for operation, rule in rules.items() if operation not in _NOT_DECOMPOSED}
    mode: Any = {} if values else {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    try:
        traced = make_fx(differentiated, decomposition_table=rules, **mode)(parameters, batch)
    except NotTraceable:
        raise
    except Exception as error:  # of any kind: the gradient has been computed without a trace before
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise NotTraceable(f"the gradient cannot be traced: {reason}") from error
    if values:
        _refuse_changed_constants(traced)
    make_functional(traced.graph)
    _without_strides(traced.graph)
    traced.graph.eliminate_dead_code()
    for node in traced.graph.nodes:
        for value in tree_flatten(node.meta.get("val"))[0]:
            if any(isinstance(size, torch.SymInt) for size in getattr(value, "shape", ())):
                raise NotTraceable(f"the shape that {node.target} returns depends on values")
    traced.recompile()
    return traced


def _refuse_changed_constants(traced: fx.GraphModule) -> None:
    """Raise NotTraceable if a constant that was overwritten during tracing has other users, who need its old value."""
    constants = traced.graph.find_nodes(op="get_attr")
    memory = {n: getattr(traced, n.target).untyped_storage().data_ptr() for n in constants}
    for node in traced.graph.nodes:
        if node.op == "call_function" and functional(node.target)[1] and node.args[0] in memory:
            others = [n for n, at in memory.items() if at == memory[node.args[0]]]
            if any(user is not node for other in others for user in other.users):
                raise NotTraceable(f"{node.target} changes in place what the gradient reads elsewhere")


def _without_strides(graph: fx.Graph) -> None:
    """Replace as_strided by reshape; raise NotTraceable where the result depends on the strides of the input."""
    for node in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        (source, size), before, after = node.args[:2], node.args[0].meta["val"], node.meta["val"]
        whole = before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel()
        if not whole or before.storage_offset() != after.storage_offset():
            raise NotTraceable(f"{node.target} depends on how a tensor lies in memory")
        node.target, node.args = aten.reshape.default, (source, size)


def make_functional(graph: fx.Graph) -> None:
    """Replace in-place operations by functional ones, and later uses of their argument by their result.

    Raises:
        NotTraceable: another tensor that shares memory with the argument is used later.
    """
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target, in_place = functional(node.target) if node.op == "call_function" else (node.target, False)
        if in_place:
            written = node.args[0]
            writes = torch.Tag.inplace_view not in node.target.tags
            if writes and any(order[user] > order[node] for other in _sharing(written) for user in other.users):
                raise NotTraceable(f"{node.target} changes part of a tensor in place")
            node.target = target
            written.replace_all_uses_with(node, delete_user_cb=lambda user, now=order[node]: order[user] > now)


def _sharing(node: fx.Node) -> Iterator[fx.Node]:
    """Yield the other nodes that may share memory with this one. Parts of one split do not."""
    waiting = [user for user in node.users if _may_share(user)]
    while _may_share(node) and isinstance(node.args[0], fx.Node):
        parent = node.args[0]
        split = node.target is operator.getitem and parent.target in SPLITS
        siblings = [u for u in parent.users if u is not node and _may_share(u)]
        waiting += [u for u in siblings if not split or u.args[1] == node.args[1]]
        yield parent
        node = parent
    while waiting:
        other = waiting.pop()
        yield other
        waiting += [user for user in other.users if _may_share(user)]


def _may_share(node: fx.Node) -> bool:
    """Return whether the value of a node may be a view of its first argument."""
    if node.target is operator.getitem or node.target in SPLITS:
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
