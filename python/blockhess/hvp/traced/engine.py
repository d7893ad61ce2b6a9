"""Hessian-vector products by linear programs, traced once: see linearize.py.

A trace is made of the first batch and serves every batch of the same shapes whose gradient it reproduces; other
batches get their own. Constants are evaluated once a batch, and kept for all steps where memory allows.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from blockhess.hvp.traced.linearize import Linearizer
from blockhess.hvp.traced.operations import VIEWS, NotTraceable
from blockhess.hvp.traced.program import Program, accumulate_in_place
from blockhess.hvp.traced.trace import trace_gradient
from blockhess.problem.batches import map_tensors
from blockhess.problem.problem import Problem


class TracedEngine:
    """Products by linear programs.

    Args:
        problem: model, loss, data, blocks.
        retain: whether the constants of all batches are kept; otherwise they are evaluated again at every step.
        rows: vectors that one run of a program takes.
        compiled: whether programs are compiled by torch.compile.

    Raises:
        NotTraceable: the gradient cannot be traced, or has an operation without a tangent.
    """

    name = "traced"

    def __init__(self, problem: Problem, retain: bool = True, rows: int = 1, compiled: bool = False) -> None:
        self.rows = rows
        self._problem, self._retain, self._compiled = problem, retain, compiled
        self._traces: list[_Trace] = []
        self._trace_of: dict[int, _Trace] = {}
        self._kept: dict[int, dict[fx.Node, Tensor]] = {}
        self._now: _Trace | None = None
        self._values: dict[fx.Node, Tensor] = {}
        for index in range(len(problem.batches)):  # what cannot be traced is refused now
            self._find(index)

    @property
    def constant_bytes(self) -> int:
        """What the constants of the first batch take."""
        return self._traces[0].nbytes

    def flops(self, number: int) -> int:
        """Floating-point operations of one product of block `number` with the first batch."""
        return self._traces[0].flops(number)

    def prepare(self, index: int) -> None:
        """As in `Engine`."""
        self._now = self._find(index)
        if index not in self._kept:
            if not self._retain:
                self._kept.clear()
                self._values = {}
            self._kept[index] = self._now.constants(self._problem.batches[index])
        self._values = self._kept[index]

    def product(self, number: int, vectors: Tensor) -> Tensor | None:
        """As in `Engine`."""
        assert self._now is not None
        program = self._now.program(number)
        if program is None:
            return None
        block, parameters = self._problem.blocks[number], self._problem.parameters
        result = torch.zeros_like(vectors)
        constants = [self._values[node] for node in program.constants]
        names = [self._now.names[i] for i in program.parameters]
        if self.rows == 1:
            tangents = block.spread(vectors[0], parameters)
            products = self._now.run(number, 1, self._compiled)(*(tangents[n] for n in names), *constants)
            block.gather({n: p for n, p in zip(names, products) if p is not None}, into=result[0])
            return result
        # One program for one number of rows: what is missing to it is filled up with zeros.
        k = len(vectors)
        if k < self.rows:
            vectors = torch.cat([vectors, vectors.new_zeros(self.rows - k, vectors.shape[1])])
        tangents = block.spread(vectors, parameters)
        products = self._now.run(number, self.rows, self._compiled)(*(tangents[n] for n in names), *constants)
        block.gather({n: p[:k] for n, p in zip(names, products) if p is not None}, into=result)
        return result

    def _find(self, index: int) -> _Trace:
        if index not in self._trace_of:
            batch = self._problem.batches[index]
            fitting = [t for t in self._traces if t.reusable and t.signature == _signature(batch)]
            for trace in fitting:
                if self._agrees(trace, index):
                    self._trace_of[index] = trace
                    break
            else:
                trace = _Trace(self._problem, batch)
                if not self._agrees(trace, index):
                    raise NotTraceable("the gradient that was traced is not that of autograd")
                self._traces.append(trace)
                self._trace_of[index] = trace
        return self._trace_of[index]

    def _agrees(self, trace: _Trace, index: int) -> bool:
        gradients = self._problem.gradients(index, create_graph=False)
        try:
            traced = trace.gradients(self._problem.batches[index])
        except RuntimeError:  # shapes that depend on values
            return False
        if traced.keys() != gradients.keys():
            return False
        # Some models compute part of their loss in float32 whatever their parameters are.
        eps = torch.finfo(torch.float32).eps
        noise = 100 * eps * max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
        return all(_agree(traced[name], g, eps**0.5, noise) for name, g in gradients.items())


def _agree(a: Tensor, b: Tensor, rtol: float, atol: float) -> bool:
    return a.shape == b.shape and float((a - b).norm()) <= rtol * float(b.norm()) + atol * b.numel() ** 0.5


class _Trace:
    """The programs of one batch's gradient.

    Attributes:
        names: the parameters, in the order of the trace. signature: of the batches that it may serve.
        reusable: whether other batches can take the place of the one traced.
    """

    def __init__(self, problem: Problem, batch: Any) -> None:
        self._problem = problem
        self.names = list(problem.parameters)
        self.signature = _signature(batch)
        self._gradient_names: list[str] = []
        try:
            self.reusable = _is_plain(batch)
            traced = self._traced(batch, as_input=self.reusable)
        except NotTraceable:
            if not self.reusable:
                raise
            # Control flow that depends on the batch: then it is no input, and what follows from it is constant.
            self.reusable = False
            traced = self._traced(batch, as_input=False)
        self._order = {name: i for i, name in enumerate(self.names)}
        positions = {name: i for i, name in enumerate(self._gradient_names)}
        self._linearizer = Linearizer(traced, len(self.names), [positions.get(name) for name in self.names])
        self._gradient = traced
        self._programs: dict[tuple[int, ...], Program] = {}
        self._of_block = [self._make(number) for number in range(len(problem.blocks))]
        self._needed = list(dict.fromkeys(c for p in self._programs.values() for c in p.constants))
        builder = self._linearizer.constants
        builder.graph.output(self._needed)
        builder.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self._constants = fx.GraphModule(builder.attributes, builder.graph)
        self._functions: dict[Any, Callable[..., Sequence[Tensor | None]]] = {}

    def _traced(self, batch: Any, as_input: bool) -> fx.GraphModule:
        def gradient(parameters: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
            given = _with_tensors(batch, tensors) if as_input else batch
            found = self._problem.gradients_at(given, dict(zip(self.names, parameters)))
            self._gradient_names = list(found)
            return list(found.values())

        parameters = [self._problem.parameters[name].detach() for name in self.names]
        return trace_gradient(gradient, parameters, _tensors(batch) if as_input else [], values=not as_input)

    def _make(self, number: int) -> tuple[int, ...] | None:
        key = tuple(self._order[name] for name in self._problem.blocks[number].parameters)
        if key not in self._programs:
            self._programs[key] = self._linearizer.program(key)
        return key if any(self._programs[key].live) else None

    def program(self, number: int) -> Program | None:
        """The program of a block, None if its Hessian is zero."""
        key = self._of_block[number]
        return None if key is None else self._programs[key]

    @property
    def nbytes(self) -> int:
        """What the constants take beside parameters and data."""
        sizes: dict[fx.Node, int] = {}
        views = VIEWS | {torch.ops.aten.expand.default}
        for node in self._needed:
            while node.op == "call_function" and node.target in views and isinstance(node.args[0], fx.Node):
                node = node.args[0]
            if node.op == "call_function":
                value = node.meta["val"]
                sizes[node] = sum(v.numel() * v.itemsize for v in tree_flatten(value)[0] if isinstance(v, Tensor))
        return sum(sizes.values())

    def flops(self, number: int) -> int:
        """Of one product of block `number`."""
        from torch.utils.flop_counter import flop_registry

        program = self.program(number)
        total = 0
        for node in program.graph.nodes if program is not None else ():
            count = flop_registry.get(getattr(node.target, "overloadpacket", None))
            if count is not None:
                args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
                total += count(*args, **node.kwargs, out_val=node.meta["val"])
        return total

    def constants(self, batch: Any) -> dict[fx.Node, Tensor]:
        """The value of every constant for a batch."""
        with torch.no_grad():
            return dict(zip(self._needed, self._constants(*self._inputs(batch))))

    def gradients(self, batch: Any) -> dict[str, Tensor]:
        """The gradient that was traced, for a batch."""
        with torch.no_grad():
            parameters = [self._problem.parameters[name].detach() for name in self.names]
            return dict(zip(self._gradient_names, self._gradient(parameters, self._inputs(batch)[len(parameters) :])))

    def _inputs(self, batch: Any) -> list[Tensor]:
        parameters = [self._problem.parameters[name].detach() for name in self.names]
        return parameters + (_tensors(batch) if self.reusable else [])

    def run(self, number: int, rows: int, compiled: bool) -> Callable[..., Sequence[Tensor | None]]:
        """The program of a block as a function of tangents, with a leading dimension if rows > 1, and constants."""
        key = (self._of_block[number], rows)
        if key not in self._functions:
            program = self.program(number)
            assert program is not None
            module = _batched(program, rows) if rows > 1 else _single(program)
            self._functions[key] = torch.no_grad()(_compiled(module) if compiled else module)
        return self._functions[key]


def _single(program: Program) -> Callable[..., Any]:
    graph = fx.Graph()  # a copy, as the program itself may still be batched
    graph.output(graph.graph_copy(program.graph, {}))
    return fx.GraphModule({}, accumulate_in_place(graph))


def _compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """The program compiled at its first call; as it is where no compiler works, since that is slower, not wrong."""
    compiled = torch.compile(module, dynamic=False)

    def run(*inputs: Tensor) -> Any:
        nonlocal compiled
        try:
            with torch.compiler.set_stance("default"):  # a model in `fixed_state` must not be compiled, programs may
                return compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"blockhess: torch.compile failed, going on without: {error}".splitlines()[0], stacklevel=2)
            compiled = module
            return module(*inputs)

    return run


def _batched(program: Program, rows: int) -> Callable[..., Any]:
    """The program with a leading dimension of tangents, its operations those of the batch and no others."""
    placeholders = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"]
    moving = len(program.parameters)
    module = fx.GraphModule({}, program.graph)

    def several(*inputs: Tensor) -> list[Tensor]:
        def one(*tangents: Tensor) -> list[Tensor]:
            return [p for p in module(*tangents, *inputs[moving:]) if p is not None]

        return vmap(one)(*inputs[:moving])

    with placeholders[0].fake_mode:
        inputs = [
            torch.empty((rows, *p.shape) if i < moving else p.shape, dtype=p.dtype, device=p.device)
            for i, p in enumerate(placeholders)
        ]
        graph = make_fx(several)(*inputs)
    for node in graph.graph.nodes:
        if node.target in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):
            node.target = torch.ops.aten.reshape.default  # strides may not be those of the trace
    accumulate_in_place(graph.graph)
    graph.recompile()

    def run(*inputs: Tensor) -> list[Tensor | None]:
        found = iter(graph(*inputs))
        return [next(found) if live else None for live in program.live]

    return run


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(map_tensors(lambda t: t, batch))[0] if isinstance(leaf, Tensor)]


def _is_plain(batch: Any) -> bool:
    """Whether all that a batch holds is known: tensors, numbers and texts."""
    leaves = tree_flatten(map_tensors(lambda t: t, batch))[0]
    return all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in leaves)


def _with_tensors(batch: Any, tensors: Sequence[Tensor]) -> Any:
    leaves, spec = tree_flatten(map_tensors(lambda t: t, batch))
    given = iter(tensors)
    return tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _signature(batch: Any) -> str:
    leaves, spec = tree_flatten(map_tensors(lambda t: t, batch))
    kinds = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves]
    return f"{spec} {kinds}"
