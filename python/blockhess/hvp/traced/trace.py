"""The gradient of a loss as a graph of tensor operations, which stops gradients where autograd stops them.

Promises: every operation is functional and one of torch.ops; what the trace cannot hold, such as random numbers,
control flow that depends on its inputs or derivatives that a torch.autograd.Function makes up, is refused by name.
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

# Operations whose tangent is better taken whole, not from their parts.
_KEPT_WHOLE = (
    aten.embedding_dense_backward.default,
    aten._softmax.default,
    aten._log_softmax.default,
    aten._safe_softmax.default,
    aten.gelu.default,
    aten.gelu_backward.default,
    aten.silu.default,
)


# Operations taken apart although torch counts them as basic: their statistics' tangents serve the backward pass too.
_TAKEN_APART = (
    aten.native_layer_norm,
    aten.native_layer_norm_backward,
    aten.native_group_norm,
    aten.native_group_norm_backward,
    aten.native_batch_norm,
    aten.native_batch_norm_backward,
    aten.cudnn_batch_norm,
    aten.cudnn_batch_norm_backward,
)


def _decompositions() -> dict[Any, Callable[..., Any]]:
    table = dict(core_aten_decompositions()) | get_decompositions(_TAKEN_APART)
    for kept in _KEPT_WHOLE:
        table.pop(kept, None)
    return table


# By-products that autograd does not differentiate by themselves: the backward passes they are saved for do.
_STATISTICS = {"mean", "rstd", "save_mean", "save_invstd", "save_var", "buffer"}


class _AsAutogradSees(TorchDispatchMode):
    """Lets a trace tell where gradients stop: at detach(), no_grad(), .data and new leaves.

    The parameters must not be leaves. What an autograd.Function computes is refused, since its derivative is whatever
    its backward says.
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
        # What is saved for the backward pass is detached in between; the others do not compute.
        if func is aten.detach.default or func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
            return func(*args, **kwargs)
        if func is aten.copy_.default:  # what it overwrites does not matter
            return func(args[0], self._seen(args[1]), *args[2:], **kwargs)
        if self._values and in_place and not _is_traced(args[0]):
            with disable_proxy_modes_tracing():
                leaves[0] = args[0].detach().clone()  # a constant of the trace, which must keep its value
        kept = {i for i, a in enumerate(func._schema.arguments) if a.name in _STATISTICS and "backward" in func.name()}
        seen = [leaf if any(leaf is args[i] for i in kept) else self._seen(leaf) for leaf in leaves]
        seen_args, seen_kwargs = tree_unflatten(seen, spec)
        results = target(*seen_args, **seen_kwargs)
        if in_place:
            self._without_graph.pop(args[0], None)
            return aten.copy_.default(args[0], results)
        if not torch.is_grad_enabled():
            for result in tree_flatten(results)[0]:
                if isinstance(result, Tensor):
                    self._without_graph[result] = True
        return results

    def _seen(self, value: Any) -> Any:
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
    """The graph of `gradient(parameters, batch)`, every operation a functional one of torch.ops.

    Args:
        gradient: differentiates with create_graph=True.
        values: whether numbers are computed on the way, so that the gradient may look at what is no input.

    Raises:
        NotTraceable: the gradient draws random numbers, changes tensors in place, has control flow that depends on
            its inputs' values or a torch.autograd.Function.
    """

    def seen(parameters: list[Tensor], batch: Any) -> Any:
        tracked = [p.detach().requires_grad_().view_as(p) for p in parameters]
        with _AsAutogradSees(values):
            return gradient(tracked, batch)

    mode: Any = {} if values else {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    try:
        traced = make_fx(seen, decomposition_table=_decompositions(), **mode)(parameters, batch)
    except NotTraceable:
        raise
    except Exception as error:  # the same gradient could be computed without a trace
        raise NotTraceable(
            f"the gradient cannot be traced: {(str(error).strip() or repr(error)).splitlines()[0]}"
        ) from error
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
    """A constant that was written while values were computed has lost the value that it had for those who read it."""
    memory = {
        n: getattr(traced, n.target).untyped_storage().data_ptr() for n in traced.graph.nodes if n.op == "get_attr"
    }
    for node in traced.graph.nodes:
        if node.op == "call_function" and functional(node.target)[1] and node.args[0] in memory:
            others = [n for n, at in memory.items() if at == memory[node.args[0]]]
            if any(user is not node for other in others for user in other.users):
                raise NotTraceable(f"{node.target} changes in place what the gradient reads elsewhere")


def _without_strides(graph: fx.Graph) -> None:
    """No operation reads memory in an order that other tensors of the same shape need not have."""
    for node in graph.find_nodes(op="call_function", target=aten.as_strided.default):
        (source, size), before, after = node.args[:2], node.args[0].meta["val"], node.meta["val"]
        whole = before.is_contiguous() and after.is_contiguous() and before.numel() == after.numel()
        if not whole or before.storage_offset() != after.storage_offset():
            raise NotTraceable(f"{node.target} depends on how a tensor lies in memory")
        node.target, node.args = aten.reshape.default, (source, size)


def make_functional(graph: fx.Graph) -> None:
    """Operations that write into a whole tensor become ones that return it, and who reads it later reads that."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target, in_place = functional(node.target) if node.op == "call_function" else (node.target, False)
        if in_place:
            written = node.args[0]
            # What shares its memory would have to change as well.
            moves = torch.Tag.inplace_view not in node.target.tags
            if moves and any(order[user] > order[node] for other in _sharing(written) for user in other.users):
                raise NotTraceable(f"{node.target} changes part of a tensor in place")
            node.target = target
            written.replace_all_uses_with(node, delete_user_cb=lambda user, now=order[node]: order[user] > now)


def _sharing(node: fx.Node) -> Iterator[fx.Node]:
    """Other nodes that may share memory with this one; parts of one split do not."""
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
    """Whether a node's value may be a view of its first argument."""
    if node.target is operator.getitem or node.target in SPLITS:
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
