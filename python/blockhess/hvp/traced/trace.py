"""Trace of the gradient of a loss: a graph of functional ATen operations, with gradients stopped where autograd does.

NotTraceable names what a trace cannot represent, such as random numbers, control flow that depends on its inputs, or
the custom derivative of a torch.autograd.Function.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from blockhess.hvp.traced.operations import CONSTANT, SPLITS, NotTraceable, TensorInfo, aten, functional
from blockhess.problem.graph import DispatchMode

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


@dataclass(frozen=True)
class Trace:
    """A graph of tensor operations, evaluated node by node.

    Attributes:
        graph: a node's meta["val"] describes its value by a TensorInfo, or a list or tuple of them.
        attributes: tensors that get_attr nodes stand for, by target.
    """

    graph: fx.Graph
    attributes: dict[str, Any]

    @functools.cached_property
    def _last_uses(self) -> dict[fx.Node, list[fx.Node]]:
        """The values that are read for the last time by each node."""
        last = {source: node for node in self.graph.nodes for source in node.all_input_nodes}
        return {node: [n for n in node.all_input_nodes if last[n] is node] for node in self.graph.nodes}

    def __call__(self, *inputs: Any) -> Any:
        values: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self.attributes[node.target]
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                if node.op == "output":
                    return args[0]
                values[node] = node.target(*args, **kwargs)
                for done in self._last_uses[node]:
                    del values[done]
        raise AssertionError("the graph has no output")


class Recorder(DispatchMode):
    """Records operations in a graph.

    Args:
        rules: decompositions by operation.
        stops: mark as CONSTANT the tensors where autograd stops: from detach(), no_grad(), .data and new leaves. The
            parameters must not be leaves. Results of an autograd.Function are refused: its derivative is arbitrary.
        values: evaluate, without recording them, the operations that do not depend on inputs.
    """

    def __init__(self, rules: Mapping[Any, Any], stops: bool, values: bool = False) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.attributes: dict[str, Tensor] = {}
        self._rules, self._values, self._marks = rules, values, stops
        self._nodes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._names: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._without_graph: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def placeholder(self, value: Tensor) -> None:
        """Add an input."""
        self._nodes[value] = node = self.graph.placeholder(f"input_{len(self._nodes)}")
        node.meta["val"] = TensorInfo.of(value)

    def finish(self, outputs: Sequence[Any]) -> Trace:
        """Return the recorded graph in functional operations."""
        self.graph.output(self._mapped(list(outputs)))
        if self._values:
            self._refuse_changed_constants()
        make_functional(self.graph)
        eliminate_dead_code(self.graph)
        used = {node.target for node in self.graph.find_nodes(op="get_attr")}
        return Trace(self.graph, {name: value for name, value in self.attributes.items() if name in used})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if func is aten.detach.default or func is aten.alias.default:  # also of tensors saved for the backward pass
            result = func(*args, **kwargs)
            if self._is_traced(args[0]) or not self._values:
                self._nodes[result] = self._node(args[0])
            return result
        if self._values and not func._schema.is_mutable and not any(map(self._is_traced, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        if self._values and torch.Tag.data_dependent_output in func.tags:
            raise NotTraceable(f"the gradient cannot be traced: {func} reads a value")
        if not self._marks or func.namespace != "aten" or torch.Tag.inplace_view in func.tags:
            return self._call(func, args, kwargs)
        if func is aten.copy_.default:  # its result does not depend on the first argument
            return self._call(func, (args[0], self._stopped(args[1]), *args[2:]), kwargs)
        target, in_place = functional(func)
        leaves, spec = tree_flatten((args, kwargs))
        if self._values and in_place and not self._is_traced(args[0]):
            leaves[0] = args[0].detach().clone()  # a constant of the trace, not to be overwritten
        arguments = func._schema.arguments if "backward" in func.name() else ()
        statistics = [args[i] for i, argument in enumerate(arguments) if argument.name in _STATISTICS]
        operands = [leaf if any(leaf is s for s in statistics) else self._stopped(leaf) for leaf in leaves]
        args_now, kwargs_now = tree_unflatten(operands, spec)
        results = self._call(target, args_now, kwargs_now)
        if in_place:
            self._without_graph.pop(args[0], None)
            return self._call(aten.copy_.default, (args[0], results), {})
        if not torch.is_grad_enabled():
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    self._without_graph[result] = True
        return results

    def _call(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Record an operation, or the operations that it decomposes into."""
        rule = self._rules.get(func)
        if rule is None and _is_composite(func):
            rule = func.decompose
        if rule is None:
            return self._record(func, args, kwargs)
        marks, self._marks = self._marks, False  # autograd knows only the operation as a whole
        try:
            with self:
                return rule(*args, **kwargs)
        finally:
            self._marks = marks

    def _record(self, func: Any, args: Any, kwargs: Any) -> Any:
        results = func(*args, **kwargs)
        tensors = [result for result in tree_leaves(results) if isinstance(result, Tensor)]
        if func._schema.is_mutable and not functional(func)[1]:
            raise NotTraceable(f"{func} changes a tensor in place")
        if not tensors:
            return results
        # The argument of lift_fresh is a new tensor, which may be overwritten.
        target = aten.lift_fresh_copy.default if func is aten.lift_fresh.default else func
        if func is aten.as_strided.default and _is_reshape(args[0], results):
            target, args = aten.reshape.default, args[:2]
        node = self.graph.call_function(target, tuple(self._mapped(args)), self._mapped(kwargs))
        node.meta["val"] = tree_map(_described, results)
        if isinstance(results, Tensor):
            self._nodes[results] = node
        else:
            for i, result in enumerate(results):
                if isinstance(result, Tensor):
                    self._nodes[result] = part = self.graph.call_function(operator.getitem, (node, i))
                    part.meta["val"] = node.meta["val"][i]
        return results

    def _is_traced(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value in self._nodes

    def _mapped(self, value: Any) -> Any:
        """Return arguments with nodes for tensors."""
        if isinstance(value, Tensor):
            return self._node(value)
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return self.graph.get_attr("unknown")  # must not be left in the end
        if isinstance(value, (list, tuple)):
            return [self._mapped(v) for v in value]
        return {name: self._mapped(v) for name, v in value.items()} if isinstance(value, dict) else value

    def _node(self, value: Any) -> fx.Node:
        """Return the node of a tensor; a tensor from elsewhere becomes an attribute."""
        node: fx.Node | None = self._nodes.get(value)
        if node is None:
            name = self._names.setdefault(value, f"constant_{len(self.attributes)}")
            self.attributes[name] = value
            node = self.graph.get_attr(name)
            node.meta["val"] = TensorInfo.of(value)
        return node

    def _stopped(self, value: Any) -> Any:
        """Return the value, marked as CONSTANT if autograd does not differentiate it."""
        if not isinstance(value, Tensor) or not (value.is_floating_point() or value.is_complex()):
            return value
        if not value.requires_grad or value.is_leaf:
            return self._record(CONSTANT, (value,), {})
        if value in self._without_graph:
            raise NotTraceable("a torch.autograd.Function has a derivative of its own")
        if value.grad_fn is not None and "DifferentiableGraph" in value.grad_fn.name():
            raise NotTraceable("TorchScript differentiates a part of the model by itself")
        return value

    def _refuse_changed_constants(self) -> None:
        """Raise NotTraceable if a constant that was overwritten during tracing has other users, who need its value."""
        constants = self.graph.find_nodes(op="get_attr")
        memory = {n: self.attributes[n.target].untyped_storage().data_ptr() for n in constants}
        for node in self.graph.nodes:
            if node.op == "call_function" and functional(node.target)[1] and node.args[0] in memory:
                others = [n for n, at in memory.items() if at == memory[node.args[0]]]
                if any(user is not node for other in others for user in other.users):
                    raise NotTraceable(f"{node.target} changes in place what the gradient reads elsewhere")


def _described(value: Any) -> Any:
    return TensorInfo.of(value) if isinstance(value, Tensor) else value


@functools.cache
def _is_composite(func: Any) -> bool:
    """Return whether an operation that is called below autograd consists of others."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"))


@functools.cache
def _decompositions() -> dict[Any, Any]:
    rules: dict[Any, Any] = dict(core_aten_decompositions()) | get_decompositions(_DECOMPOSED)
    return {operation: rule for operation, rule in rules.items() if operation not in _NOT_DECOMPOSED}


def fake_mode() -> FakeTensorMode:
    """Return a mode in which tensors have shapes, but no values."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # loads SymPy

    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True)


def trace_gradient(
    gradient: Callable[[list[Tensor], list[Tensor]], Sequence[Tensor]],
    parameters: list[Tensor],
    tensors: list[Tensor],
    values: bool,
) -> Trace:
    """Return the graph of `gradient(parameters, tensors)` in functional operations of torch.ops.

    Args:
        gradient: differentiates with create_graph=True.
        parameters, tensors: inputs of the graph.
        values: trace with real instead of fake tensors, so that control flow may depend on other tensors than the
            inputs.

    Raises:
        NotTraceable: the gradient draws random numbers, modifies a view in place, has control flow that depends on
            the values of its inputs, or a torch.autograd.Function.
    """
    fakes = None if values else fake_mode()
    recorder = Recorder(_decompositions(), stops=True, values=values)
    inputs = [x if fakes is None else fakes.from_tensor(x) for x in (*parameters, *tensors)]
    inputs = [x.detach() for x in inputs]
    for i in range(len(parameters)):
        inputs[i] = inputs[i].requires_grad_().view_as(inputs[i])
    for x in inputs:
        recorder.placeholder(x)
    try:
        with fakes or contextlib.nullcontext(), recorder:
            found = gradient(inputs[: len(parameters)], inputs[len(parameters) :])
        traced = recorder.finish(found)
    except NotTraceable:
        raise
    except Exception as error:  # of any kind: the gradient has been computed without a trace before
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise NotTraceable(f"the gradient cannot be traced: {reason}") from error
    for node in traced.graph.nodes:
        if node.target is aten.as_strided.default:
            raise NotTraceable(f"{node.target} depends on how a tensor lies in memory")
        if node.op == "get_attr" and node.target not in traced.attributes:
            raise NotTraceable("a number depends on values")
        for value in tree_leaves(node.meta.get("val")):
            if any(isinstance(size, torch.SymInt) for size in getattr(value, "shape", ())):
                raise NotTraceable(f"the shape that {node.target} returns depends on values")
    return traced


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Remove the nodes without users."""
    for node in reversed(graph.nodes):
        if not node.users and node.op not in ("placeholder", "output"):
            graph.erase_node(node)


def _is_reshape(source: Tensor, result: Tensor) -> bool:
    """Return whether a result of as_strided has the elements of its source in the same order."""
    whole = source.is_contiguous() and result.is_contiguous() and source.numel() == result.numel()
    return whole and source.storage_offset() == result.storage_offset()


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
