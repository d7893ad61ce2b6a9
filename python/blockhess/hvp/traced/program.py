"""A linear program while it is written: a graph of tangents, with what does not depend on them in a graph of constants.

A tangent that is not written out is a combination sum_i c_i * t_i with constant c_i; elementwise operations only change
the c_i. Equal calls are one node.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from blockhess.hvp.traced.operations import RESHAPED, SAME, SHAPE_ONLY, VIEWS, NotTraceable, aten, refuse

# A sum of more tangents than this is written out, so that what uses it does not add them all again.
MOST_TERMS = 3


def is_node(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node)


def same_call_key(value: Any) -> Any:
    """What makes two arguments the same; 1, 1.0 and True are not."""
    if isinstance(value, (list, tuple)):
        return tuple(map(same_call_key, value))
    if isinstance(value, dict):
        return tuple((name, same_call_key(item)) for name, item in sorted(value.items()))
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


class Builder:
    """An fx graph under construction in which equal calls are one node, each with its fake value."""

    def __init__(self, fakes: FakeTensorMode) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self.fakes = fakes
        self._calls: dict[Any, fx.Node] = {}

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, like: Any = None) -> fx.Node:
        """The node of this call; `like` is its fake value where that is known."""
        kwargs = kwargs or {}
        key = (target, same_call_key(args), same_call_key(kwargs))
        if key not in self._calls:
            node = self.graph.call_function(target, tuple(args), kwargs)
            node.meta["val"] = self._value(node) if like is None else like
            self._calls[key] = node
        return self._calls[key]

    def _value(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        target: Any = node.target
        with self.fakes:
            return target(*args, **kwargs)

    def contiguous(self, x: Tensor) -> Tensor:
        """A fake of the same shape."""
        with self.fakes:
            return torch.empty(x.shape, dtype=x.dtype, device=x.device)

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
        node.meta["val"] = self.fakes.from_tensor(value) if isinstance(value, Tensor) else value
        self._calls[name] = node
        return node


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


class Lines:
    """The program of one block while it is written."""

    def __init__(self, constants: Builder) -> None:
        self._constants = constants
        self._lines = Builder(constants.fakes)
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._tangents: list[fx.Node] = []

    def input(self, value: Tensor) -> Combination:
        node = self._lines.placeholder(f"tangent_{len(self._tangents)}", self._lines.contiguous(value))
        self._tangents.append(node)
        return self._of(node)

    @staticmethod
    def _of(node: fx.Node) -> Combination:
        value = node.meta["val"]
        return Combination(((node, 1.0),), value.shape, value.dtype)

    def _import(self, value: Any) -> Any:
        """A constant as an input of this program."""
        if not is_node(value):
            return value
        if value not in self._inputs:
            name = f"c_{len(self._inputs)}"
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
            return self._constants.call(
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
            if is_node(coefficient):
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
                if not is_node(value):
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
        if not is_node(a) and not is_node(b):
            return float(a) * float(b)
        if not is_node(b):
            return a if b == 1 else self._constants.call(aten.mul.Tensor, (a, float(b)))
        if not is_node(a):
            return b if a == 1 else self._constants.call(aten.mul.Tensor, (b, float(a)))
        return self._constants.call(aten.mul.Tensor, (a, b))

    def _sum(self, coefficients: list[Any]) -> Any:
        total = coefficients[0]
        for c in coefficients[1:]:
            if not is_node(total) and not is_node(c):
                total = total + c
            elif is_node(total):
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
            if not is_node(c):  # a number goes through any linear operation, to be folded into the next constant
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
        terms = sorted(combination.terms, key=lambda term: (is_node(term[1]), term[1] != 1.0))
        total: fx.Node | None = None
        for base, coefficient in terms:
            c = self._import(coefficient)
            if total is None:
                total = base if c == 1.0 else self._lines.call(aten.mul.Tensor, (base, c))
            elif is_node(c):
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
        if node.target in _IN_PLACE and is_node(node.args[0]):
            first = node.args[0]
            fresh = first.target in _FRESH and len(first.users) == 1 and first not in node.args[1:]
            if fresh and first.meta["val"].shape == node.meta["val"].shape:
                node.target = _IN_PLACE[node.target]
    return graph
