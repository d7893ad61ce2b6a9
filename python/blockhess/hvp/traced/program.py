"""A linear program: a graph that is linear in tangents t, with coefficients from a separate graph of constants.

An elementwise operation is not emitted: it changes the constants c_i of a linear combination sum_i c_i * t_i, which
becomes a tensor only where another operation needs it, by one call of `combine`.

A tangent belongs to a set of blocks, kept as bits: those whose parameters it depends on and whose product depends on
it.
"""

from __future__ import annotations

import functools
import math
import operator
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from blockhess.hvp.traced.operations import (
    RESHAPED,
    SAME,
    SHAPE_ONLY,
    VIEWS,
    Node,
    NotTraceable,
    TensorInfo,
    aten,
    refuse,
)

_INDEXED = {
    aten.index.Tensor, aten._unsafe_index.Tensor, aten.index_put.default, aten._unsafe_index_put.default,
}  # fmt: skip
_MEANS = {aten.mean.dim: aten.sum.dim_IntList, aten.mean.default: aten.sum.default}

# A combination of more terms than this becomes a tensor, so that its users do not repeat the sum.
MOST_TERMS = 8


def is_node(value: object) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node)


def same_call_key(value: Any) -> Any:
    """Return a key that is equal for equal arguments; 1, 1.0 and True differ."""
    if isinstance(value, (list, tuple)):
        return tuple(map(same_call_key, value))
    if isinstance(value, dict):
        return tuple((name, same_call_key(item)) for name, item in sorted(value.items()))
    return (type(value), value) if isinstance(value, (bool, int, float)) else value


class GraphBuilder:
    """Builds an fx graph with common subexpression elimination. A node's meta["val"] describes its value."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.attributes: dict[str, Any] = {}
        self._calls: dict[Any, fx.Node] = {}

    def call(self, target: Any, args: Sequence[Any], kwargs: dict[str, Any] | None = None, like: Any = None) -> fx.Node:
        """Return the node of a call. `like` describes its value, if that is known."""
        kwargs = kwargs or {}
        if target is aten.mul.Tensor and is_node(args[0]) and is_node(args[1]):
            args = sorted(args, key=lambda node: node.name)
        key = (target, same_call_key(args), same_call_key(kwargs))
        if key not in self._calls:
            node = self.graph.call_function(target, tuple(args), kwargs)
            node.meta["val"] = self._inferred(node) if like is None else like
            self._calls[key] = node
        return self._calls[key]

    @staticmethod
    def _inferred(node: fx.Node) -> TensorInfo:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"].empty("meta"))
        with torch.no_grad():
            value = node.target(*args, **kwargs)  # type: ignore[operator]
        largest = max((n.meta["val"] for n in node.all_input_nodes), key=TensorInfo.dim)  # numbers may be on the CPU
        return TensorInfo(value.shape, value.dtype, largest.device)

    def expanded(self, node: fx.Node, shape: torch.Size) -> fx.Node:
        """Return the node broadcast to a shape."""
        val = node.meta["val"]
        if val.shape == shape:
            return node
        return self.call(aten.expand.default, (node, list(shape)), like=replace(val, shape=shape))

    def full(self, like: TensorInfo, value: float) -> fx.Node:
        """Return a constant tensor."""
        options = {"dtype": like.dtype, "device": like.device}
        return self.call(aten.full.default, (list(like.shape), value), options, like)

    def placeholder(self, name: str, value: Any) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def attribute(self, value: Tensor) -> fx.Node:
        if id(value) in self._calls:
            return self._calls[id(value)]
        name = f"constant_{len(self.attributes)}"
        self.attributes[name] = value
        node = self.graph.get_attr(name)
        node.meta["val"] = TensorInfo.of(value) if isinstance(value, Tensor) else value
        self._calls[id(value)] = node
        return node


# A scalar times a constant. The constant None is 1.
Coefficient = tuple[float, fx.Node | None]


@dataclass(frozen=True)
class Combination:
    """A tangent sum_i coefficient_i * base_i, broadcast to `shape`."""

    terms: tuple[tuple[fx.Node, Coefficient], ...]
    shape: torch.Size
    dtype: torch.dtype


def combine(bases: Sequence[Tensor], coefficients: Sequence[Tensor | None], scalars: Sequence[float]) -> Tensor:
    """Return sum_i scalars_i * coefficients_i * bases_i, broadcast together."""
    total: Tensor | None = None
    for base, coefficient, scalar in zip(bases, coefficients, scalars):
        if total is None:
            total = base if coefficient is None else base * coefficient
            total = total if scalar == 1.0 else scalar * total
        elif coefficient is None:
            total = torch.add(total, base, alpha=scalar)
        else:
            total = torch.addcmul(total, base, coefficient, value=scalar)
    assert total is not None
    return total


def multiply(pairs: Sequence[tuple[Tensor, Tensor]], scalars: Sequence[float]) -> Tensor:
    """Return sum_i scalars_i * a_i @ b_i of pairs of matrices or of batches of matrices."""
    return functools.reduce(operator.add, (scalar * (a @ b) for (a, b), scalar in zip(pairs, scalars)))


def positions_of(mask: Tensor, dim: int) -> Tensor:
    """Return the indices in dimension `dim` of the elements of a mask that are not zero."""
    return mask.nonzero()[:, dim]


@dataclass
class Program:
    """The products with all blocks, as a graph from tangents of the parameters and constants.

    Attributes:
        graph: its placeholders are one tangent per parameter, then the constants. A node's meta["blocks"] has bit l set
            if block l needs its tangent.
        tangents: placeholders of the tangents, None for parameters whose tangent no product needs.
        constants: placeholder of a constant -> node of the graph of constants.
        products: node of the product per parameter; None if it is zero.
    """

    graph: fx.Graph
    tangents: list[fx.Node | None]
    constants: dict[fx.Node, fx.Node]
    products: list[fx.Node | None]

    @functools.cached_property
    def schedule(self) -> list[tuple[fx.Node, list[fx.Node]]]:
        """The calls in order, without combinations that only a sum reads, and the tangents that each of them reads."""
        calls = [n for n in self.graph.nodes if n.op == "call_function" and n.meta["blocks"]]
        inner = {n: summed(n) for n in calls}
        skipped = set(inner.values())
        return [
            (n, [s for s in (inner[n] or n).all_input_nodes if s not in self.constants])
            for n in calls
            if n not in skipped
        ]


def summed(node: Node) -> fx.Node | None:
    """Return the combination that only this sum over the last dimension reads, which then is never stored."""
    if node.target is not aten.sum.dim_IntList or node.kwargs or not is_node(node.args[0]):
        return None
    source, dims = node.args[0], node.args[1]
    if source.target is not combine or len(source.users) > 1 or not source.meta["val"].dim():
        return None
    n = source.meta["val"].dim()
    return source if [d % n for d in dims or range(n)] == [n - 1] else None


class ProgramBuilder:
    """Builds a linear program, next to a graph of constants."""

    def __init__(self, constants: GraphBuilder) -> None:
        self._constants = constants
        self._program = GraphBuilder()
        self._inputs: dict[fx.Node, fx.Node] = {}
        self._tangents: list[fx.Node] = []
        self._scales: dict[fx.Node, tuple[float, fx.Node]] = {}

    def tangent(self, value: TensorInfo) -> Combination:
        """Add the tangent of a parameter as an input."""
        node = self._program.placeholder(f"tangent_{len(self._tangents)}", value)
        self._tangents.append(node)
        return self._of(node)

    @staticmethod
    def _of(node: fx.Node, scalar: float = 1.0) -> Combination:
        return Combination(((node, (scalar, None)),), node.meta["val"].shape, node.meta["val"].dtype)

    def _import(self, value: Any) -> Any:
        """Return the placeholder of a constant in this program."""
        if not is_node(value):
            return value
        if value not in self._inputs:
            self._inputs[value] = self._program.placeholder(f"c_{len(self._inputs)}", value.meta["val"])
        return self._inputs[value]

    def call(self, target: Any, args: Any, kwargs: Any, like: Any) -> Any:
        """Return target(*args), which is jointly linear in the Combinations among its arguments.

        `like` describes the result.
        """
        if target in SAME or (target is aten._to_copy.default and args[0].dtype == like.dtype):
            return args[0]
        if target is aten._to_copy.default and like.device == self._tangents[0].meta["val"].device:
            kwargs = {"dtype": like.dtype}  # a dry run is on another device
        if target is aten.copy.default and isinstance(args[1], Combination):
            return Combination(args[1].terms, like.shape, like.dtype)
        if target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], tuple) else self._emit(target, args, kwargs, like)
        target = RESHAPED.get(target, target)
        if target in SHAPE_ONLY:
            return self._constants.full(like, SHAPE_ONLY[target])
        if target in VIEWS and isinstance(args[0], Combination):
            return self._view(target, args, kwargs, like)
        if target is aten.expand.default:  # terms are broadcast when they are used
            return Combination(args[0].terms, like.shape, like.dtype)
        if target in _MEANS:
            total = self.call(_MEANS[target], args, kwargs, like)
            part = like.numel() / max(1, math.prod(args[0].shape))
            return replace(total, terms=tuple((base, self._times(c, part)) for base, c in total.terms))
        if target is aten.as_strided.default:
            raise NotTraceable(f"{target} depends on how a tensor lies in memory")
        if isinstance(like, TensorInfo) and torch.Tag.pointwise in target.tags:
            return self._pointwise(target, args, kwargs, like)
        return self._emit(target, args, kwargs, like)

    def _view(self, target: Any, args: Any, kwargs: Any, like: TensorInfo) -> Combination:
        combination: Combination
        combination, *options = args
        if target in (aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims):
            # Only dimensions of size 1 of the tangent: a base may have size 1 in others, where it is broadcast.
            n = max(1, len(combination.shape))
            given = tree_leaves(options) if options else range(n)
            removed = [d % n for d in given if combination.shape[d % n : d % n + 1] == (1,)]
            if not removed:
                return combination
            target, options = aten.squeeze.dims, [removed]

        def view(builder: GraphBuilder, node: fx.Node) -> fx.Node:
            shape = node.meta["val"].shape
            if target is aten.reshape.default:
                new = reshaped(shape, combination.shape, like.shape)
                if new is None:
                    node, new = builder.expanded(node, combination.shape), like.shape
                return node if node.meta["val"].shape == new else builder.call(target, (node, list(new)))
            full = (1,) * (len(combination.shape) - len(shape)) + tuple(shape)
            node = builder.call(aten.reshape.default, (node, list(full))) if full != tuple(shape) else node
            if target in (aten.slice.Tensor, aten.select.int) and full[options[0] if options else 0] == 1:
                if target is aten.slice.Tensor:
                    return node
                return builder.call(target, (node, options[0], 0))
            return builder.call(target, (node, *options), kwargs)

        terms = [
            (view(self._program, base), (scalar, None if c is None else view(self._constants, c)))
            for base, (scalar, c) in combination.terms
        ]
        return Combination(tuple(terms), like.shape, combination.dtype)

    def _pointwise(self, target: Any, args: Any, kwargs: Any, like: TensorInfo) -> Combination:
        leaves, spec = tree_flatten((args, kwargs))
        terms: dict[fx.Node, list[Coefficient]] = {}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Combination):
                for base, coefficient in leaf.terms:
                    new = self._coefficient(target, leaves, spec, i, coefficient)
                    terms.setdefault(base, []).append(new)
        together = tuple((base, self._sum(coefficients)) for base, coefficients in terms.items())
        result = Combination(together, like.shape, like.dtype)
        return self.materialize(result) if len(together) > MOST_TERMS else result

    def _coefficient(self, target: Any, leaves: list[Any], spec: Any, i: int, c: Coefficient) -> Coefficient:
        """Return the coefficient after an elementwise operation: its value at c, with all other tangents zero."""
        if target in (aten.add.Tensor, aten.sub.Tensor, aten.rsub.Tensor, aten.neg.default, aten._to_copy.default):
            args, kwargs = tree_unflatten(leaves, spec)
            sign = -1.0 if target is aten.neg.default else 1.0
            alpha = kwargs.get("alpha", 1)
            if (target is aten.sub.Tensor and i == 1) or (target is aten.rsub.Tensor and i == 0):
                sign = -float(alpha)
            elif target is aten.add.Tensor and i == 1:
                sign = float(alpha)
            return self._times(c, sign)
        if target in (aten.mul.Tensor, aten.mul.Scalar) and not isinstance(leaves[1 - i], Combination):
            return self._times(c, leaves[1 - i])
        if target in (aten.div.Tensor, aten.div.Scalar) and isinstance(leaves[1], (int, float)) and len(leaves) == 2:
            return self._times(c, 1.0 / leaves[1])
        scalar, constant = c
        device, values = self._tangents[0].meta["val"].device, list(leaves)
        for j, leaf in enumerate(leaves):
            if isinstance(leaf, Combination):
                # Some elementwise operations do not broadcast and take no scalars.
                value = constant if j == i else None
                if value is None:
                    value = self._constants.full(TensorInfo(leaf.shape, leaf.dtype, device), float(j == i))
                values[j] = self._constants.expanded(value, leaf.shape)
        args, kwargs = tree_unflatten(values, spec)
        return self._times((scalar, None), self._constants.call(target, args, kwargs))

    def _times(self, c: Coefficient, value: fx.Node | float) -> Coefficient:
        scalar, constant = c
        if not isinstance(value, fx.Node):
            return scalar * value, constant
        factor, value = self._scaled(value)
        return scalar * factor, value if constant is None else self._constants.call(aten.mul.Tensor, (constant, value))

    def _scaled(self, node: Node) -> tuple[float, fx.Node]:
        """Return a constant as a scalar times a constant, so that its multiples are evaluated and stored once."""
        target, args = node.target, node.args
        if node not in self._scales:
            found = (1.0, node)
            if target is aten.neg.default or (
                target in (aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar)
                and len(args) == 2
                and type(args[1]) in (int, float)
                and args[1] != 0
                and not node.kwargs
            ):
                factor = -1.0 if target is aten.neg.default else float(args[1])
                factor = 1.0 / factor if target in (aten.div.Tensor, aten.div.Scalar) else factor
                scalar, base = self._scaled(args[0])
                found = (scalar * factor, base)
            elif target is aten.mul.Tensor and all(map(is_node, args)):
                (a, left), (b, right) = map(self._scaled, args)
                found = (a * b, self._constants.call(target, (left, right)))
            same = found[1].meta["val"].dtype == node.meta["val"].dtype
            self._scales[node] = found if same else (1.0, node)
        return self._scales[node]

    def _sum(self, coefficients: list[Coefficient]) -> Coefficient:
        scalars: dict[fx.Node | None, float] = {}
        for scalar, c in coefficients:
            scalars[c] = scalars.get(c, 0.0) + scalar
        common = next((scalar for scalar in scalars.values() if scalar), 1.0)
        rest = scalars.pop(None, None)
        total: fx.Node | None = None
        for c, scalar in scalars.items():
            assert c is not None
            if total is None:
                total = c if scalar == common else self._constants.call(aten.mul.Tensor, (c, scalar / common))
            else:
                options = {"alpha": scalar / common} if scalar != common else {}
                total = self._constants.call(aten.add.Tensor, (total, c), options)
        if total is None:
            return rest or 0.0, None
        return common, total if rest is None else self._constants.call(aten.add.Tensor, (total, rest / common))

    def _emit(self, target: Any, args: Any, kwargs: Any, like: Any) -> Any:
        refuse(target)
        if target in _INDEXED:
            args = self._without_masks(args, like)
        leaves, spec = tree_flatten((args, kwargs), is_leaf=lambda x: isinstance(x, Combination))
        moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Combination)]
        factor = 1.0
        if len(moving) == 1 and isinstance(like, TensorInfo):
            factor, leaves[moving[0]] = _without_scalar(leaves[moving[0]])
        leaves = [self._node(leaf) if isinstance(leaf, Combination) else self._import(leaf) for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, spec)
        node = self._program.call(target, args, kwargs, like)
        value = node.meta["val"]
        if not isinstance(value, (tuple, list)):
            return self._of(node, factor)
        return tuple(
            None if part is None else self._of(self._program.call(operator.getitem, (node, i), like=part))
            for i, part in enumerate(value)
        )

    def multiply(self, pairs: Sequence[tuple[Any, Any]], like: TensorInfo) -> Combination:
        """Return the sum of the matrix products of pairs of a Combination and a constant, in either order."""
        found, scalars = [], []
        for pair in pairs:
            scalar, given = 1.0, []
            for factor in pair:
                if isinstance(factor, Combination):
                    scalar, factor = _without_scalar(factor)
                    given.append(self._node(factor))
                else:
                    given.append(self._import(factor))
            found.append(tuple(given))
            scalars.append(scalar)
        common = scalars[0] if scalars.count(scalars[0]) == len(scalars) and scalars[0] else 1.0
        node = self._program.call(multiply, (tuple(found), tuple(s / common for s in scalars)), like=like)
        return self._of(node, common)

    def _without_masks(self, args: Sequence[Any], like: Tensor) -> tuple[Any, ...]:
        """Replace the masks that index a tensor by the positions of their elements.

        These are constants, whereas indexing by a mask counts its elements, for which a GPU has to wait every time.
        """
        x, indices, *rest = args
        masks = [i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices]
        taken = [i.meta["val"].dim() if is_mask else 1 for i, is_mask in zip(indices, masks)]
        if not any(masks) or 0 in taken:
            return tuple(args)
        sizes, values = ([*v.shape] if hasattr(v, "shape") else v.meta["val"].shape for v in (x, (*rest, like)[0]))
        kept = [sizes[sum(taken[:n])] for n, i in enumerate(indices) if i is None] + [*sizes[sum(taken) :]]
        count = math.prod(values) // max(1, math.prod(kept))
        found: list[fx.Node | None] = []
        for index, is_mask, dims in zip(indices, masks, taken):
            if is_mask:
                positions = TensorInfo(torch.Size([count]), torch.int64, index.meta["val"].device)
                found += [self._constants.call(positions_of, (index, d), like=positions) for d in range(dims)]
            else:
                found.append(index)
        return (x, found, *rest)

    def materialize(self, combination: Combination) -> Combination:
        """Return the combination as one tensor with coefficient 1."""
        return self._of(self._node(combination))

    def _node(self, combination: Combination) -> fx.Node:
        """Return the node of the combination as a tensor."""
        bases = [base for base, _ in combination.terms]
        constants = [self._import(c) for _, (_, c) in combination.terms]
        scalars = [scalar for _, (scalar, _) in combination.terms]
        total = bases[0]
        if len(bases) > 1 or (scalars[0], constants[0]) != (1.0, None):
            values = [n.meta["val"] for n in (*bases, *constants) if n is not None]
            shape = torch.broadcast_shapes(*(v.shape for v in values))  # type: ignore[no-untyped-call]
            dtype = functools.reduce(torch.promote_types, (v.dtype for v in values))
            like = TensorInfo(shape, dtype, values[0].device)
            total = self._program.call(combine, (tuple(bases), tuple(constants), tuple(scalars)), like=like)
        if total.meta["val"].dtype != combination.dtype:
            like = replace(total.meta["val"], dtype=combination.dtype)
            total = self._program.call(aten._to_copy.default, (total,), {"dtype": combination.dtype}, like)
        return self._program.expanded(total, combination.shape)

    def finish(self, results: Sequence[Combination | None], blocks: Sequence[int]) -> Program:
        """Return the program.

        Args:
            results: the product per parameter.
            blocks: bits of the blocks that contain each parameter.
        """
        products = [None if r is None else self._node(r) for r in results]
        needed: dict[fx.Node, int] = defaultdict(int)
        for node, bits in zip(products, blocks):
            if node is not None:
                needed[node] |= bits
        given = dict(zip(self._tangents, blocks))
        for node in self._program.graph.nodes:
            node.meta["blocks"] = given.get(node, 0)
            for source in node.all_input_nodes:
                node.meta["blocks"] |= source.meta["blocks"]
        for node in reversed(self._program.graph.nodes):
            node.meta["blocks"] &= needed[node]
            for source in node.all_input_nodes:
                needed[source] |= node.meta["blocks"]
        products = [n if n is not None and n.meta["blocks"] & bits else None for n, bits in zip(products, blocks)]
        tangents = [n if n.meta["blocks"] else None for n in self._tangents]
        constants = {n: c for c, n in self._inputs.items() if any(user.meta["blocks"] for user in n.users)}
        return Program(self._program.graph, tangents, constants, products)


def _without_scalar(combination: Combination) -> tuple[float, Combination]:
    """Return a combination of one term as a scalar, which commutes with linear operations, times the rest."""
    if len(combination.terms) > 1:
        return 1.0, combination
    ((base, (scalar, constant)),) = combination.terms
    return scalar, replace(combination, terms=((base, (1.0, constant)),))


def reshaped(shape: Sequence[int], full: Sequence[int], new: Sequence[int]) -> torch.Size | None:
    """Return the shape of a tensor after a reshape from `full` to `new` of what it broadcasts to.

    None if a dimension of size 1 is merged with others, so that the tensor must be expanded first.
    """
    sizes = [1] * (len(full) - len(shape)) + list(shape)
    found: list[int] = []
    i = j = 0
    while i < len(full) or j < len(new):
        start_i, start_j, before, after = i, j, 1, 1
        while i == start_i or j == start_j or before != after:  # the smallest groups of dimensions of equal size
            if i < len(full) and (before <= after or j == len(new)):
                before, i = before * full[i], i + 1
            elif j < len(new):
                after, j = after * new[j], j + 1
            else:
                break
        if 0 in (before, after) or before != after:
            return None
        whole = sizes[start_i:i] == list(full[start_i:i])
        if not whole and any(n != 1 for n in sizes[start_i:i]):
            return None
        found += list(new[start_j:j]) if whole else [1] * (j - start_j)
    return torch.Size(found)
