"""Evaluation of a linear program for the vectors of many blocks together.

A row is one vector of one block. The program is evaluated for all rows at once: a tangent of shape S is a tensor
(rows, *S), whose entry i is the tangent for row i. Only the blocks that a tangent belongs to need rows of it. Rows are
sorted by block, and blocks by the first use of their parameters, so that these rows are consecutive or nearly so. A
tangent is stored as one tensor, from its first row to its last. Rows in between, of other blocks, are zero if anything
reads them, and may hold anything if not.

The first evaluation records: it decides how every operation is computed for its rows (rules.py), takes a buffer of the
pool for every result, calls the kernels and keeps these calls. Later evaluations only repeat the calls: the same
kernels on the same addresses, without views and allocations.
"""

from __future__ import annotations

import itertools
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from blockhess.hvp.traced.operations import Node, TensorInfo
from blockhess.hvp.traced.program import Program, is_node

# Inputs of the program, then results that are not in buffers: the memory of one evaluation.
Slots: TypeAlias = list[Any]
# First row and last row + 1.
Span: TypeAlias = tuple[int, int]


class Pool:
    """Buffers that evaluations share, since only one runs at a time.

    Attributes:
        full: whether the largest evaluation has been recorded.
    """

    def __init__(self) -> None:
        self.full = False
        self._all: list[Tensor] = []
        self._free: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._all)

    def reset(self) -> None:
        """Take all buffers back."""
        self._free = list(self._all)

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """Return a buffer of at least this size: the one used last that is not much larger, or a new one.

        A full pool rather returns a much larger one than it grows.
        """
        nbytes = max(512, nbytes)
        for i in reversed(range(len(self._free))):
            if nbytes <= self._free[i].nbytes <= 2 * nbytes:
                return self._free.pop(i)
        if self.full and (larger := [b for b in self._free if b.nbytes >= nbytes]):
            smallest = min(larger, key=lambda buffer: buffer.nbytes)
            self._free = [b for b in self._free if b is not smallest]
            return smallest
        self._all.append(torch.empty(nbytes, dtype=torch.uint8, device=device))
        return self._all[-1]

    def give(self, buffer: Tensor) -> None:
        """Take one buffer back."""
        self._free.append(buffer)


class _Memory:
    """Memory of values during the recording.

    Attributes:
        place: a buffer of the pool, or the number of a slot.
        values: number of values of the program that lie in it.
    """

    __slots__ = ("place", "values")

    def __init__(self, place: Tensor | int) -> None:
        self.place, self.values = place, 0


class Value:
    """A tangent or constant during the recording.

    Attributes:
        tensor: (rows, *shape) for a tangent, shape for a constant.
        first: number of the first row; 0 for constants.
        get: returns the tensor in a repetition; None if it is `tensor` itself.
        memory: where the tensor lies; None for inputs.
    """

    __slots__ = ("first", "get", "memory", "tensor")

    def __init__(
        self,
        tensor: Tensor,
        first: int = 0,
        get: Callable[[Slots], Tensor] | None = None,
        memory: _Memory | None = None,
    ) -> None:
        self.tensor, self.first, self.get, self.memory = tensor, first, get, memory

    @property
    def rows(self) -> int:
        return self.tensor.shape[0]

    @property
    def getter(self) -> Callable[[Slots], Tensor]:
        """`get`, also for a tensor that is the same in every repetition."""
        if self.get is not None:
            return self.get
        tensor = self.tensor
        return lambda slots: tensor

    def view(self, function: Callable[[Tensor], Tensor], first: int | None = None) -> Value:
        """Return a view of the same memory."""
        get = self.get
        again = None if get is None else lambda slots: function(get(slots))
        return Value(function(self.tensor), self.first if first is None else first, again, self.memory)

    def overlap(self, span: Span) -> Span:
        """Return the rows of a span that this tangent has; empty if first >= last."""
        return max(span[0], self.first), min(span[1], self.first + self.rows)


# Evaluates an operation for the rows of a span; a list for several results.
Rule: TypeAlias = Callable[["Recording", Node, Span], Any]
# First row and rows of the product per parameter; None if it is zero.
Products: TypeAlias = list[tuple[int, Tensor] | None]


class Evaluation:
    """A program for fixed numbers of rows of every block.

    Args:
        program: the program.
        rule: evaluates an operation.
        counts: number of rows of every block, in the order of bits.
        pool: memory.

    Attributes:
        spans: first row and last row + 1 of the tangent of every parameter; None if it has none.
        other_bytes: largest memory of tangents outside of the pool, known after the first evaluation.
    """

    def __init__(self, program: Program, rule: Rule, counts: Sequence[int], pool: Pool) -> None:
        self.program, self.rule, self.pool = program, rule, pool
        self._starts = [0, *itertools.accumulate(counts)]
        self._present = sum(1 << i for i, count in enumerate(counts) if count)
        self.spans = [None if n is None or not self.has(n) else self.span(n) for n in program.tangents]
        self._steps: list[Callable[[Slots], Any]] = []
        # First row, and the rows as a function of the slots.
        self._results: list[tuple[int, Callable[[Slots], Tensor]] | None] = []
        self._size = self.other_bytes = 0

    def has(self, node: Node) -> bool:
        """Return whether a tangent belongs to a block that has rows."""
        return bool(node.meta["blocks"] & self._present)

    def span(self, node: Node) -> Span:
        """Return the rows of a tangent: from the first of its blocks to the last one."""
        bits = node.meta["blocks"] & self._present
        lowest = (bits & -bits).bit_length() - 1
        return self._starts[lowest], self._starts[bits.bit_length()]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor | None]) -> Products:
        """Return first row and rows of the product per parameter, None if it is zero; valid until the next evaluation.

        Args:
            inputs: tangents of the parameters, (rows of spans, *shape), then the constants.
        """
        if not self._size:
            recording = Recording(self, inputs)
            products = recording.run()
            self._results = [None if p is None else (p.first, p.getter) for p in products]
            self._steps, self._size, self.other_bytes = recording.steps, len(recording.slots), recording.other_bytes
            return [None if p is None else (p.first, p.tensor) for p in products]
        slots = [*inputs, *[None] * (self._size - len(inputs))]
        for step in self._steps:
            step(slots)
        return [None if r is None else (r[0], r[1](slots)) for r in self._results]


class Recording:
    """The first evaluation. Rules compute operations by its methods.

    Attributes:
        device: of the inputs.
        values: value of every input and of the results that are still read; a list for several results.
        readers: number of operations and products that have still to read a tangent.
        steps: the calls, as functions of the slots.
        slots: inputs, and results that are not in buffers.
        other_bytes: largest memory of those results.
    """

    def __init__(self, evaluation: Evaluation, inputs: Sequence[Tensor | None]) -> None:
        self._evaluation, self._pool = evaluation, evaluation.pool
        self._program = program = evaluation.program
        self.device = next(t.device for t in inputs if t is not None)
        self.values: dict[Node, Any] = {}
        self.readers: Counter[Node] = Counter()
        self.steps: list[Callable[[Slots], Any]] = []
        self.slots: Slots = list(inputs)
        self.other_bytes = self._bytes = 0
        self._new: list[_Memory] = []  # taken by the current operation
        spans = [*evaluation.spans, *[(0, 0)] * len(program.constants)]
        for i, (node, span, tensor) in enumerate(zip((*program.tangents, *program.constants), spans, inputs)):
            if span is not None and tensor is not None:
                self.values[node] = Value(tensor, span[0], operator.itemgetter(i))

    def run(self) -> list[Value | None]:
        """Evaluate the program; return the product per parameter."""
        self._pool.reset()
        has = self._evaluation.has
        schedule = [(node, sources) for node, sources in self._program.schedule if has(node)]
        products = [node if node is not None and has(node) else None for node in self._program.products]
        for _, sources in schedule:
            self.readers.update(sources)
        self.readers.update(node for node in products if node is not None)
        for node, sources in schedule:
            self._new = []
            self.values[node] = value = self._evaluate(node)
            for memory in _memories(value):
                memory.values += 1
            for memory in self._new:
                self._free(memory)
            for source in sources:
                self.readers[source] -= 1
                if not self.readers[source]:
                    for memory in _memories(self.values.pop(source, None)):
                        memory.values -= 1
                        self._free(memory)
        return [None if node is None else self.values[node] for node in products]

    def _evaluate(self, node: Node) -> Any:
        return self._evaluation.rule(self, node, self._evaluation.span(node))

    def _free(self, memory: _Memory) -> None:
        """Let memory be used again if no value lies in it."""
        place = memory.place
        if memory.values == 0 and isinstance(place, Tensor):
            self._pool.give(place)
        elif memory.values == 0:
            self._bytes -= _nbytes(self.slots[place])
            self.slots[place] = None
            self.steps.append(lambda slots: slots.__setitem__(place, None))

    # Operands.

    def moves(self, value: Any) -> bool:
        """Return whether an argument of an operation is a tangent."""
        return is_node(value) and value not in self._program.constants

    def rows(self, node: Node, span: Span) -> Value:
        """Return the rows of a tangent in a span, (last - first, *shape); those that it does not have are zero."""
        value: Value = self.values[node]
        (first, last), start, count = span, value.first, value.rows
        if start == first and count == last - first:
            return value
        if start <= first and last <= start + count:
            return value.view(lambda t: t[first - start : last - start], first)
        padded = self.buffer((last - first, *value.tensor.shape[1:]), value.tensor, first)
        self.do(torch.Tensor.zero_, padded)
        low, high = value.overlap(span)
        if low < high:
            part, target = self.rows(node, (low, high)), padded.tensor[low - first : high - first]
            self.do(lambda t: target.copy_(t), part)
        return padded

    def operand(self, node: Node, span: Span) -> Value:
        """Return the rows of a tangent in a span, or a constant."""
        return self.rows(node, span) if self.moves(node) else self.values[node]

    # Calls.

    def buffer(self, shape: Sequence[int], like: Tensor | TensorInfo, first: int) -> Value:
        """Return an uninitialized value (rows, *shape) from row `first`, with the dtype of another."""
        nbytes = prod(shape) * like.itemsize
        memory = self._pool.take(nbytes, self.device)
        self._new.append(_Memory(memory))
        return Value(memory[:nbytes].view(like.dtype).view(tuple(shape)), first, None, self._new[-1])

    def do(self, function: Callable[..., Any], *values: Value, **options: Any) -> None:
        """Call a function of tensors that writes into a buffer, now and in repetitions."""
        tensors, getters = [v.tensor for v in values], [v.get for v in values]
        function(*tensors, **options)
        if not any(getters):
            self.steps.append(lambda slots: function(*tensors, **options))
            return
        # Tensors of inputs must not be kept.
        given = [(None, get) if get else (tensor, None) for tensor, get in zip(tensors, getters)]
        self.steps.append(lambda slots: function(*[get(slots) if get else t for t, get in given], **options))

    def new(self, function: Callable[..., Any], first: int, *values: Value) -> Any:
        """Call a function that returns a new tensor, or several, now and in repetitions."""
        index = len(self.slots)
        found = function(*(v.tensor for v in values))
        getters = [v.getter for v in values]

        def step(slots: Slots) -> None:
            slots[index] = function(*[get(slots) for get in getters])

        self.steps.append(step)
        self.slots.append(found)
        self._bytes += _nbytes(found)
        self.other_bytes = max(self.other_bytes, self._bytes)
        memory = _Memory(index)
        self._new.append(memory)
        if isinstance(found, (tuple, list)):

            def getter(i: int) -> Callable[[Slots], Tensor]:
                return lambda slots: slots[index][i]

            return [None if t is None else Value(t, first, getter(i), memory) for i, t in enumerate(found)]
        return Value(found, first, operator.itemgetter(index), memory)


def _memories(value: Any) -> list[_Memory]:
    parts = value if isinstance(value, list) else [value]
    return [part.memory for part in parts if part is not None and part.memory is not None]


def _nbytes(value: Any) -> int:
    parts = value if isinstance(value, (tuple, list)) else [value]
    return sum(part.nbytes for part in parts if part is not None)
