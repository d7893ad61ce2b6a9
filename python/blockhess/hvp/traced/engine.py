"""Hessian-vector products by linear programs, see linearize.py.

The gradient of the first batch is traced. The trace serves every batch of the same shapes whose gradient it reproduces;
other batches get their own trace. Constants are evaluated once per batch.
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

from blockhess.hvp.operator import PerBatch
from blockhess.hvp.traced.linearize import Linearizer
from blockhess.hvp.traced.operations import RESHAPED, VIEWS, NotTraceable, aten
from blockhess.hvp.traced.program import Program, accumulate_in_place
from blockhess.hvp.traced.trace import trace_gradient
from blockhess.problem.batches import map_tensors
from blockhess.problem.problem import Problem


class TracedEngine:
    """Products by linear programs.

    Args:
        problem: model, loss, data, blocks.
        retain: keep the constants of all batches; otherwise evaluate them again whenever a batch is selected.
        rows: number of vectors per run of a program.
        compiled: compile the programs with torch.compile.

    Raises:
        NotTraceable: the gradient cannot be traced, or contains an operation without a tangent.
    """

    name = "traced"

    def __init__(self, problem: Problem, retain: bool = True, rows: int = 1, compiled: bool = False) -> None:
        self.rows = rows
        self._problem, self._compiled = problem, compiled
        self._traces: list[_Trace] = []
        # Raises NotTraceable before any product.
        self._trace_of = trace_of = [self._find(index) for index in range(len(problem.batches))]
        self._values = PerBatch(lambda index: trace_of[index].constants(problem.batches[index]), retain)

    @property
    def constant_bytes(self) -> int:
        """Size of the constants of the first batch."""
        return self._traces[0].nbytes

    def prepare(self, index: int) -> None:
        self._trace = self._trace_of[index]
        self._values.select(index)

    def product(self, number: int, vectors: Tensor) -> Tensor | None:
        trace, k = self._trace, len(vectors)
        program = trace.program(number)
        if program is None:
            return None
        result = torch.zeros_like(vectors)
        # A program takes exactly `rows` vectors, without a leading dimension if that is 1.
        if self.rows == 1:
            vectors = vectors[0]
        elif k < self.rows:
            vectors = torch.cat([vectors, vectors.new_zeros(self.rows - k, vectors.shape[1])])
        block = self._problem.blocks[number]
        tangents = block.spread(vectors, self._problem.parameters)
        names = [trace.names[i] for i in program.parameters]
        constants = [self._values.value[node] for node in program.constants]
        products = trace.function(program, self.rows, self._compiled)(*(tangents[n] for n in names), *constants)
        if self.rows == 1:
            block.gather(dict(zip(names, products)), into=result[0])
        else:
            block.gather({n: p[:k] for n, p in zip(names, products) if p is not None}, into=result)
        return result

    def _find(self, index: int) -> _Trace:
        batch = self._problem.batches[index]
        fitting = [t for t in self._traces if t.reusable and t.signature == _signature(batch)]
        found = next((trace for trace in fitting if self._agrees(trace, index)), None)
        if found is None:
            found = _Trace(self._problem, batch)
            if not self._agrees(found, index):
                raise NotTraceable("the gradient that was traced is not that of autograd")
            self._traces.append(found)
        return found

    def _agrees(self, trace: _Trace, index: int) -> bool:
        gradients = self._problem.gradients(index, create_graph=False)
        try:
            traced = trace.gradients(self._problem.batches[index])
        except RuntimeError:  # shapes that depend on values
            return False
        if traced.keys() != gradients.keys():
            return False
        # Some models compute part of their loss in float32, whatever the dtype of their parameters.
        eps = torch.finfo(torch.float32).eps
        noise = 100 * eps * max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
        return all(
            traced[name].shape == g.shape
            and float((traced[name] - g).norm()) <= eps**0.5 * float(g.norm()) + noise * g.numel() ** 0.5
            for name, g in gradients.items()
        )


class _Trace:
    """The traced gradient of one batch, and the programs of all blocks.

    Attributes:
        names: the parameters, in the order of the trace.
        signature: structure, shapes and dtypes of the batch.
        reusable: whether the batch is an input of the trace.
    """

    def __init__(self, problem: Problem, batch: Any) -> None:
        self._problem = problem
        self.names = list(problem.parameters)
        self.signature = _signature(batch)
        self.reusable = _is_plain(batch)
        self._gradient_names: list[str] = []
        try:
            self._gradient = self._traced(batch)
        except NotTraceable:
            if not self.reusable:
                raise
            # Control flow may depend on the batch; then the trace is for this batch only, as a constant.
            self.reusable = False
            self._gradient = self._traced(batch)
        outputs = {name: i for i, name in enumerate(self._gradient_names)}
        linearizer = Linearizer(self._gradient, len(self.names), [outputs.get(name) for name in self.names])
        order = {name: i for i, name in enumerate(self.names)}
        self._keys = [tuple(order[name] for name in block.parameters) for block in problem.blocks]
        self._programs = {key: linearizer.program(key) for key in dict.fromkeys(self._keys)}
        self._needed = list(dict.fromkeys(c for p in self._programs.values() for c in p.constants))
        builder = linearizer.constants
        builder.graph.output(self._needed)
        builder.graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self._constants = fx.GraphModule(builder.attributes, builder.graph)
        self._functions: dict[Any, Callable[..., Sequence[Tensor | None]]] = {}

    def _traced(self, batch: Any) -> fx.GraphModule:
        def gradient(parameters: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
            given = _with_tensors(batch, tensors) if self.reusable else batch
            found = self._problem.gradients_at(given, dict(zip(self.names, parameters)))
            self._gradient_names = list(found)
            return list(found.values())

        return trace_gradient(gradient, *self._inputs(batch), values=not self.reusable)

    def program(self, number: int) -> Program | None:
        """Return the program of a block, None if its Hessian is zero."""
        program = self._programs[self._keys[number]]
        return program if any(program.live) else None

    @property
    def nbytes(self) -> int:
        """Size of the constants, without parameters and data."""
        sizes: dict[fx.Node, int] = {}
        views = VIEWS | {aten.expand.default}
        for node in self._needed:
            while node.op == "call_function" and node.target in views and isinstance(node.args[0], fx.Node):
                node = node.args[0]
            if node.op == "call_function":
                value = node.meta["val"]
                sizes[node] = sum(v.numel() * v.itemsize for v in tree_flatten(value)[0] if isinstance(v, Tensor))
        return sum(sizes.values())

    def constants(self, batch: Any) -> dict[fx.Node, Tensor]:
        """Evaluate the constants for a batch."""
        parameters, tensors = self._inputs(batch)
        with torch.no_grad():
            return dict(zip(self._needed, self._constants(*parameters, *tensors)))

    def gradients(self, batch: Any) -> dict[str, Tensor]:
        """Evaluate the traced gradient for a batch."""
        with torch.no_grad():
            return dict(zip(self._gradient_names, self._gradient(*self._inputs(batch))))

    def _inputs(self, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        parameters = [p.detach() for p in self._problem.parameters.values()]
        return parameters, _tensors(batch) if self.reusable else []

    def function(self, program: Program, rows: int, compiled: bool) -> Callable[..., Sequence[Tensor | None]]:
        """Return a program as a function of tangents, with a leading dimension if rows > 1, and of constants."""
        key = (program.parameters, rows)
        if key not in self._functions:
            module = _batched(program, rows) if rows > 1 else _single(program)
            self._functions[key] = torch.no_grad()(_compiled(module) if compiled else module)
        return self._functions[key]


def _single(program: Program) -> Callable[..., Any]:
    graph = fx.Graph()  # a copy, since accumulate_in_place modifies it
    graph.output(graph.graph_copy(program.graph, {}))
    return fx.GraphModule({}, accumulate_in_place(graph))


def _compiled(module: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a program at its first call; fall back to the program itself if compilation fails."""
    compiled = torch.compile(module, dynamic=False)

    def run(*inputs: Tensor) -> Any:
        nonlocal compiled
        try:
            with torch.compiler.set_stance("default"):  # `fixed_state` disables compilation of the model
                return compiled(*inputs)
        except torch._dynamo.exc.TorchDynamoException as error:
            warnings.warn(f"blockhess: torch.compile failed, going on without: {error}".splitlines()[0], stacklevel=2)
            compiled = module
            return module(*inputs)

    return run


def _batched(program: Program, rows: int) -> Callable[..., Any]:
    """Return the program with a leading dimension of tangents, vectorized by vmap and traced again."""
    placeholders = [n.meta["val"] for n in program.graph.find_nodes(op="placeholder")]
    moving = len(program.parameters)
    module = fx.GraphModule({}, program.graph)

    def batched(*inputs: Tensor) -> list[Tensor]:
        def single(*tangents: Tensor) -> list[Tensor]:
            return [p for p in module(*tangents, *inputs[moving:]) if p is not None]

        return vmap(single)(*inputs[:moving])

    with placeholders[0].fake_mode:
        inputs = [
            torch.empty((rows, *p.shape) if i < moving else p.shape, dtype=p.dtype, device=p.device)
            for i, p in enumerate(placeholders)
        ]
        graph = make_fx(batched)(*inputs)
    for node in graph.graph.nodes:
        node.target = RESHAPED.get(node.target, node.target)  # strides may differ from those of the trace
    accumulate_in_place(graph.graph)
    graph.recompile()

    def run(*inputs: Tensor) -> list[Tensor | None]:
        found = iter(graph(*inputs))
        return [next(found) if live else None for live in program.live]

    return run


def _flatten(batch: Any) -> tuple[list[Any], Any]:
    return tree_flatten(map_tensors(lambda t: t, batch))  # any mapping as a dict


def _tensors(batch: Any) -> list[Tensor]:
    return [leaf for leaf in _flatten(batch)[0] if isinstance(leaf, Tensor)]


def _is_plain(batch: Any) -> bool:
    """Return whether a batch holds only tensors, numbers and strings."""
    return all(leaf is None or isinstance(leaf, (Tensor, bool, int, float, str)) for leaf in _flatten(batch)[0])


def _with_tensors(batch: Any, tensors: Sequence[Tensor]) -> Any:
    leaves, spec = _flatten(batch)
    given = iter(tensors)
    return tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def _signature(batch: Any) -> str:
    leaves, spec = _flatten(batch)
    kinds = [(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else repr(x) for x in leaves]
    return f"{spec} {kinds}"
