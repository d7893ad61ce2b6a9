"""Hessian-vector products by linear programs, see linearize.py.

The gradient of the first batch is traced. The trace serves every batch of the same shapes whose gradient it reproduces;
other batches get their own trace. Constants are evaluated once per batch.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_flatten

from blockhess.hvp.operator import Column, PerBatch, norm
from blockhess.hvp.traced.linearize import Linearizer
from blockhess.hvp.traced.operations import VIEWS, NotTraceable, TensorInfo, aten
from blockhess.hvp.traced.rows import Evaluation, Pool
from blockhess.hvp.traced.rules import evaluate
from blockhess.hvp.traced.trace import Trace, eliminate_dead_code, trace_gradient
from blockhess.problem.batches import map_tensors, signature, tensors
from blockhess.problem.problem import Problem

# Evaluations that a trace keeps, one per combination of numbers of rows; each is a list of about a thousand calls.
MOST_EVALUATIONS = 1000


class TracedEngine:
    """Products with all blocks and vectors at once, by a linear program.

    Args:
        problem: model, loss, data, blocks.
        retain: keep the constants of all batches; otherwise evaluate them again whenever a batch is selected.
        rows: largest number of vectors, of one block each, per evaluation of the program.
        gauss_newton: multiply by the generalized Gauss-Newton matrix instead of the Hessian, see ggn.py.

    Raises:
        NotTraceable: the gradient cannot be traced, or contains an operation without a tangent.
    """

    def __init__(self, problem: Problem, retain: bool = True, rows: int = 1, gauss_newton: bool = False) -> None:
        self.name = "ggn" if gauss_newton else "traced"
        self.rows, self._gauss_newton = rows, gauss_newton
        self._problem = problem
        self._pool = Pool()
        self._traces: list[_Trace] = []
        # Raises NotTraceable before any product.
        self._trace_of = trace_of = [self._find(index) for index in range(len(problem.batches))]
        self._values = PerBatch(lambda index: trace_of[index].constants(problem.batches[index]), retain)

    def _find(self, index: int) -> _Trace:
        """Return the trace of a batch: an earlier one of the same shapes that reproduces its gradient, or a new one."""
        batch = self._problem.batches[index]
        fitting = [t for t in self._traces if t.reusable and t.signature == signature(batch)]
        found = next((trace for trace in fitting if self._agrees(trace, index)), None)
        if found is None:
            found = _Trace(self._problem, batch, self._gauss_newton)
            if not self._agrees(found, index):
                raise NotTraceable("the gradient that was traced is not that of autograd")
            self._traces.append(found)
        return found

    def _agrees(self, trace: _Trace, index: int) -> bool:
        """Return whether a trace reproduces the gradient of a batch."""
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
            traced[name].shape == g.shape and norm(traced[name] - g) <= eps**0.5 * norm(g) + noise * g.numel() ** 0.5
            for name, g in gradients.items()
        )

    @property
    def retain(self) -> bool:
        """Whether the constants of all batches are kept."""
        return self._values.retain

    @retain.setter
    def retain(self, value: bool) -> None:
        self._values.retain = value

    @property
    def capturable(self) -> bool:
        return self.retain or len(self._problem.batches) == 1

    def prepare(self, index: int) -> None:
        self._trace = self._trace_of[index]
        self._values.select(index)

    def multiply(self, columns: Sequence[Column], share: float) -> Iterator[int]:
        trace = self._trace
        waiting = [column for column in columns if trace.live[column.number]]
        waiting.sort(key=lambda column: trace.position[column.number])
        while waiting:
            chunk, rest = _divided(waiting, self.rows)
            try:
                self._multiply(chunk, share)
            except torch.OutOfMemoryError:
                on_gpu = self._problem.device.type == "cuda"
                if self.rows == 1 or (on_gpu and torch.cuda.is_current_stream_capturing()):
                    raise  # a capture can neither release memory nor start again
                chunk = []
            if chunk:
                waiting = rest
                yield sum(len(column.vectors) for column in chunk)
            else:  # outside of the exception handler, whose traceback references tensors
                self._shrink()

    def _multiply(self, columns: Sequence[Column], share: float) -> None:
        """Add the products of columns by one evaluation; their vectors are its rows, in the order of the blocks."""
        trace = self._trace
        counts = [0] * len(trace.position)
        strides: list[tuple[int, ...]] = []  # of the rows that are read where they lie, see _tangents
        for column in columns:
            counts[trace.position[column.number]] += len(column.vectors)
            strides.append((len(column.vectors), *column.vectors.stride()) if len(column.vectors) > 1 else (1,))
        evaluation = trace.evaluation(tuple(counts), tuple(strides), self._pool)
        products = evaluation([*self._tangents(evaluation, columns), *self._values.value])
        self._pool.full |= sum(counts) == self.rows
        row = 0
        for column in columns:
            block, found = self._problem.blocks[column.number], {}
            last = row + len(column.vectors)
            for name in block.parameters:
                product = products[trace.order[name]]
                if product is not None and trace.has(column.number, trace.program.products[trace.order[name]]):
                    first, tensor = product
                    found[name] = tensor[row - first : last - first]
            block.accumulate(found, column.products, share)
            row = last

    def _tangents(self, evaluation: Evaluation, columns: Sequence[Column]) -> list[Tensor | None]:
        """Return the vectors as tangents (rows, *shape) of the parameters; None if no product needs them."""
        trace, parameters = self._trace, self._problem.parameters
        parts: list[list[tuple[int, Tensor]]] = [[] for _ in parameters]
        row = 0
        for column in columns:
            for name, tangent in self._problem.blocks[column.number].spread(column.vectors, parameters).items():
                if trace.has(column.number, trace.program.tangents[trace.order[name]]):
                    parts[trace.order[name]].append((row, tangent))
            row += len(column.vectors)
        tangents: list[Tensor | None] = []
        for span, own in zip(evaluation.spans, parts):
            if span is None:
                tangents.append(None)
            elif len(own) == 1:
                tangents.append(own[0][1])
            else:
                whole = own[0][1].new_zeros(span[1] - span[0], *own[0][1].shape[1:])
                for row, tangent in own:
                    whole[row - span[0] : row - span[0] + len(tangent)] = tangent
                tangents.append(whole)
        return tangents

    def _shrink(self) -> None:
        """Multiply half as many vectors together from now on, since memory ran out."""
        self.rows //= 2
        self._pool = Pool()
        for trace in self._traces:
            trace.forget()
        if self._problem.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def constant_bytes(self) -> int:
        """Size of the constants of the largest batch."""
        return max(trace.nbytes for trace in self._traces)

    @property
    def tangent_bytes(self) -> int:
        """Memory of the tangents of one vector of the block that is used first."""
        trace = self._traces[0]
        live = [number for number, is_live in enumerate(trace.live) if is_live]
        return self.dry_run({min(live, key=trace.position.__getitem__): 1}) if live else 0

    def dry_run(self, counts: Mapping[int, int]) -> int:
        """Evaluate a product without data, on tensors of the device "meta", for the largest batch.

        Args:
            counts: number of vectors by number of the block.

        Returns:
            Memory of tangents in bytes.
        """
        return max(self._traces, key=lambda trace: trace.nbytes).dry_run(counts)


def _divided(columns: Sequence[Column], size: int) -> tuple[list[Column], list[Column]]:
    """Return the first `size` vectors of columns, and the others."""
    first: list[Column] = []
    for i, column in enumerate(columns):
        if len(column.vectors) > size:
            parts = [
                Column(column.number, *pair)
                for pair in zip(*((t[:size], t[size:]) for t in (column.vectors, column.products)))
            ]
            return [*first, parts[0]] if size else first, [parts[1], *columns[i + 1 :]]
        first.append(column)
        size -= len(column.vectors)
    return first, []


class _Trace:
    """The traced gradient of one batch, and the program of the products with all blocks.

    Attributes:
        names: the parameters, in the order of the trace.
        order: index of a parameter among them.
        signature: structure, shapes and dtypes of the batch.
        reusable: whether the batch is an input of the trace.
        position: number of a block -> its bit in the program; blocks are sorted by the first use of their parameters.
        program: the products with all blocks.
        live: for every block, whether its product is not zero.
    """

    def __init__(self, problem: Problem, batch: Any, gauss_newton: bool) -> None:
        self._problem, self._gauss_newton = problem, gauss_newton
        self.names = list(problem.parameters)
        self.order = {name: i for i, name in enumerate(self.names)}
        self.signature = signature(batch)
        self.reusable = self.signature is not None
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
        self.position = self._sorted_blocks(linearizer.first_uses)
        bits = [0] * len(self.names)
        for number, block in enumerate(problem.blocks):
            for name in block.parameters:
                bits[self.order[name]] |= 1 << self.position[number]
        self.program = linearizer.program(bits)
        live = functools.reduce(operator.or_, (n.meta["blocks"] for n in self.program.products if n is not None), 0)
        self.live = [bool(live >> self.position[l] & 1) for l in range(len(problem.blocks))]
        self._constant_nodes = list(self.program.constants.values())
        builder = linearizer.constants
        builder.graph.output(self._constant_nodes)
        eliminate_dead_code(builder.graph)
        self._constants = Trace(builder.graph, builder.attributes)
        self._evaluations: dict[tuple[tuple[Any, ...], ...], Evaluation] = {}

    def _sorted_blocks(self, first_uses: Sequence[int]) -> dict[int, int]:
        """Return the position of every block in the order of the first use of its parameters."""
        first = [min(first_uses[self.order[name]] for name in block.parameters) for block in self._problem.blocks]
        return {number: i for i, number in enumerate(sorted(range(len(first)), key=first.__getitem__))}

    def _traced(self, batch: Any) -> Trace:
        def gradient(parameters: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
            given = _with_tensors(batch, tensors) if self.reusable else batch
            found = self._problem.gradients_at(given, dict(zip(self.names, parameters)), self._gauss_newton)
            self._gradient_names = list(found)
            return list(found.values())

        return trace_gradient(gradient, *self._inputs(batch), values=not self.reusable)

    def _inputs(self, batch: Any) -> tuple[list[Tensor], list[Tensor]]:
        parameters = [p.detach() for p in self._problem.parameters.values()]
        return parameters, _tensors(batch) if self.reusable else []

    def gradients(self, batch: Any) -> dict[str, Tensor]:
        """Evaluate the traced gradient for a batch."""
        with torch.no_grad():
            parameters, tensors = self._inputs(batch)
            return dict(zip(self._gradient_names, self._gradient(*parameters, *tensors)))

    def constants(self, batch: Any) -> list[Tensor]:
        """Evaluate the constants for a batch, on the device of the parameters."""
        parameters, tensors = self._inputs(batch)
        with torch.no_grad():
            return [value.to(self._problem.device) for value in self._constants(*parameters, *tensors)]

    def has(self, number: int, node: fx.Node | None) -> bool:
        """Return whether a node of the program belongs to a block."""
        return node is not None and bool(node.meta["blocks"] >> self.position[number] & 1)

    def evaluation(self, counts: tuple[int, ...], strides: tuple[tuple[int, ...], ...], pool: Pool) -> Evaluation:
        """Return the evaluation for these numbers of rows of every block, by position, and strides of the columns.

        What is recorded holds for tangents that lie in memory as those of the first evaluation did.
        """
        key = counts, strides
        if key not in self._evaluations:
            if len(self._evaluations) >= MOST_EVALUATIONS:
                del self._evaluations[next(iter(self._evaluations))]
            self._evaluations[key] = Evaluation(self.program, evaluate, counts, pool)
        return self._evaluations[key]

    def forget(self) -> None:
        """Free the recorded evaluations."""
        self._evaluations.clear()

    @property
    def nbytes(self) -> int:
        """Size of the constants, without parameters and data."""
        sizes: dict[fx.Node, int] = {}
        views = VIEWS | {aten.expand.default}
        for node in self._constant_nodes:
            while node.op == "call_function" and node.target in views and isinstance(node.args[0], fx.Node):
                node = node.args[0]
            if node.op == "call_function":
                value = node.meta["val"]
                sizes[node] = sum(v.numel() * v.itemsize for v in tree_flatten(value)[0] if isinstance(v, TensorInfo))
        return sum(sizes.values())

    def dry_run(self, counts: Mapping[int, int]) -> int:
        """Return the memory of tangents for numbers of vectors by number of the block, see `TracedEngine.dry_run`."""
        given = [0] * len(self.position)
        for number, count in counts.items():
            given[self.position[number]] = count if self.live[number] else 0
        pool = Pool()
        evaluation = Evaluation(self.program, evaluate, given, pool)
        inputs: list[Tensor | None] = [
            None if node is None or span is None else _meta(node.meta["val"], (span[1] - span[0],))
            for node, span in zip(self.program.tangents, evaluation.spans)
        ]
        evaluation([*inputs, *(_meta(node.meta["val"]) for node in self._constant_nodes)])
        return pool.nbytes + evaluation.other_bytes


def _meta(like: Tensor, lead: tuple[int, ...] = ()) -> Tensor:
    return torch.empty((*lead, *like.shape), dtype=like.dtype, device="meta")


def _tensors(batch: Any) -> list[Tensor]:
    return list({id(t): t for t in tensors(batch)}.values())


def _with_tensors(batch: Any, values: Sequence[Tensor]) -> Any:
    given = iter(values)
    return map_tensors(lambda _: next(given), batch)
