"""Rules of combinations, sums and matrix products, of which programs mostly consist; see rules.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockhess.hvp.traced.operations import Node, TensorInfo
from blockhess.hvp.traced.program import combine, summed
from blockhess.hvp.traced.rows import Recording, Span, Value
from blockhess_ext import ops

# What ops.linear_combination takes.
_MOST_TERMS, _MOST_DIMS, _DTYPES = 16, 8, (torch.float32, torch.float64)


# Combinations and sums.


def combination(r: Recording, node: Node, span: Span, sum_node: Node | None = None) -> Value:
    """Evaluate sum_i scalar_i * coefficient_i * base_i, or, for a node `sum_node`, its sum over the last dimension.

    Every base is a tensor of its own rows, which are some of those of the result, (rows, *shape). Base and coefficient
    broadcast to `shape`.
    """
    (first, last), like = span, node.meta["val"]
    shape, dims = (last - first, *like.shape), like.dim()
    names: list[Node] = []
    bases: list[Value] = []
    coefficients: list[Value] = []
    scalars: list[float] = []
    has: list[bool] = []
    for base, coefficient, scalar in zip(*node.args):
        value = r.values.get(base)
        low, high = (0, 0) if value is None else value.overlap(span)
        if low >= high:  # it belongs to other blocks
            continue
        value = r.rows(base, (low, high))
        names.append(base)
        bases.append(_with_dims(value, dims + 1, 1))
        scalars.append(scalar)
        has.append(coefficient is not None)
        if coefficient is not None:
            coefficients.append(_with_dims(r.values[coefficient], dims, 0))
    if sum_node is not None:
        out = r.buffer((*shape[:-1], 1), like, first)
    else:
        out = _overwritten(r, names, bases, shape, like.dtype) or _arranged_like(r, bases, shape, like, first)
    if sum_node is not None and all(v.tensor.shape[-1] == 1 for v in (*bases, *coefficients)):
        # Terms of other blocks, which these rows lack, may be what the others broadcast to.
        scalars = [scalar * like.shape[-1] for scalar in scalars]
    offsets = [value.first - first for value in bases]
    function: Callable[..., None] = ops.linear_combination if sum_node is None else ops.linear_combination_sum
    fits = len(bases) <= _MOST_TERMS and dims < _MOST_DIMS and like.dtype in _DTYPES
    if not fits or any(v.tensor.dtype != like.dtype for v in (*bases, *coefficients)):
        function = _any_combination if sum_node is None else _any_combination_sum
    n, target = len(bases), out.tensor

    def call(*tensors: Tensor) -> None:
        rest = iter(tensors[n:])
        function(target, list(tensors[:n]), [next(rest) if h else None for h in has], scalars, offsets)

    r.do(call, *bases, *coefficients)
    return out.view(lambda t: t[..., 0]) if sum_node is not None and sum_node.meta["val"].dim() != dims else out


def _with_dims(value: Value, dims: int, place: int) -> Value:
    """Return a value with this number of dimensions, of which those of size 1 are inserted at a place."""
    old = value.tensor.shape
    if len(old) == dims:
        return value
    shape = (*old[:place], *(1,) * (dims - len(old)), *old[place:])
    return value.view(lambda t: t.reshape(shape))


def _overwritten(
    r: Recording, names: Sequence[Node], bases: Sequence[Value], shape: tuple[int, ...], dtype: torch.dtype
) -> Value | None:
    """Return a base of the shape of the result that nothing else reads, to be overwritten."""
    for name, value in dict(zip(names, bases)).items():
        alone = value.memory is not None and value.memory.values == 1 and r.readers[name] == 1
        fits = value.get is None and value.tensor.shape == shape and value.tensor.dtype == dtype
        if alone and fits and 0 not in value.tensor.stride():
            return Value(value.tensor, value.first, None, value.memory)
    return None


def _arranged_like(r: Recording, bases: Sequence[Value], shape: tuple[int, ...], like: TensorInfo, first: int) -> Value:
    """Return a buffer whose dimensions lie in memory in the same order as those of a base of full size."""
    for value in bases:
        if value.tensor.shape[1:] == shape[1:] and not value.tensor.is_contiguous():
            strides = value.tensor.stride()
            order = sorted(range(len(shape)), key=lambda d: -strides[d])
            return _permuted(r, shape, order, like, first)
    return r.buffer(shape, like, first)


def _permuted(r: Recording, shape: Sequence[int], order: Sequence[int], like: Tensor | TensorInfo, first: int) -> Value:
    """Return a buffer of a shape whose dimensions lie in memory in this order."""
    back = sorted(range(len(order)), key=order.__getitem__)
    return r.buffer([shape[d] for d in order], like, first).view(lambda t: t.permute(back))


def _any_combination(
    out: Tensor, bases: list[Tensor], coefficients: list[Tensor | None], scalars: list[float], rows: list[int]
) -> None:
    """Do what ops.linear_combination does, for any dtypes and numbers of terms and dimensions."""
    total = torch.zeros_like(out)
    for base, coefficient, scalar, row in zip(bases, coefficients, scalars, rows):
        total[row : row + len(base)] += combine([base], [coefficient], [scalar])
    out.copy_(total)


def _any_combination_sum(
    out: Tensor, bases: list[Tensor], coefficients: list[Tensor | None], scalars: list[float], rows: list[int]
) -> None:
    """Do what ops.linear_combination_sum does, for any dtypes and numbers of terms and dimensions."""
    size = max(t.shape[-1] for t in (*bases, *coefficients) if t is not None)
    total = out.new_empty(*out.shape[:-1], size)
    _any_combination(total, bases, coefficients, scalars, rows)
    torch.sum(total, -1, keepdim=True, out=out)


def total(r: Recording, node: Node, span: Span) -> Value:
    """Evaluate a sum over some dimensions, (rows, *S) -> (rows, *T); one call if it is the sum of a combination."""
    source = summed(node)
    if source is not None:
        return combination(r, source, span, node)
    value, like = r.rows(node.args[0], span), node.meta["val"]
    out = r.buffer((value.rows, *like.shape), like, value.first)
    n, target = value.tensor.dim() - 1, out.tensor
    if n == 0:
        r.do(lambda t: target.copy_(t), value)
        return out
    given = node.args[1] if len(node.args) > 1 else None
    dims = [d % n + 1 for d in given] if given else list(range(1, n + 1))
    keep = len(node.args) > 2 and node.args[2]
    r.do(lambda t: torch.sum(t, dims, keepdim=keep, dtype=target.dtype, out=target), value)
    return out


# Matrix products.


def matrix_products(r: Recording, node: Node, span: Span) -> Value:
    """Evaluate sum_i scalar_i * a_i @ b_i, where one factor of every pair is a tangent."""
    pairs = [(a, b, scalar) for (a, b), scalar in zip(*node.args) if (a if r.moves(a) else b) in r.values]
    (start, stop), like = span, node.meta["val"]
    if like.dim() == 3 and stop - start > 1:
        return _batched(r, node, pairs, span)
    out = r.buffer((stop - start, *like.shape), like, start)
    written = [False] * (stop - start)
    for a, b, scalar in pairs:
        low, high = r.values[a if r.moves(a) else b].overlap(span)
        for first, last, add in _runs(written, low - start, high - start):  # only rows that the tangent has
            x, y = (r.operand(factor, (first + start, last + start)) for factor in (a, b))
            _product(r, x, y, r.moves(a), out.tensor[first:last], add, scalar)
            written[first:last] = [True] * (last - first)
    for first, last, old in _runs(written, 0, len(written)):
        if not old:
            r.do(out.tensor[first:last].zero_)
    return out


def _product(r: Recording, a: Value, b: Value, left: bool, out: Tensor, add: bool, scalar: float) -> None:
    """Write or add scalar * a @ b to rows; the left or the right factor is a tangent, the other one a constant."""
    rows = out.shape[0]
    if rows == 1:
        # (1, M, K) @ (K, N), (M, K) @ (1, K, N), or the same with a dimension of batches: a product without rows.
        a, b = (a.view(lambda t: t[0]), b) if left else (a, b.view(lambda t: t[0]))
        out = out[0]
    elif left and a.tensor.is_contiguous():
        # (rows, M, K) @ (K, N): one product of matrices, (rows M, K) @ (K, N).
        a, out = a.view(lambda t: t.flatten(0, -2)), out.flatten(0, -2)
    elif left:
        # (rows, M, K) @ (K, N) whose rows and M do not merge: `rows` products with the same right factor.
        b = b.view(lambda t: t.expand(rows, *t.shape))
    else:
        # (M, K) @ (rows, K, N): `rows` products with the same left factor.
        a = a.view(lambda t: t.expand(rows, *t.shape))
    _matmul(r, a, b, out, add, scalar)


def _matmul(r: Recording, a: Value, b: Value, out: Tensor, add: bool, scalar: float) -> None:
    """Write or add scalar * a @ b, of matrices or of batches of matrices."""
    if not add and scalar == 1.0:
        r.do(torch.mm if out.dim() == 2 else torch.bmm, a, b, out=out)
    else:
        function = torch.addmm if out.dim() == 2 else torch.baddbmm
        r.do(lambda a, b: function(out, a, b, beta=int(add), alpha=scalar, out=out), a, b)


def _batched(r: Recording, node: Node, pairs: Sequence[tuple[Node, Node, float]], span: Span) -> Value:
    """Evaluate products of batches of B matrices, (rows, B, M, K) @ (B, K, N) or (B, M, K) @ (rows, B, K, N).

    Rows join dimension M or N, so that there are B large products instead of rows * B small ones.
    """
    like, rows = node.meta["val"], span[1] - span[0]
    n_batch, m, n = like.shape
    # The result lies in memory as (B, M, rows, N), which is (B, M rows, N) and (B, M, rows N) at once.
    out = r.buffer((n_batch, m, rows, n), like, span[0])
    back = (2, 0, 1, 3)
    for i, (a, b, scalar) in enumerate(pairs):
        left = r.moves(a)
        x, w = (r.rows(a, span), r.values[b]) if left else (r.rows(b, span), r.values[a])
        k = x.tensor.shape[3 if left else 2]
        transposed = (n_batch, k, rows * m)
        if left and len(pairs) == 1 and can_view(x.tensor.permute(1, 3, 0, 2), transposed):
            # x lies in memory as (B, K, rows, M), as a transposed tangent does: (B, rows M, K) @ (B, K, N).
            x = x.view(lambda t, shape=transposed: t.permute(1, 3, 0, 2).view(shape).mT)  # type: ignore[misc]
            out, back = out.view(lambda t: t.view(n_batch, rows, m, n)), (1, 0, 2, 3)
            target = out.tensor.view(n_batch, rows * m, n)
        else:
            # (B, M rows, K) @ (B, K, N) or (B, M, K) @ (B, K, rows N), after a copy of x unless it lies in this order.
            merged = (n_batch, m * rows, k) if left else (n_batch, k, rows * n)
            if not can_view(x.tensor.permute(1, 2, 0, 3), merged):
                x = _copied(r, x, (1, 2, 0, 3))
            x = x.view(lambda t, shape=merged: t.permute(1, 2, 0, 3).view(shape))  # type: ignore[misc]
            target = out.tensor.view((n_batch, m * rows, n) if left else (n_batch, m, rows * n))
        a, b = (x, w) if left else (w, x)
        _matmul(r, a, b, target, i > 0, scalar)
    return out.view(lambda t: t.permute(back))


def _copied(r: Recording, x: Value, order: tuple[int, ...]) -> Value:
    """Return a copy whose dimensions lie in this order in memory."""
    out = _permuted(r, x.tensor.shape, order, x.tensor, x.first)
    target = out.tensor
    r.do(lambda t: target.copy_(t), x)
    return out


def _runs(flags: Sequence[bool], first: int, last: int) -> list[tuple[int, int, bool]]:
    """Return start, stop and flag of the ranges of equal flags among first ... last - 1."""
    runs, start = [], first
    for flag, group in itertools.groupby(flags[first:last]):
        stop = start + len(list(group))
        runs.append((start, stop, flag))
        start = stop
    return runs


def can_view(tensor: Tensor, shape: Sequence[int]) -> bool:
    try:
        tensor.view(tuple(shape))
    except RuntimeError:
        return False
    return True
