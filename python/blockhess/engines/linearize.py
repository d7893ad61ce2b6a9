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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from blockhess.engines.operations import (
    CONSTANT,
    DYNAMIC,
    RESHAPED,
    SAME,
    SHAPE_ONLY,
    VIEWS,
    NotTraceable,
    aten,
    refuse,
)
from blockhess.engines.trace import make_functional

# A sum of more tangents than this is written out, so that what uses it does not add them all again.
MOST_TERMS = 3


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
        self._gradient = [None if index is None else flat[index] for index in gradients]
        self._primal: dict[fx.Node, Any] = {}
        self._copy(traced)
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
                like = tree_map(self._empty, node.meta["val"]) if DYNAMIC in getattr(node.target, "tags", ()) else None
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
        if target in SAME:
            return args[0]
        target = RESHAPED.get(target, target)
        refuse(target)
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
        if target is CONSTANT:
            return None
        if target in SAME:
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
        target = RESHAPED.get(target, target)
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
            make_functional(traced.graph)
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
        if target in SAME or (target is aten._to_copy.default and args[0].dtype == like.dtype):
            return args[0]
        if target is aten.copy.default and isinstance(args[1], Combination):
            return Combination(args[1].terms, like.shape, like.dtype)
        if target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple) else self._emit(target, args, kwargs, like)
        target = RESHAPED.get(target, target)
        if target in SHAPE_ONLY:
            fill = SHAPE_ONLY[target]
            return self._owner.constants.call(
                aten.full.default, (list(like.shape), fill), {"dtype": like.dtype, "device": like.device}
            )
        if target in VIEWS and isinstance(args[0], Combination):
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
        refuse(target)
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
