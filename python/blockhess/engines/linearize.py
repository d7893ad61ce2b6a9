"""Hessian-vector products as linear programs: the derivative of a traced gradient, with all that can be known folded.

    P : w -> dL/dw            the gradient of one batch, traced once into a graph of tensor operations
    v -> dP_l/dw_l v          per block, node by node the tangent of P: a graph that is linear in v

Only nodes between w_l and its gradient take part. What does not depend on v (activations, second derivatives of
nonlinearities, masks, softmax outputs) goes into one graph of constants that all blocks share, equal expressions
once; it is evaluated once a batch. A chain of elementwise operations on tangents is linear and diagonal, so it
collapses into sum_i c_i * t_i with constant c_i: what is left of a block's program are matrix products, a few
reductions and one multiply-add per operand.

Promises: a program reads its constants and never writes; the same model and batch give the same graphs.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import jvp
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, get_proxy_mode, has_proxy_slot, make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

aten = torch.ops.aten

_DYNAMIC = torch.Tag.dynamic_output_shape

# A sum of more tangents than this is written out, so that what uses it does not add them all again.
MOST_TERMS = 3


class NotTraceable(NotImplementedError):
    """The gradient of this model cannot be turned into a linear program; the text says what stands in the way."""


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


_trace_ops = torch.library.Library("blockhess_trace", "DEF")
_trace_ops.define("constant(Tensor(a) x) -> Tensor(a)")
_trace_ops.impl("constant", aten.alias.default, "CompositeExplicitAutograd")
# Marks in a trace what autograd takes as a constant, whatever it was computed from.
_CONSTANT = torch.ops.blockhess_trace.constant.default


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
        target, in_place = _functional(func)
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
            return _CONSTANT(value)
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
    _make_functional(traced.graph)
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
        if node.op == "call_function" and _functional(node.target)[1] and node.args[0] in memory:
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


def _make_functional(graph: fx.Graph) -> None:
    """Operations that write into a whole tensor become ones that return it, and who reads it later reads that."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        target, in_place = _functional(node.target) if node.op == "call_function" else (node.target, False)
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
        split = node.target is operator.getitem and parent.target in _SPLITS
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
    if node.target is operator.getitem or node.target in _SPLITS:
        return True
    returns = node.target._schema.returns if isinstance(node.target, torch._ops.OpOverload) else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


# Tangents


def _softmax_tangent(y: Tensor, t: Tensor, dim: int) -> Tensor:
    return y * (t - (y * t).sum(dim, keepdim=True))


def _rule_softmax(x: Tensor, dim: int, half_to_float: bool, *, t: Tensor) -> Tensor:
    return _softmax_tangent(aten._softmax.default(x, dim, half_to_float), t, dim)


def _rule_safe_softmax(x: Tensor, dim: int, dtype: torch.dtype | None = None, *, t: Tensor) -> Tensor:
    return _softmax_tangent(aten._safe_softmax.default(x, dim, dtype), t, dim)


def _rule_log_softmax(x: Tensor, dim: int, half_to_float: bool, *, t: Tensor) -> Tensor:
    y = aten._log_softmax.default(x, dim, half_to_float)
    tangent: Tensor = t - (aten.exp.default(y) * t).sum(dim, keepdim=True)
    return tangent


# Shorter than what forward differentiation gives: the tangent of op(x, ...) for the tangent t of x.
_RULES: dict[Any, Callable[..., Tensor]] = {
    aten._softmax.default: _rule_softmax,
    aten._safe_softmax.default: _rule_safe_softmax,
    aten._log_softmax.default: _rule_log_softmax,
}


def _is_node(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node)


def _key(value: Any) -> Any:
    """What makes two arguments the same; 1, 1.0 and True are not."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in sorted(value.items()))
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


class _Builder:
    """An fx graph under construction in which equal calls are one node, each with its fake value."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self._fakes = fakes
        self._calls: dict[Any, fx.Node] = {}

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, like: Any = None) -> fx.Node:
        """The node of this call; `like` is its fake value where that is known."""
        kwargs = kwargs or {}
        key = (target, _key(args), _key(kwargs))
        if key not in self._calls:
            node = self.graph.call_function(target, tuple(args), kwargs)
            node.meta["val"] = self._value(node) if like is None else like
            self._calls[key] = node
        return self._calls[key]

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        with self._fakes:
            return target(*args, **kwargs)

    def placeholder(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def attribute(self, value: Tensor) -> fx.Node:
        for name, known in self.attributes.items():
            if known is value:
                return self._calls[name]
        name = f"constant_{len(self.attributes)}"
        self.attributes[name] = value
        node = self.graph.get_attr(name)
        node.meta["val"] = self._fakes.from_tensor(value) if isinstance(value, Tensor) else value
        self._calls[name] = node
        return node


@dataclass(frozen=True)
class _Template:
    """The tangents of one operation: a graph of primals and input tangents, which `linear` marks depend on."""

    graph: fx.Graph
    attributes: dict[str, Tensor]
    primals: tuple[fx.Node, ...]
    tangents: tuple[fx.Node, ...]
    linear: frozenset[fx.Node]
    outputs: tuple[fx.Node | None, ...]  # per output of the operation


@dataclass(frozen=True)
class Combination:
    """sum_i coefficient_i * base_i, broadcast to `shape`: a tangent that is not written out."""

    terms: tuple[tuple[fx.Node, fx.Node | float], ...]
    shape: torch.Size
    dtype: torch.dtype


@dataclass
class Program:
    """The Hessian of some parameters as a graph: tangents of the parameters and constants in, products out.

    Attributes:
        parameters: indices of the parameters, in the order of the tangents.
        graph: placeholders are one tangent per parameter, then the constants.
        constants: nodes of the graph of constants, in the order of the placeholders.
        live: per parameter, whether its products are not identically zero.
    """

    parameters: tuple[int, ...]
    graph: fx.Graph
    constants: list[fx.Node] = field(default_factory=list)
    live: tuple[bool, ...] = ()


_SAME = {aten.alias.default, aten.detach.default, aten.clone.default, aten.lift_fresh_copy.default, _CONSTANT}
_RESHAPED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
_VIEWS = {
    aten.reshape.default,
    aten.permute.default,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
    aten.select.int,
}
_SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.unbind.int, aten.unsafe_split.Tensor}
_SPLITS |= {aten.chunk.default, aten.unsafe_chunk.default}

# Their values do not depend on their argument's.
_SHAPE_ONLY = {
    aten.zeros_like.default: 0.0,
    aten.new_zeros.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.empty_like.default: 0.0,
    aten.new_empty.default: 0.0,
    aten._new_zeros_with_same_feature_meta.default: 0.0,
}


# A sum may be formed in a tensor that nothing else uses.
_IN_PLACE = {aten.addcmul.default: aten.addcmul_.default, aten.add.Tensor: aten.add_.Tensor}
_FRESH = {aten.mul.Tensor, *_IN_PLACE, *_IN_PLACE.values(), aten.mm.default, aten.bmm.default}


class Linearizer:
    """Makes the programs of one traced gradient.

    Args:
        traced: from `trace_gradient`, of a function of (parameters, batch).
        num_parameters: how many of the placeholders are parameters; the others are the batch's tensors.
        gradients: the number among the outputs of each parameter's gradient, None where it has none.
    """

    def __init__(self, traced: fx.GraphModule, num_parameters: int, gradients: Sequence[int | None]) -> None:
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self.constants = _Builder(self._fakes)
        self._templates: dict[Any, _Template] = {}
        self._nodes = [n for n in traced.graph.nodes if n.op != "output"]
        (outputs,) = next(n.args for n in reversed(traced.graph.nodes) if n.op == "output")
        flat, _ = tree_flatten(outputs)
        self.outputs = flat
        self._gradient = [None if index is None else flat[index] for index in gradients]
        self._primal: dict[fx.Node, Any] = {}
        self._copy(traced)
        self.placeholders = [n for n in self.constants.graph.nodes if n.op == "placeholder"]
        self._parameters = [n for n in self._nodes if n.op == "placeholder"][:num_parameters]
        self._below = self._reach(self._nodes, {n: 1 << i for i, n in enumerate(self._parameters)}, forward=True)
        ends: dict[fx.Node, int] = {}
        for i, node in enumerate(self._gradient):
            if _is_node(node):
                ends[node] = ends.get(node, 0) | 1 << i
        self._above = self._reach(self._nodes, ends, forward=False)

    def _copy(self, traced: fx.GraphModule) -> None:
        """P itself into the graph of constants, so that what tangents need of it is found there."""
        for node in self._nodes:
            if node.op == "placeholder":
                self._primal[node] = self.constants.placeholder(node.name, self._empty(node.meta["val"]))
            elif node.op == "get_attr":
                self._primal[node] = self.constants.attribute(getattr(traced, node.target))
            else:
                args, kwargs = self._mapped(node, self._primal)
                like = tree_map(self._empty, node.meta["val"]) if _DYNAMIC in getattr(node.target, "tags", ()) else None
                self._primal[node] = self._constant(node.target, args, kwargs, like)

    def _empty(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        with self._fakes:
            return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)

    def _mapped(self, node: fx.Node, values: dict[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return fx.node.map_arg(node.args, values.__getitem__), fx.node.map_arg(node.kwargs, values.__getitem__)

    def _constant(self, target: Any, args: Any, kwargs: Any, like: Any = None) -> Any:
        """A call whose arguments are constants."""
        if target in _SAME:
            return args[0]
        target = _RESHAPED.get(target, target)
        _refuse(target)
        return self.constants.call(target, args, kwargs, like)

    @staticmethod
    def _reach(nodes: list[fx.Node], ends: dict[fx.Node, int], forward: bool) -> dict[fx.Node, int]:
        """Bit i of a node: it lies below (above) the i-th end."""
        bits = dict.fromkeys(nodes, 0) | ends
        for node in nodes if forward else reversed(nodes):
            for other in node.all_input_nodes:
                if forward:
                    bits[node] |= bits[other]
                elif other in bits:
                    bits[other] |= bits[node]
        return bits

    # One block

    def program(self, parameters: Sequence[int]) -> Program:
        """The products of the Hessian of these parameters (indices), all other parameters held fixed."""
        mask = sum(1 << i for i in parameters)
        lines = _Lines(self)
        tangents: dict[fx.Node, Any] = {}
        for i in parameters:
            tangents[self._parameters[i]] = lines.input(self._parameters[i].meta["val"])
        for node in self._nodes:
            if node in tangents or node.op != "call_function" or not self._below[node] & mask & -1:
                continue
            if not (self._above[node] & mask):
                continue
            tangents[node] = self._tangent(node, tangents, lines)
            value = tangents[node]
            if isinstance(value, Combination) and len(value.terms) > 1:
                users = [u for u in node.users if self._above.get(u, 0) & mask]
                if len(users) > 1:
                    tangents[node] = lines.written(value)
        ends = [self._gradient[i] for i in parameters]
        return lines.finish(tuple(parameters), [tangents.get(end) if _is_node(end) else None for end in ends])

    def _tangent(self, node: fx.Node, tangents: dict[fx.Node, Any], lines: _Lines) -> Any:
        given: Any = node.args
        if node.target is operator.getitem:
            whole = tangents.get(given[0])
            return None if whole is None else whole[given[1]]
        leaves, spec = tree_flatten((given, dict(node.kwargs)))
        positions = [i for i, leaf in enumerate(leaves) if _is_node(leaf) and tangents.get(leaf) is not None]
        if not positions:
            return None
        target = node.target
        if target is _CONSTANT:
            return None
        if target in _SAME:
            return tangents[given[0]]
        if target is aten.copy.default:  # all of the first argument is overwritten
            like, source = self._primal[node].meta["val"], tangents.get(given[1])
            return None if source is None else Combination(source.terms, like.shape, like.dtype)
        primals = [self._primal[leaf] if _is_node(leaf) else leaf for leaf in leaves]
        inputs = [tangents[leaves[i]] for i in positions]
        template = self._template(target, primals, spec, positions)
        results = self._inline(template, [p for p in primals if _is_node(p)], inputs, lines)
        return results if isinstance(self._primal[node].meta["val"], (tuple, list)) else results[0]

    def _template(self, target: Any, leaves: list[Any], spec: Any, positions: list[int]) -> _Template:
        def described(leaf: Any) -> Any:
            if not _is_node(leaf):
                return _key(leaf)
            val = leaf.meta["val"]
            return (tuple(val.shape), val.dtype, str(val.device)) if isinstance(val, Tensor) else None

        key = (target, tuple(map(described, leaves)), str(spec), tuple(positions))
        if key not in self._templates:
            self._templates[key] = self._trace_tangent(target, leaves, spec, positions)
        return self._templates[key]

    def _trace_tangent(self, target: Any, leaves: list[Any], spec: Any, positions: list[int]) -> _Template:
        target = _RESHAPED.get(target, target)
        where = [i for i, leaf in enumerate(leaves) if _is_node(leaf)]
        rule = _RULES.get(target)

        def tangent(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor | None]:
            def full(moved: Sequence[Tensor]) -> tuple[Any, Any]:
                values = list(leaves)
                for i, primal in zip(where, primals):
                    values[i] = primal
                for i, value in zip(positions, moved):
                    values[i] = value
                return tree_unflatten(values, spec)  # type: ignore[no-any-return]

            if rule is not None and positions == [0]:
                args, kwargs = full([])
                return [rule(*args, **kwargs, t=tangents[0])]

            kinds: list[bool] = []

            def run(*moved: Tensor) -> list[Tensor]:
                args, kwargs = full(moved)
                out = target(*args, **kwargs)
                outs = list(out) if isinstance(out, (tuple, list)) else [out]
                if any(isinstance(o, Tensor) and o.is_complex() for o in outs):
                    raise NotTraceable(f"{target} computes with complex numbers")
                kinds[:] = [isinstance(o, Tensor) and o.is_floating_point() for o in outs]
                return [o for o, kind in zip(outs, kinds) if kind]

            if not run(*(primals[where.index(i)] for i in positions)):
                return [None] * len(kinds)
            moved: Any = jvp(run, tuple(primals[where.index(i)] for i in positions), tuple(tangents))[1]
            found = iter(moved)
            return [next(found) if kind else None for kind in kinds]

        primals = [self._empty(leaves[i].meta["val"]) for i in where]
        tangents = [self._contiguous(leaves[i].meta["val"]) for i in positions]
        shape: list[bool] = []

        def flat(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
            results = tangent(primals, tangents)
            shape[:] = [r is not None for r in results]
            return [r for r in results if r is not None]

        try:
            with self._fakes:
                traced = make_fx(flat, decomposition_table={})(primals, tangents)
            _make_functional(traced.graph)
        except NotTraceable:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise NotTraceable(f"{target} has no tangent: {str(error).splitlines()[0]}") from error
        traced.graph.eliminate_dead_code()
        nodes = list(traced.graph.nodes)
        inputs = [n for n in nodes if n.op == "placeholder"]
        linear = set(inputs[len(where) :])
        for node in nodes:
            if node.op == "call_function" and any(n in linear for n in node.all_input_nodes):
                linear.add(node)
        (returned,) = nodes[-1].args
        found = iter(returned)
        outputs = tuple(next(found) if some else None for some in shape)
        attributes = {n.target: getattr(traced, n.target) for n in nodes if n.op == "get_attr"}
        return _Template(
            traced.graph,
            attributes,
            tuple(inputs[: len(where)]),
            tuple(inputs[len(where) :]),
            frozenset(linear),
            outputs,
        )

    def _contiguous(self, x: Tensor) -> Tensor:
        with self._fakes:
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def _inline(
        self, template: _Template, primals: list[fx.Node], tangents: list[Combination], lines: _Lines
    ) -> list[Combination | None]:
        values: dict[fx.Node, Any] = dict(zip(template.primals, primals)) | dict(zip(template.tangents, tangents))
        for node in template.graph.nodes:
            if node.op == "get_attr":
                value = template.attributes[node.target]
                if isinstance(value, FakeTensor):
                    raise NotTraceable("an operation's tangent holds a tensor of the trace")
                values[node] = self.constants.attribute(value)
            elif node.op == "call_function":
                args, kwargs = self._mapped(node, values)
                if node in template.linear:
                    values[node] = lines.call(node.target, args, kwargs, node.meta["val"])
                else:
                    values[node] = self._constant(node.target, args, kwargs, node.meta["val"])
        results: list[Combination | None] = []
        for out in template.outputs:
            tangent = values.get(out) if out is not None else None
            results.append(tangent if isinstance(tangent, Combination) and tangent.terms else None)
        return results


class _Lines:
    """The program of one block while it is written."""

    def __init__(self, owner: Linearizer) -> None:
        self._owner = owner
        self._constants = owner.constants
        self._lines = _Builder(owner._fakes)
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._tangents: list[fx.Node] = []

    def input(self, value: Tensor) -> Combination:
        node = self._lines.placeholder(f"tangent_{len(self._tangents)}", self._owner._contiguous(value))
        self._tangents.append(node)
        return self._of(node)

    @staticmethod
    def _of(node: fx.Node) -> Combination:
        value = node.meta["val"]
        return Combination(((node, 1.0),), value.shape, value.dtype)

    def _import(self, value: Any) -> Any:
        """A constant as an input of this program."""
        if not _is_node(value):
            return value
        if value not in self._inputs:
            name = f"c_{len(self._inputs)}"
            node = fx.Node(self._lines.graph, name, "placeholder", name, (), {})
            node = self._lines.placeholder(name, value.meta["val"])
            self._inputs[value] = node
        return self._inputs[value]

    def call(self, target: Any, args: Any, kwargs: Any, like: Any) -> Any:
        """target(*args), some of them Combinations, linear in these together; `like` has the shape of the result."""
        if target in _SAME or (target is aten._to_copy.default and args[0].dtype == like.dtype):
            return args[0]
        if target is aten.copy.default and isinstance(args[1], Combination):
            return Combination(args[1].terms, like.shape, like.dtype)
        if target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple) else self._emit(target, args, kwargs, like)
        target = _RESHAPED.get(target, target)
        if target in _SHAPE_ONLY:
            fill = _SHAPE_ONLY[target]
            return self._owner.constants.call(
                aten.full.default, (list(like.shape), fill), {"dtype": like.dtype, "device": like.device}
            )
        if target in _VIEWS and isinstance(args[0], Combination):
            return self._view(target, args, kwargs, like)
        if target is aten.expand.default:
            return Combination(args[0].terms, like.shape, like.dtype)
        if target is aten.as_strided.default:
            raise NotTraceable(f"{target} depends on how a tensor lies in memory")
        if isinstance(like, Tensor) and torch.Tag.pointwise in target.tags:
            return self._pointwise(target, args, kwargs, like)
        return self._emit(target, args, kwargs, like)

    def _view(self, target: Any, args: Any, kwargs: Any, like: Tensor) -> Combination:
        combination = args[0]
        terms = []
        for base, coefficient in combination.terms:
            if base.meta["val"].shape != combination.shape:
                base = self._lines.call(aten.expand.default, (base, list(combination.shape)))
            if _is_node(coefficient):
                if coefficient.meta["val"].shape != combination.shape:
                    coefficient = self._constants.call(aten.expand.default, (coefficient, list(combination.shape)))
                coefficient = self._constants.call(target, (coefficient, *args[1:]), kwargs, like)
            terms.append((self._lines.call(target, (base, *args[1:]), kwargs, like), coefficient))
        return Combination(tuple(terms), like.shape, combination.dtype)

    def _pointwise(self, target: Any, args: Any, kwargs: Any, like: Tensor) -> Combination:
        leaves, spec = tree_flatten((args, kwargs))
        terms: dict[fx.Node, list[fx.Node | float]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Combination):
                for base, coefficient in leaf.terms:
                    new = self._coefficient(target, leaves, spec, i, coefficient)
                    terms.setdefault(base, []).append(new)
        joined = tuple((base, self._sum(coefficients)) for base, coefficients in terms.items())
        result = Combination(joined, like.shape, like.dtype)
        return self.written(result) if len(joined) > MOST_TERMS else result

    def _coefficient(self, target: Any, leaves: list[Any], spec: Any, i: int, c: fx.Node | float) -> fx.Node | float:
        """The coefficient after an elementwise operation: the operation applied to c, all other tangents zero."""
        if target in (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.neg.default, aten._to_copy.default):
            args, kwargs = tree_unflatten(leaves, spec)
            sign = -1.0 if target is aten.neg.default else 1.0
            alpha = kwargs.get("alpha", 1)
            if (target is aten.sub.Tensor and i == 1) or (target is aten.rsub.Tensor and i == 0):
                sign = -float(alpha)
            elif target is aten.add.Tensor and i == 1:
                sign = float(alpha)
            return c if sign == 1 else self._times(c, sign)
        if target in (aten.mul.Tensor, aten.mul.Scalar) and not isinstance(leaves[1 - i], Combination):
            return self._times(c, leaves[1 - i])
        if target in (aten.div.Tensor, aten.div.Scalar) and isinstance(leaves[1], (int, float)) and len(leaves) == 2:
            return self._times(c, 1.0 / leaves[1])
        values = []
        for j, leaf in enumerate(leaves):
            if isinstance(leaf, Combination):
                # Some elementwise operations want tensors of one shape: no scalars, nothing to broadcast.
                value: Any = c if j == i else 0.0
                if not _is_node(value):
                    value = self._full(leaf, value)
                elif value.meta["val"].shape != leaf.shape:
                    value = self._constants.call(aten.expand.default, (value, list(leaf.shape)))
                values.append(value)
            else:
                values.append(leaf)
        args, kwargs = tree_unflatten(values, spec)
        return self._constants.call(target, args, kwargs)

    def _full(self, like: Combination, value: float) -> fx.Node:
        device = self._tangents[0].meta["val"].device
        return self._constants.call(
            aten.full.default, (list(like.shape), value), {"dtype": like.dtype, "device": device}
        )

    def _times(self, a: Any, b: Any) -> fx.Node | float:
        if not _is_node(a) and not _is_node(b):
            return float(a) * float(b)
        if not _is_node(b):
            return a if b == 1 else self._constants.call(aten.mul.Tensor, (a, float(b)))
        if not _is_node(a):
            return b if a == 1 else self._constants.call(aten.mul.Tensor, (b, float(a)))
        return self._constants.call(aten.mul.Tensor, (a, b))

    def _sum(self, coefficients: list[Any]) -> Any:
        total = coefficients[0]
        for c in coefficients[1:]:
            if not _is_node(total) and not _is_node(c):
                total = total + c
            elif _is_node(total):
                total = self._constants.call(aten.add.Tensor, (total, c))
            else:
                total = self._constants.call(aten.add.Tensor, (c, total))
        return total

    def _emit(self, target: Any, args: Any, kwargs: Any, like: Any) -> Any:
        _refuse(target)
        leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Combination))
        moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Combination)]
        factor = 1.0
        if len(moving) == 1 and len(leaves[moving[0]].terms) == 1 and isinstance(like, Tensor):
            ((base, c),) = leaves[moving[0]].terms
            if not _is_node(c):  # a number goes through any linear operation, to be folded into the next constant
                factor, leaves[moving[0]] = c, replace(leaves[moving[0]], terms=((base, 1.0),))

        def real(value: Any) -> Any:
            return self._node(value) if isinstance(value, Combination) else self._import(value)

        args, kwargs = tree_unflatten([real(leaf) for leaf in leaves], spec)
        node = self._lines.call(target, args, kwargs, like)
        if isinstance(node.meta["val"], (tuple, list)):
            parts = []
            for i, value in enumerate(node.meta["val"]):
                parts.append(
                    self._of(self._lines.call(operator.getitem, (node, i))) if isinstance(value, Tensor) else None
                )
            return tuple(parts)
        return Combination(((node, factor),), node.meta["val"].shape, node.meta["val"].dtype)

    def written(self, combination: Combination) -> Combination:
        return self._of(self._node(combination))

    def _node(self, combination: Combination) -> fx.Node:
        """The combination as one tensor."""
        terms = sorted(combination.terms, key=lambda term: (_is_node(term[1]), term[1] != 1.0))
        total: fx.Node | None = None
        for base, coefficient in terms:
            c = self._import(coefficient)
            if total is None:
                total = base if c == 1.0 else self._lines.call(aten.mul.Tensor, (base, c))
            elif _is_node(c):
                total = self._lines.call(aten.addcmul.default, (total, base, c))
            else:
                total = self._lines.call(aten.add.Tensor, (total, base), {} if c == 1.0 else {"alpha": c})
        assert total is not None
        if total.meta["val"].dtype != combination.dtype:
            total = self._lines.call(aten._to_copy.default, (total,), {"dtype": combination.dtype})
        if total.meta["val"].shape != combination.shape:
            total = self._lines.call(aten.expand.default, (total, list(combination.shape)))
        return total

    def finish(self, parameters: tuple[int, ...], results: list[Combination | None]) -> Program:
        graph = self._lines.graph
        graph.output([None if r is None else self._node(r) for r in results])
        graph.eliminate_dead_code()
        used = [(c, n) for c, n in self._inputs.items() if n.users]
        ordered = _with_inputs_first(graph, self._tangents + [n for _, n in used])
        return Program(parameters, ordered, [c for c, _ in used], tuple(r is not None for r in results))


def _with_inputs_first(graph: fx.Graph, inputs: list[fx.Node]) -> fx.Graph:
    """The same graph, with just these placeholders, in this order, at its beginning."""
    ordered = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: ordered.node_copy(n) for n in inputs}
    for node in graph.nodes:
        if node.op != "placeholder":
            copies[node] = ordered.node_copy(node, copies.__getitem__)
    return ordered


def accumulate_in_place(graph: fx.Graph) -> fx.Graph:
    """The graph with sums formed in tensors that nothing else uses."""
    for node in graph.nodes:
        if node.target in _IN_PLACE and _is_node(node.args[0]):
            first = node.args[0]
            fresh = first.target in _FRESH and len(first.users) == 1 and first not in node.args[1:]
            if fresh and first.meta["val"].shape == node.meta["val"].shape:
                node.target = _IN_PLACE[node.target]
    return graph


def _functional(target: Any) -> tuple[Any, bool]:
    """The operation that returns what an in-place one would write, and whether it was one."""
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


def _refuse(target: Any) -> None:
    if target is operator.getitem:
        return
    if not isinstance(target, torch._ops.OpOverload):
        raise NotTraceable(f"{target} is no operation of torch")
    if torch.Tag.nondeterministic_seeded in target.tags:
        raise NotTraceable(f"{target} draws random numbers")
    if target._schema.is_mutable:
        raise NotTraceable(f"{target} changes a tensor in place")
