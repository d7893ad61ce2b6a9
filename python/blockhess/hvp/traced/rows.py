"""Evaluation of a linear program for many rows at once: one row per block and probe, in the order of the blocks.

A tangent of the program, of shape S, becomes a tensor (rows, *S) with the rows of the blocks that it belongs to. Those
are consecutive or nearly so; rows in between, of blocks that it does not belong to, are zero where anything reads them.

The first evaluation chooses a method for every operation and a buffer for every result, and records the calls. Later
ones repeat the calls: the same kernels on the same addresses, without views and allocations.
"""

from __future__ import annotations

import itertools
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from blockhess.hvp.traced.operations import SPLITS, VIEWS, aten
from blockhess.hvp.traced.program import Program, combine, is_node, multiply, summed
from blockhess_ext import ops

# Input 0 ... n-1 are tangents and constants, later ones results that are not in buffers.
Slots = list[Any]

_LARGEST_SUM = 16  # terms of ops.linear_combination


class Pool:
    """Buffers that evaluations share, since only one runs at a time."""

    def __init__(self) -> None:
        self._all: list[Tensor] = []
        self._free: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        return sum(len(buffer) for buffer in self._all)

    def reset(self) -> None:
        """Take all buffers back."""
        self._free = list(self._all)

    def take(self, nbytes: int, device: torch.device) -> Tensor:
        """Return a buffer of at least this size: the one used last that is not much larger, or a new one."""
        for i in reversed(range(len(self._free))):
            if nbytes <= len(self._free[i]) <= 2 * nbytes:
                return self._free.pop(i)
        self._all.append(torch.empty(max(512, nbytes), dtype=torch.uint8, device=device))
        return self._all[-1]

    def give(self, buffer: Tensor) -> None:
        """Take one buffer back."""
        self._free.append(buffer)


class _Value:
    """A tensor during the recording.

    Attributes:
        tensor: its value.
        first: its first row; 0 for constants.
        get: returns its value in a repetition; None if it is the same tensor.
        buffer: memory of the pool or number of the slot that it lies in, and the number of values that lie there.
    """

    __slots__ = ("tensor", "first", "get", "buffer")

    def __init__(
        self,
        tensor: Tensor,
        first: int = 0,
        get: Callable[[Slots], Tensor] | None = None,
        buffer: list[Any] | None = None,
    ) -> None:
        self.tensor, self.first, self.get, self.buffer = tensor, first, get, buffer

    @property
    def rows(self) -> int:
        return self.tensor.shape[0]

    def view(self, function: Callable[[Tensor], Tensor], first: int | None = None) -> _Value:
        """Return a view of the same memory."""
        get = self.get
        again = None if get is None else lambda slots: function(get(slots))
        return _Value(function(self.tensor), self.first if first is None else first, again, self.buffer)


class Evaluation:
    """A program for fixed numbers of rows of every block.

    Args:
        program: the program.
        counts: number of rows of every block, in the order of bits.
        pool: memory.

    Attributes:
        spans: first and last + 1 row of the tangent of every parameter; None if it has none.
        other_bytes: largest memory of tangents outside of the pool, known after the first evaluation.
    """

    def __init__(self, program: Program, counts: Sequence[int], pool: Pool) -> None:
        self._program, self._pool = program, pool
        self._starts = [0, *itertools.accumulate(counts)]
        self._present = sum(1 << i for i, count in enumerate(counts) if count)
        self.spans = [None if n is None or not self._active(n) else self._span(n) for n in program.tangents]
        self._steps: list[Callable[[Slots], Any]] = []
        self._results: list[_Value | None] = []
        self._size = self.other_bytes = self._outside = 0

    def _active(self, node: fx.Node) -> bool:
        return bool(node.meta["blocks"] & self._present)

    def _span(self, node: fx.Node) -> tuple[int, int]:
        bits = node.meta["blocks"] & self._present
        lowest = (bits & -bits).bit_length() - 1
        return self._starts[lowest], self._starts[bits.bit_length()]

    @torch.no_grad()
    def __call__(self, inputs: Sequence[Tensor | None]) -> list[tuple[int, Tensor] | None]:
        """Return first row and rows of the product per parameter, None if it is zero; valid until the next evaluation.

        Args:
            inputs: tangents of the parameters, (rows of spans, *shape), then the constants.
        """
        if not self._size:
            return self._record(inputs)
        slots = [*inputs, *[None] * (self._size - len(inputs))]
        for step in self._steps:
            step(slots)
        return [None if r is None else (r.first, r.tensor if r.get is None else r.get(slots)) for r in self._results]

    def _record(self, inputs: Sequence[Tensor | None]) -> list[tuple[int, Tensor] | None]:
        self._pool.reset()
        self._slots: Slots = list(inputs)
        self._device = next(t.device for t in inputs if t is not None)
        self._env: dict[fx.Node, Any] = {}
        program = self._program
        for i, (node, span) in enumerate(zip(program.tangents, self.spans)):
            if node is not None and span is not None:
                self._env[node] = _Value(inputs[i], span[0], operator.itemgetter(i))  # type: ignore[arg-type]
        for i, node in enumerate(program.constants, len(program.tangents)):
            self._env[node] = _Value(inputs[i], 0, operator.itemgetter(i))  # type: ignore[arg-type]
        schedule = [(n, sources) for n, sources in program.schedule if self._active(n)]
        products = [n if n is not None and self._active(n) else None for n in program.products]
        self._left: dict[fx.Node, int] = defaultdict(int)
        for used in (*(sources for _, sources in schedule), [n for n in products if n is not None]):
            for source in used:
                self._left[source] += 1
        for node, sources in schedule:
            self._fresh: list[list[Any]] = []
            value = self._evaluate(node)
            self._env[node] = value
            for each in value if isinstance(value, list) else [value]:
                if each is not None and each.buffer is not None:
                    each.buffer[1] += 1
            for buffer in self._fresh:
                self._free(buffer)
            for source in sources:
                self._left[source] -= 1
                if not self._left[source]:
                    self._release(source)
        self._results = [None if n is None else self._env[n] for n in products]
        found = [None if r is None else (r.first, r.tensor) for r in self._results]
        self._size = len(self._slots)
        del self._env, self._left, self._slots
        return found

    def _release(self, node: fx.Node) -> None:
        value = self._env.pop(node, None)
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each.buffer is not None:
                each.buffer[1] -= 1
                self._free(each.buffer)

    def _free(self, buffer: list[Any]) -> None:
        """Let memory be used again if no value lies in it."""
        memory, values = buffer
        if values == 0 and isinstance(memory, Tensor):
            self._pool.give(memory)
        elif values == 0:
            self._outside -= _nbytes(self._slots[memory])
            self._slots[memory] = None
            self._steps.append(lambda slots: slots.__setitem__(memory, None))

    # Calls.

    def _buffer(self, shape: Sequence[int], like: Tensor, first: int) -> _Value:
        """Return an uninitialized value."""
        nbytes = prod(shape) * like.itemsize
        memory = self._pool.take(nbytes, self._device)
        self._fresh.append([memory, 0])
        return _Value(memory[:nbytes].view(like.dtype).view(tuple(shape)), first, None, self._fresh[-1])

    def _do(self, function: Callable[..., Any], *values: _Value, **options: Any) -> None:
        """Call a function of tensors that writes into a buffer, now and in repetitions."""
        function(*(v.tensor for v in values), **options)
        given = [(v.tensor, v.get) if v.get is None else (None, v.get) for v in values]
        if all(get is None for _, get in given):
            tensors = [tensor for tensor, _ in given]
            self._steps.append(lambda slots: function(*tensors, **options))
        else:
            self._steps.append(
                lambda slots: function(*[t if get is None else get(slots) for t, get in given], **options)
            )

    def _new(self, function: Callable[..., Any], first: int, *values: _Value) -> Any:
        """Call a function that returns new tensors, now and in repetitions."""
        index = len(self._slots)
        self._slots.append(function(*(v.tensor for v in values)))
        getters = [v.get or (lambda slots, tensor=v.tensor: tensor) for v in values]

        def step(slots: Slots) -> None:
            slots[index] = function(*[get(slots) for get in getters])

        self._steps.append(step)
        found = self._slots[index]
        self._outside += _nbytes(found)
        self.other_bytes = max(self.other_bytes, self._outside)
        buffer = [index, 0]
        self._fresh.append(buffer)
        if isinstance(found, (tuple, list)):
            return [
                None if part is None else _Value(part, first, lambda slots, i=i: slots[index][i], buffer)
                for i, part in enumerate(found)
            ]
        return _Value(found, first, operator.itemgetter(index), buffer)

    # Operands.

    def _rows(self, node: fx.Node, span: tuple[int, int]) -> _Value:
        """Return rows first ... last - 1 of a tangent, which has them."""
        value: _Value = self._env[node]
        first, last = span
        if value.first == first and value.rows == last - first:
            return value
        start = value.first
        if start <= first and last <= start + value.rows:
            return value.view(lambda t: t[first - start : last - start], first)
        padded = self._buffer((last - first, *value.tensor.shape[1:]), value.tensor, first)
        self._do(torch.Tensor.zero_, padded)
        low, high = max(first, start), min(last, start + value.rows)
        if low < high:
            part, target = self._rows(node, (low, high)), padded.tensor[low - first : high - first]
            self._do(lambda t: target.copy_(t), part)
        return padded

    def _moves(self, value: Any) -> bool:
        """Return whether an argument is a tangent."""
        return is_node(value) and value not in self._program.constants

    def _evaluate(self, node: fx.Node) -> Any:
        target, args, span = node.target, node.args, self._span(node)
        if target is operator.getitem:
            return self._env[args[0]][args[1]]
        if target is combine:
            return self._combine(node, span)
        if target in (aten.sum.dim_IntList, aten.sum.default):
            return self._sum(node, span)
        if target is multiply:
            return self._multiply(node, span)
        if target in VIEWS or target is aten.expand.default:
            return self._view(node, self._rows(args[0], span))
        if target in SPLITS:
            return self._split(node, self._rows(args[0], span))
        rule = {
            aten.embedding.default: self._embedding,
            aten.embedding_dense_backward.default: self._embedding_backward,
            aten.convolution.default: self._convolution,
            aten.convolution_backward.default: self._convolution_backward,
            aten.cat.default: self._cat,
            aten.slice_backward.default: self._embedded,
            aten.select_backward.default: self._embedded,
        }.get(target)
        found = None if rule is None else rule(node, span)
        return self._any(node, span) if found is None else found

    # Sums of products with constants.

    def _combine(self, node: fx.Node, span: tuple[int, int], summed: fx.Node | None = None) -> _Value:
        """Evaluate a combination, or its sum over the last dimension."""
        first, last = span
        shape = node.meta["val"].shape
        names: list[fx.Node] = []
        bases: list[_Value] = []
        coefficients: list[_Value | None] = []
        scalars: list[float] = []
        for base, coefficient, scalar in zip(*node.args):
            if base not in self._env:  # it belongs to other blocks
                continue
            value = self._env[base]
            low, high = max(first, value.first), min(last, value.first + value.rows)
            if low >= high:
                continue
            lead = (high - low, *(1,) * (len(shape) - value.tensor.dim() + 1))
            value = self._rows(base, (low, high))
            if len(lead) > 1:
                value = value.view(lambda t, lead=lead: t.reshape(*lead, *t.shape[1:]))
            names.append(base)
            bases.append(value)
            scalars.append(scalar)
            coefficients.append(None)
            if coefficient is not None:
                constant = self._env[coefficient]
                ones = (1,) * (len(shape) - constant.tensor.dim())
                coefficients[-1] = constant.view(lambda t, ones=ones: t.reshape(*ones, *t.shape)) if ones else constant
        like = node.meta["val"]
        if summed is not None:
            out = self._buffer((last - first, *shape[:-1], 1), like, first)
        else:
            out = self._in_place(node, dict(zip(names, bases)), span) or self._like(
                bases, (last - first, *shape), like, first
            )
        offsets = [value.first - first for value in bases]
        function = ops.linear_combination if summed is None else ops.linear_combination_sum
        values = [*bases, *(c for c in coefficients if c is not None)]
        tensors = [v.tensor for v in values]
        has = [c is not None for c in coefficients]
        if any(t.dtype != like.dtype for t in tensors) or len(bases) > _LARGEST_SUM:
            function = _combined if summed is None else _combined_sum
        n, target = len(bases), out.tensor

        def call(*given: Tensor) -> None:
            rest = iter(given[n:])
            function(target, list(given[:n]), [next(rest) if h else None for h in has], scalars, offsets)

        if all(v.get is None for v in values):
            constants = iter(tensors[n:])
            arguments = (tensors[:n], [next(constants) if h else None for h in has], scalars, offsets)
            self._do(lambda: function(target, *arguments))
        else:
            self._do(call, *values)
        if summed is not None and not summed.meta["val"].dim() == len(shape):
            return out.view(lambda t: t[..., 0])
        return out

    def _in_place(self, node: fx.Node, bases: dict[fx.Node, _Value], span: tuple[int, int]) -> _Value | None:
        """Return a base that nothing else reads, of the shape of the result, to be overwritten."""
        for name, value in bases.items():
            whole = value.buffer is not None and value.buffer[1] == 1 and self._left[name] == 1
            if whole and value.get is None and value.tensor.shape == (span[1] - span[0], *node.meta["val"].shape):
                if 0 not in value.tensor.stride() and value.tensor.dtype == node.meta["val"].dtype:
                    return _Value(value.tensor, value.first, None, value.buffer)
        return None

    def _like(self, bases: Sequence[_Value], shape: tuple[int, ...], like: Tensor, first: int) -> _Value:
        """Return a buffer whose dimensions lie in memory in the same order as those of a base of full size."""
        for value in bases:
            if value.tensor.shape[1:] == shape[1:] and not value.tensor.is_contiguous():
                strides = value.tensor.stride()
                order = sorted(range(len(shape)), key=lambda d: -strides[d])
                back = sorted(range(len(shape)), key=order.__getitem__)
                return self._buffer([shape[d] for d in order], like, first).view(lambda t: t.permute(back))
        return self._buffer(shape, like, first)

    def _sum(self, node: fx.Node, span: tuple[int, int]) -> _Value:
        source = summed(node)
        if source is not None:
            return self._combine(source, span, node)
        value, like = self._rows(node.args[0], span), node.meta["val"]
        dims = [d % (value.tensor.dim() - 1) + 1 for d in (node.args[1] if len(node.args) > 1 else [])]
        keep = len(node.args) > 2 and node.args[2]
        out = self._buffer((value.rows, *like.shape), like, value.first)
        if value.tensor.dim() == 1:
            self._do(lambda t, out: out.copy_(t), value, out)
        else:
            target, dims = out.tensor, dims or list(range(1, value.tensor.dim()))
            self._do(lambda t: torch.sum(t, dims, keepdim=keep, dtype=target.dtype, out=target), value)
        return out

    # Matrix products.

    def _multiply(self, node: fx.Node, span: tuple[int, int]) -> _Value:
        pairs = [(a, b, scalar) for (a, b), scalar in zip(*node.args) if (a if self._moves(a) else b) in self._env]
        if node.meta["val"].dim() == 3 and span[1] - span[0] > 1:
            return self._bmm(node, pairs, span)
        out = self._buffer((span[1] - span[0], *node.meta["val"].shape), node.meta["val"], span[0])
        written = [False] * (span[1] - span[0])
        for a, b, scalar in pairs:
            value = self._env[a if self._moves(a) else b]
            low, high = max(span[0], value.first), min(span[1], value.first + value.rows)
            for first, last, old in _runs(written, low - span[0], high - span[0]):
                rows, target = (first + span[0], last + span[0]), out.tensor[first:last]
                x, y = (self._rows(f, rows) if self._moves(f) else self._env[f] for f in (a, b))
                self._product(x, y, self._moves(a), target, old, scalar)
                written[first:last] = [True] * (last - first)
        for first, last, old in _runs(written, 0, len(written)):
            if not old:
                target = out.tensor[first:last]
                self._do(target.zero_)
        return out

    def _product(self, a: _Value, b: _Value, left: bool, out: Tensor, add: bool, scalar: float) -> None:
        """Write or add a matrix product for some rows; `left` tells which factor has rows."""
        rows = len(out)
        if rows == 1:
            a, b = (f.view(lambda t: t[0]) if moves else f for f, moves in ((a, left), (b, not left)))
            out = out[0]
        elif left and a.tensor.is_contiguous():
            k = a.tensor.shape[-1]
            a, out = a.view(lambda t: t.view(-1, k)), out.view(-1, out.shape[-1])
        else:
            a, b = (
                f if moves else f.view(lambda t: t.expand(rows, *t.shape)) for f, moves in ((a, left), (b, not left))
            )
        if not add and scalar == 1.0:
            self._do(torch.mm if out.dim() == 2 else torch.bmm, a, b, out=out)
        else:
            function = torch.addmm if out.dim() == 2 else torch.baddbmm
            self._do(lambda a, b: function(out, a, b, beta=int(add), alpha=scalar, out=out), a, b)

    def _bmm(self, node: fx.Node, pairs: Sequence[tuple[fx.Node, fx.Node, float]], span: tuple[int, int]) -> _Value:
        """Multiply (rows, B, M, K) by (B, K, N), or (B, M, K) by (rows, B, K, N): the rows join dimension M or N."""
        rows = span[1] - span[0]
        n_batch, m, n = node.meta["val"].shape
        out = self._buffer((n_batch, m, rows, n), node.meta["val"], span[0])
        back = (2, 0, 1, 3)
        for i, (a, b, scalar) in enumerate(pairs):
            x, w = (self._rows(a, span), self._env[b]) if self._moves(a) else (self._rows(b, span), self._env[a])
            k = x.tensor.shape[3] if self._moves(a) else x.tensor.shape[2]
            if self._moves(a) and len(pairs) == 1 and _can_view(x.tensor.permute(1, 3, 0, 2), (n_batch, k, rows * m)):
                joined = x.view(lambda t, k=k: t.permute(1, 3, 0, 2).view(n_batch, k, rows * m).mT)
                target, factors, back = out.tensor.view(n_batch, rows * m, n), (joined, w), (1, 0, 2, 3)
                out = out.view(lambda t: t.view(n_batch, rows, m, n))
            else:
                shape = (n_batch, m * rows, k) if self._moves(a) else (n_batch, k, rows * n)
                if not _can_view(x.tensor.permute(1, 2, 0, 3), shape):
                    x = self._copied(x, (1, 2, 0, 3))
                joined = x.view(lambda t, shape=shape: t.permute(1, 2, 0, 3).view(shape))
                factors = (joined, w) if self._moves(a) else (w, joined)
                target = out.tensor.view((n_batch, m * rows, n) if self._moves(a) else (n_batch, m, rows * n))
            if i == 0 and scalar == 1.0:
                self._do(torch.bmm, *factors, out=target)
            else:
                options = {"beta": int(i > 0), "alpha": scalar, "out": target}
                self._do(lambda a, b, t=target, o=options: torch.baddbmm(t, a, b, **o), *factors)
        return out.view(lambda t: t.permute(back))

    def _copied(self, x: _Value, order: tuple[int, ...]) -> _Value:
        """Return a copy whose dimensions lie in this order in memory."""
        out = self._buffer([x.tensor.shape[d] for d in order], x.tensor, x.first)
        target, back = out.tensor, sorted(range(len(order)), key=order.__getitem__)
        self._do(lambda t: target.copy_(t.permute(order)), x)
        return out.view(lambda t: t.permute(back))

    # Rearrangements.

    def _view(self, node: fx.Node, value: _Value) -> _Value:
        like = node.meta["val"]
        function = _row_view(node, like)
        found = function(value.tensor)
        if found.untyped_storage()._cdata == value.tensor.untyped_storage()._cdata:
            return value.view(function)
        rows, old = value.rows, value.tensor.shape
        out = self._buffer((rows, *like.shape), like, value.first)
        if rows > 1 and like.dim() == 3 and _feeds_bmm(node):
            out.tensor = out.tensor.view(*like.shape[:2], rows, like.shape[2]).permute(2, 0, 1, 3)
        if not _can_view(out.tensor, old):
            out.tensor = self._contiguous(out)
        target = out.tensor.view(old)
        self._do(lambda t: target.copy_(t), value)
        return out

    @staticmethod
    def _contiguous(value: _Value) -> Tensor:
        shape = value.tensor.shape
        return value.buffer[0][: value.tensor.nbytes].view(value.tensor.dtype).view(shape)  # type: ignore[index]

    def _split(self, node: fx.Node, value: _Value) -> list[_Value]:
        target = node.target
        sizes, dims = [] if target is aten.unbind.int else [node.args[1]], value.tensor.dim() - 1
        place = len(sizes) + 1
        dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
        parts = target(value.tensor, *sizes, dim % dims + 1)
        return [value.view(lambda t, i=i: target(t, *sizes, dim % dims + 1)[i]) for i in range(len(parts))]

    def _cat(self, node: fx.Node, span: tuple[int, int]) -> _Value | None:
        dim = node.args[1] if len(node.args) > 1 else 0
        if any(not self._moves(part) or part not in self._env for part in node.args[0]):
            return None
        parts = [self._rows(part, span) for part in node.args[0]]
        out = self._buffer((span[1] - span[0], *node.meta["val"].shape), node.meta["val"], span[0])
        n, target = node.meta["val"].dim(), out.tensor
        self._do(lambda *tensors: torch.cat(tensors, dim % n + 1, out=target), *parts)
        return out

    def _embedded(self, node: fx.Node, span: tuple[int, int]) -> _Value:
        """Evaluate the adjoint of a slice or selection: a part of a tensor that is zero elsewhere."""
        value, like = self._rows(node.args[0], span), node.meta["val"]
        out = self._buffer((span[1] - span[0], *like.shape), value.tensor, span[0])
        _, _, dim, *bounds = node.args
        forward = aten.slice.Tensor if node.target is aten.slice_backward.default else aten.select.int
        part = forward(out.tensor, dim % like.dim() + 1, *bounds)
        self._do(torch.Tensor.zero_, out)
        self._do(lambda t: part.copy_(t), value)
        return out

    # Other operations.

    def _embedding(self, node: fx.Node, span: tuple[int, int]) -> _Value | None:
        if not self._moves(node.args[0]) or self._moves(node.args[1]):
            return None
        table, index = self._rows(node.args[0], span), self._env[node.args[1]]
        width, shape = table.tensor.shape[2], index.tensor.shape
        out = self._buffer((span[1] - span[0], shape.numel(), width), table.tensor, span[0])
        target = out.tensor
        self._do(lambda t, i: torch.index_select(t, 1, i.reshape(-1), out=target), table, index)
        return out.view(lambda t: t.view(len(t), *shape, width))

    def _embedding_backward(self, node: fx.Node, span: tuple[int, int]) -> _Value | None:
        gradient, index, size, padding, scaled = node.args
        rows = span[1] - span[0]
        if rows > 1 and (padding >= 0 or scaled):
            return None

        def call(g: Tensor, i: Tensor) -> Tensor:
            offsets = torch.arange(rows, device=i.device).mul_(size).view(-1, *(1,) * i.dim())
            target = aten.embedding_dense_backward.default
            return target(g, i + offsets, rows * size, padding, scaled).view(rows, size, g.shape[-1])

        return self._new(call, span[0], self._rows(gradient, span), self._env[index])  # type: ignore[no-any-return]

    def _convolution(self, node: fx.Node, span: tuple[int, int]) -> _Value | None:
        x, w, bias, *options = node.args
        rows, groups, transposed = span[1] - span[0], options[5], options[3]
        target = aten.convolution.default
        if bias is not None:
            return None
        if self._moves(x) and not self._moves(w):

            def of_input(x: Tensor, w: Tensor) -> Tensor:
                return target(x.flatten(0, 1), w, None, *options).unflatten(0, (rows, -1))

            return self._new(of_input, span[0], self._rows(x, span), self._env[w])  # type: ignore[no-any-return]
        if not self._moves(x) and rows > 1 and groups == 1 and not transposed:

            def of_weight(x: Tensor, w: Tensor) -> Tensor:
                return target(x, w.flatten(0, 1), None, *options).unflatten(1, (rows, -1)).transpose(0, 1)

            return self._new(of_weight, span[0], self._env[x], self._rows(w, span))  # type: ignore[no-any-return]
        return None

    def _convolution_backward(self, node: fx.Node, span: tuple[int, int]) -> Any:
        gradient, x, w, sizes, *options = node.args
        rows, mask = span[1] - span[0], options[-1]
        if not self._moves(gradient) or self._moves(w) or self._moves(x) or tuple(mask) != (True, False, False):
            return None
        shape = x.meta["val"].shape

        def call(g: Tensor, w: Tensor) -> list[Tensor | None]:
            like = g.new_empty(()).expand(rows * shape[0], *shape[1:])
            found = aten.convolution_backward.default(g.flatten(0, 1), like, w, sizes, *options)
            return [found[0].unflatten(0, (rows, -1)), None, None]

        return self._new(call, span[0], self._rows(gradient, span), self._env[w])

    def _any(self, node: fx.Node, span: tuple[int, int]) -> Any:
        """Evaluate an operation by vmap, or row by row."""
        leaves, spec = tree_flatten((node.args, dict(node.kwargs)))
        where = [i for i, leaf in enumerate(leaves) if is_node(leaf)]
        moving = [i for i in where if self._moves(leaves[i])]
        missing = [i for i in moving if leaves[i] not in self._env]
        values = [
            self._rows(leaves[i], span) if i in moving else self._env[leaves[i]] for i in where if i not in missing
        ]
        places = [i for i in where if i not in missing]
        dims = [0 if i in moving else None for i in places]
        empty = {i: leaves[i].meta["val"] for i in missing}
        rows, target = span[1] - span[0], node.target
        one_by_one = rows == 1 or target is aten.convolution_backward.default or missing

        views = any(r.alias_info is not None for r in target._schema.returns)  # of memory that is used again

        def single(*tensors: Tensor) -> Any:
            whole = list(leaves)
            for i, like in empty.items():
                whole[i] = torch.zeros(like.shape, dtype=like.dtype, device=self._device)
            for i, tensor in zip(places, tensors):
                whole[i] = tensor
            args, kwargs = tree_unflatten(whole, spec)
            found = target(*args, **kwargs)
            return tree_map_only(Tensor, torch.clone, found) if views else found

        def call(*tensors: Tensor) -> Any:
            nonlocal one_by_one
            if not one_by_one:
                try:
                    return vmap(single, tuple(dims))(*tensors)
                except RuntimeError:  # no rule for this operation
                    one_by_one = True
            found = [single(*(t if d is None else t[r] for t, d in zip(tensors, dims))) for r in range(rows)]
            if isinstance(found[0], Tensor):
                return found[0][None] if rows == 1 else torch.stack(found)
            return [None if part[0] is None else torch.stack(part) for part in zip(*found)]

        return self._new(call, span[0], *values)


def _nbytes(value: Any) -> int:
    parts = value if isinstance(value, (tuple, list)) else [value]
    return sum(part.nbytes for part in parts if part is not None)


def _combined(
    out: Tensor, bases: list[Tensor], coefficients: list[Tensor | None], scalars: list[float], rows: list[int]
) -> None:
    total = torch.zeros_like(out)
    for base, coefficient, scalar, row in zip(bases, coefficients, scalars, rows):
        total[row : row + len(base)] += combine([base], [coefficient], [scalar])
    out.copy_(total)


def _combined_sum(
    out: Tensor, bases: list[Tensor], coefficients: list[Tensor | None], scalars: list[float], rows: list[int]
) -> None:
    size = max(t.shape[-1] for t in (*bases, *coefficients) if t is not None)
    total = out.new_empty(*out.shape[:-1], size)
    _combined(total, bases, coefficients, scalars, rows)
    torch.sum(total, -1, keepdim=True, out=out)


def _runs(flags: Sequence[bool], first: int, last: int) -> list[tuple[int, int, bool]]:
    """Return start, stop and flag of the ranges of equal flags among first ... last - 1."""
    runs, start = [], first
    for flag, group in itertools.groupby(flags[first:last]):
        stop = start + len(list(group))
        runs.append((start, stop, flag))
        start = stop
    return runs


def _can_view(tensor: Tensor, shape: Sequence[int]) -> bool:
    try:
        tensor.view(tuple(shape))
    except RuntimeError:
        return False
    return True


def _feeds_bmm(node: fx.Node) -> bool:
    users = list(node.users)
    users += [again for user in users if user.target is aten.permute.default for again in user.users]
    return any(user.target is multiply for user in users)


def _row_view(node: fx.Node, like: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a view operation for tensors with a leading dimension of rows."""
    target, args = node.target, node.args[1:]
    dims = node.args[0].meta["val"].dim()

    def axis(d: int, n: int = dims) -> int:
        return d % max(n, 1) + 1

    if target is aten.reshape.default:
        return lambda t: t.reshape(len(t), *like.shape)
    if target is aten.expand.default:
        lead = (1,) * (like.dim() - dims)
        return lambda t: t.reshape(len(t), *lead, *t.shape[1:]).expand(len(t), *like.shape)
    if target is aten.permute.default:
        order = (0, *(axis(d) for d in args[0]))
        return lambda t: t.permute(order)
    if target is aten.t.default:
        return lambda t: t.mT if dims == 2 else t
    if target is aten.transpose.int:
        return lambda t: t.transpose(axis(args[0]), axis(args[1]))
    if target is aten.unsqueeze.default:
        return lambda t: t.unsqueeze(axis(args[0], dims + 1))
    if target in (aten.squeeze.dim, aten.squeeze.dims):
        removed = tuple(axis(d) for d in (args[0] if isinstance(args[0], (list, tuple)) else [args[0]]))
        return lambda t: t.squeeze(removed)
    if target is aten.select.int:
        return lambda t: t.select(axis(args[0]), args[1])
    if target is aten.slice.Tensor:
        dim, *bounds = args or (0,)
        return lambda t: aten.slice.Tensor(t, axis(dim), *bounds)
    raise AssertionError(target)
