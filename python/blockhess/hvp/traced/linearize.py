"""Linearization of a traced gradient: forward-mode differentiation, with all constants folded.

    P : w -> dL/dw            gradient of one batch, traced into a graph of tensor operations
    v -> dP/dw v              the tangent of P: a graph that is linear in v

Every tangent belongs to the blocks whose parameters it depends on and whose gradient depends on it, so that one pass
through the graph gives the products with all blocks. Everything that does not depend on v (activations, second
derivatives of nonlinearities, masks, softmax outputs) goes into a graph of constants, evaluated once per batch. A chain
of elementwise operations on tangents is linear and diagonal and collapses to sum_i c_i * t_i with constants c_i. The
program then consists of matrix products, few reductions and such sums.

Programs do not modify their constants. The same model and batch give the same graphs.
"""

from __future__ import annotations

import functools
import importlib
import operator
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.func import jvp
from torch.utils._pytree import tree_flatten, tree_unflatten

from blockhess.hvp.traced.operations import (
    CONSTANT,
    RESHAPED,
    SAME,
    SPLITS,
    VIEWS,
    NotTraceable,
    aten,
    refuse,
)
from blockhess.hvp.traced.program import Combination, GraphBuilder, Program, ProgramBuilder, is_node, same_call_key
from blockhess.hvp.traced.trace import Recorder, Trace, fake_mode

# Operations that are linear in all their floating-point tensors together. Padding is not, for it adds a constant.
_LINEAR = VIEWS | SPLITS | set(RESHAPED) | {
    aten.expand.default, aten.neg.default, aten.sum.dim_IntList, aten.sum.default, aten.mean.dim, aten.mean.default,
    aten.cat.default, aten.stack.default, aten.index.Tensor, aten.embedding.default, aten._to_copy.default,
    aten.embedding_dense_backward.default, aten.slice_backward.default, aten.select_backward.default,
    aten.gather.default,
}  # fmt: skip
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_PRODUCTS = {aten.mul.Tensor, aten.mm.default, aten.bmm.default}

# Tangents of y = op(x, dim, ...) for the tangent t of x that are cheaper than those of torch.func.jvp.
_RULES: dict[Any, Callable[[Tensor, Tensor, int], Tensor]] = {
    aten._softmax.default: lambda y, t, dim: y * (t - (y * t).sum(dim, keepdim=True)),
    aten._safe_softmax.default: lambda y, t, dim: y * (t - (y * t).sum(dim, keepdim=True)),
    aten._log_softmax.default: lambda y, t, dim: t - (y.exp() * t).sum(dim, keepdim=True),
}


def _embedding_with_padding(table: Tensor, index: Tensor, padding: int, *options: bool) -> Tensor:
    """Return what autograd differentiates: the row of padding is a constant."""
    found: Tensor = aten.embedding.default(table, index) * (index != padding).unsqueeze(-1)
    return found


@dataclass(frozen=True)
class _Template:
    """The tangent of one operation as a function of primals and input tangents.

    Attributes:
        linear: nodes that depend on the tangents.
        outputs: tangent of every output of the operation, None where it has none.
    """

    traced: Trace
    linear: set[fx.Node]
    outputs: tuple[fx.Node | None, ...]


class Linearizer:
    """Derives a linear program from a traced gradient.

    Args:
        traced: from `trace_gradient`, a function of (parameters, batch).
        num_parameters: number of placeholders that are parameters; the others are tensors of the batch.
        gradients: index of the gradient of each parameter among the outputs, None if it has none.
    """

    def __init__(self, traced: Trace, num_parameters: int, gradients: Sequence[int | None]) -> None:
        self._fakes = fake_mode()
        self.constants = GraphBuilder()
        self._templates: dict[Any, _Template] = {}
        self._nodes = [n for n in traced.graph.nodes if n.op != "output"]
        (outputs,) = next(n.args for n in reversed(traced.graph.nodes) if n.op == "output")
        flat, _ = tree_flatten(outputs)
        self._gradient = [None if index is None else flat[index] for index in gradients]
        self._parameters = [n for n in self._nodes if n.op == "placeholder"][:num_parameters]
        self._primal: dict[fx.Node, Any] = {}
        for node in self._nodes:  # copies P into the graph of constants, which thus contains all primal values
            if node.op == "placeholder":
                self._primal[node] = self.constants.placeholder(node.name, node.meta["val"])
            elif node.op == "get_attr":
                self._primal[node] = self.constants.attribute(traced.attributes[node.target])
            else:
                args, kwargs = self._mapped(node, self._primal)
                self._primal[node] = self._constant(node.target, args, kwargs, node.meta["val"])

    def _mapped(self, node: fx.Node, values: dict[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return fx.node.map_arg((node.args, node.kwargs), values.__getitem__)

    def _constant(self, target: Any, args: Any, kwargs: Any, like: Any) -> Any:
        """Return the node of a call with constant arguments."""
        if target in SAME:
            return args[0]
        target = RESHAPED.get(target, target)
        refuse(target)
        return self.constants.call(target, args, kwargs, like)

    @staticmethod
    def _reach(starts: Iterable[tuple[Any, int]], edges: list[tuple[fx.Node, fx.Node]]) -> dict[fx.Node, int]:
        """Return the bits of all starts from which edges, in topological order, lead to a node."""
        bits: defaultdict[fx.Node, int] = defaultdict(int)
        for start, own in starts:
            if is_node(start):
                bits[start] |= own
        for source, target in edges:
            bits[target] |= bits[source]
        return bits

    @property
    def first_uses(self) -> list[int]:
        """Position of the first operation that uses each parameter."""
        order = {node: i for i, node in enumerate(self._nodes)}
        return [min((order.get(user, len(order)) for user in p.users), default=len(order)) for p in self._parameters]

    def program(self, blocks: Sequence[int]) -> Program:
        """Return the program of the products with all blocks.

        Args:
            blocks: bits of the blocks that contain each parameter.
        """
        program = ProgramBuilder(self.constants)
        tangents: dict[fx.Node, Any] = {node: program.tangent(node.meta["val"]) for node in self._parameters}
        edges = [(source, node) for node in self._nodes for source in node.all_input_nodes]
        active = self._reach(zip(self._parameters, blocks), edges)
        above = self._reach(zip(self._gradient, blocks), [(node, source) for source, node in reversed(edges)])
        for node in self._nodes:
            active[node] &= above[node]
        for node in self._nodes:
            if node.op != "call_function" or not active[node]:
                continue
            value = self._tangent(node, tangents, program)
            if isinstance(value, Combination) and len(value.terms) > 1:
                value = program.materialize(value) if sum(map(bool, map(active.get, node.users))) > 1 else value
            tangents[node] = value
        return program.finish([tangents.get(end) if is_node(end) else None for end in self._gradient], blocks)

    def _tangent(self, node: fx.Node, tangents: dict[fx.Node, Any], program: ProgramBuilder) -> Any:
        given: Any = node.args
        target = node.target
        if target is operator.getitem:
            whole = tangents.get(given[0])
            return None if whole is None else whole[given[1]]
        leaves, spec = tree_flatten((given, dict(node.kwargs)))
        positions = [i for i, leaf in enumerate(leaves) if is_node(leaf) and tangents.get(leaf) is not None]
        if not positions or target is CONSTANT:
            return None
        if target in SAME:
            return tangents[given[0]]
        if target is aten.embedding.default and len(given) > 2 and given[2] >= 0:
            target = _embedding_with_padding
        if target is aten.copy.default:  # the result does not depend on the first argument
            like, source = self._primal[node].meta["val"], tangents.get(given[1])
            return None if source is None else Combination(source.terms, like.shape, like.dtype)
        primals = [self._primal[leaf] if is_node(leaf) else leaf for leaf in leaves]
        like = node.meta["val"]
        floating = [i for i, leaf in enumerate(leaves) if is_node(leaf) and leaf.meta["val"].dtype.is_floating_point]
        if target in _SUMS or (target in _LINEAR and floating == positions):
            whole = [tangents[leaf] if i in positions else primals[i] for i, leaf in enumerate(leaves)]
            args, kwargs = tree_unflatten(whole, spec)
            return program.call(target, args, kwargs, like)
        if target in _PRODUCTS and is_node(leaves[1]):
            pairs = [tuple(tangents[leaves[j]] if i == j else primals[j] for j in (0, 1)) for i in positions]
            if target is not aten.mul.Tensor:
                return program.multiply(pairs, like)
            parts = [program.call(target, pair, {}, like) for pair in pairs]
            return functools.reduce(lambda a, b: program.call(aten.add.Tensor, (a, b), {}, like), parts)
        inputs = [tangents[leaves[i]] for i in positions]
        template = self._template(target, primals, spec, positions)
        results = self._inline(template, [p for p in primals if is_node(p)], inputs, program)
        return results if isinstance(self._primal[node].meta["val"], (tuple, list)) else results[0]

    def _template(self, target: Any, leaves: list[Any], spec: Any, positions: list[int]) -> _Template:
        def described(leaf: Any) -> Any:
            if not is_node(leaf):
                return same_call_key(leaf)
            return leaf.meta["val"]

        key = (target, tuple(map(described, leaves)), str(spec), tuple(positions))
        if key not in self._templates:
            self._templates[key] = self._trace_tangent(target, leaves, spec, positions)
        return self._templates[key]

    def _trace_tangent(self, target: Any, leaves: list[Any], spec: Any, positions: list[int]) -> _Template:
        target = RESHAPED.get(target, target)
        where = [i for i, leaf in enumerate(leaves) if is_node(leaf)]
        rule = _RULES.get(target)

        differentiable: list[bool] = []  # outputs with a tangent

        def tangent(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
            def call(moving: Sequence[Tensor] = ()) -> Any:
                values = list(leaves)
                for i, value in (*zip(where, primals), *zip(positions, moving)):
                    values[i] = value
                args, kwargs = tree_unflatten(values, spec)
                return target(*args, **kwargs)

            if rule is not None and positions == [0]:
                differentiable[:] = [True]
                return [rule(call(), tangents[0], leaves[1])]

            def run(*moving: Tensor) -> list[Tensor]:
                out = call(moving)
                outs = list(out) if isinstance(out, (tuple, list)) else [out]
                if any(isinstance(o, Tensor) and o.is_complex() for o in outs):
                    raise NotTraceable(f"{target} computes with complex numbers")
                differentiable[:] = [isinstance(o, Tensor) and o.is_floating_point() for o in outs]
                return [o for o, kept in zip(outs, differentiable) if kept]

            moving = tuple(primals[where.index(i)] for i in positions)
            _load_rules_of_jvp()
            return list(jvp(run, moving, tuple(tangents))[1]) if run(*moving) else []

        recorder = Recorder({}, stops=False)
        with self._fakes:
            inputs = [leaves[i].meta["val"].empty() for i in (*where, *positions)]
        for value in inputs:
            recorder.placeholder(value)
        try:
            with self._fakes, recorder:
                found = tangent(inputs[: len(where)], inputs[len(where) :])
            traced = recorder.finish(found)
        except NotTraceable:
            raise
        except (NotImplementedError, RuntimeError) as error:
            raise NotTraceable(f"{target} has no tangent: {str(error).splitlines()[0]}") from error
        nodes = list(traced.graph.nodes)
        linear = set(nodes[len(where) : len(inputs)])
        for node in nodes:
            if node.op == "call_function" and any(n in linear for n in node.all_input_nodes):
                linear.add(node)
        (returned,) = nodes[-1].args
        results = iter(returned)
        outputs = tuple(next(results) if has_tangent else None for has_tangent in differentiable)
        return _Template(traced, linear, outputs)

    def _inline(
        self, template: _Template, primals: list[fx.Node], tangents: list[Combination], program: ProgramBuilder
    ) -> list[Combination | None]:
        graph = template.traced.graph
        values: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), [*primals, *tangents]))
        for node in graph.nodes:
            if node.op == "get_attr":
                value = template.traced.attributes[node.target]
                if isinstance(value, FakeTensor):
                    raise NotTraceable("an operation's tangent holds a tensor of the trace")
                values[node] = self.constants.attribute(value)
            elif node.op == "call_function":
                args, kwargs = self._mapped(node, values)
                if node in template.linear:
                    values[node] = program.call(node.target, args, kwargs, node.meta["val"])
                else:
                    values[node] = self._constant(node.target, args, kwargs, node.meta["val"])
        results = [None if out is None else values.get(out) for out in template.outputs]
        return [t if isinstance(t, Combination) and t.terms else None for t in results]


@functools.cache
def _load_rules_of_jvp() -> None:
    """Import the rules of `jvp` without the DeprecationWarning of torch.jit.script, which torch itself calls there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")
