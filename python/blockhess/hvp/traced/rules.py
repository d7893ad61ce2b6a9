"""Rules: how every operation of a linear program is evaluated for the rows of its tangent.

A rule takes the recording, the node of the operation and the span of its rows, and returns the value (rows, *shape), or
a list for several results. `RULES`, at the end, is the table of all rules, where a new one is added; an operation that
is not in it is evaluated by vmap. Rules of combinations, sums and matrix products are in products.py.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch.func import vmap
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from blockhess.hvp.traced.operations import SPLITS, VIEWS, Node, aten
from blockhess.hvp.traced.products import can_view, combination, matrix_products, total
from blockhess.hvp.traced.program import combine, is_node, multiply
from blockhess.hvp.traced.rows import Recording, Rule, Span, Value
from blockhess.problem.model_state import setting

# Whether vmap may call an operation row by row, with a warning at every call.
_FALLBACK = _functorch._is_vmap_fallback_enabled, _functorch._set_vmap_fallback_enabled  # type: ignore[attr-defined]


# Rearrangements.


def _view(r: Recording, node: Node, span: Span) -> Value:
    """Evaluate a rearrangement (rows, *S) -> (rows, *T), as a view if possible."""
    value, like = r.rows(node.args[0], span), node.meta["val"]
    rows, old = value.rows, value.tensor.shape
    viewed = value.view(_row_view(node, rows))
    if viewed.tensor.untyped_storage()._cdata == value.tensor.untyped_storage()._cdata:
        return viewed
    # A reshape that moves elements.
    out = r.buffer((rows, *like.shape), like, value.first)
    if rows > 1 and like.dim() == 3 and _feeds_multiply(node):
        # Factors (rows, B, M, N) of batched products lie in memory as (B, M, rows, N).
        joined = out.view(lambda t: t.view(*like.shape[:2], rows, like.shape[2]).permute(2, 0, 1, 3))
        out = joined if can_view(joined.tensor, old) else out
    target = out.tensor.view(old)
    r.do(lambda t: target.copy_(t), value)
    return out


def _feeds_multiply(node: Node) -> bool:
    users = list(node.users)
    users += [again for user in users if user.target is aten.permute.default for again in user.users]
    return any(user.target is multiply for user in users)


def _row_view(node: Node, rows: int) -> Callable[[Tensor], Tensor]:
    """Return a rearrangement as a function of tensors with a leading dimension of rows."""
    target, (source, *args), shape = node.target, node.args, node.meta["val"].shape
    dims = source.meta["val"].dim()

    def axis(d: int, n: int = dims) -> int:
        return d % max(n, 1) + 1

    if target is aten.reshape.default:
        return lambda t: t.reshape(rows, *shape)
    if target is aten.expand.default:
        lead = (1,) * (len(shape) - dims)
        return lambda t: t.reshape(rows, *lead, *t.shape[1:]).expand(rows, *shape)
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


def _part(r: Recording, node: Node, span: Span) -> Any:
    """Return one of several results."""
    source, index = node.args
    return r.values[source][index]


def _split(r: Recording, node: Node, span: Span) -> list[Value]:
    """Evaluate a split into views (rows, *part)."""
    target, value = node.target, r.rows(node.args[0], span)
    sizes = [] if target is aten.unbind.int else [node.args[1]]
    place = len(sizes) + 1
    dim = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    arguments = (*sizes, dim % (value.tensor.dim() - 1) + 1)
    count = len(target(value.tensor, *arguments))
    return [value.view(lambda t, i=i: target(t, *arguments)[i]) for i in range(count)]  # type: ignore[misc]


def _cat(r: Recording, node: Node, span: Span) -> Value:
    """Evaluate the concatenation of tangents."""
    nodes, like = node.args[0], node.meta["val"]
    if any(not r.moves(part) or part not in r.values for part in nodes):
        return _by_vmap(r, node, span)  # type: ignore[no-any-return]
    parts = [r.rows(part, span) for part in nodes]
    out = r.buffer((span[1] - span[0], *like.shape), like, span[0])
    dim, target = (node.args[1] if len(node.args) > 1 else 0) % like.dim() + 1, out.tensor
    r.do(lambda *tensors: torch.cat(tensors, dim, out=target), *parts)
    return out


def _part_backward(r: Recording, node: Node, span: Span) -> Value:
    """Evaluate the adjoint of a slice or selection: a tensor that is zero beside the slice."""
    source, _, dim, *bounds = node.args
    value, like = r.rows(source, span), node.meta["val"]
    out = r.buffer((span[1] - span[0], *like.shape), value.tensor, span[0])
    forward = aten.slice.Tensor if node.target is aten.slice_backward.default else aten.select.int
    part = forward(out.tensor, dim % like.dim() + 1, *bounds)
    r.do(torch.Tensor.zero_, out)
    r.do(lambda t: part.copy_(t), value)
    return out


# Embeddings and convolutions: the rows join another dimension.


def _embedding(r: Recording, node: Node, span: Span) -> Value:
    """Evaluate a look-up in a table (rows, size, width): indices of shape S give (rows, *S, width)."""
    if not r.moves(node.args[0]) or r.moves(node.args[1]):
        return _by_vmap(r, node, span)  # type: ignore[no-any-return]
    table, index = r.rows(node.args[0], span), r.values[node.args[1]]
    rows, shape, width = table.rows, index.tensor.shape, table.tensor.shape[2]
    out = r.buffer((rows, shape.numel(), width), table.tensor, span[0])
    target = out.tensor
    r.do(lambda t, i: torch.index_select(t, 1, i.reshape(-1), out=target), table, index)
    return out.view(lambda t: t.view(rows, *shape, width))


def _embedding_backward(r: Recording, node: Node, span: Span) -> Any:
    """Evaluate the gradient (rows, size, width) of a table, as that of one table of rows * size entries."""
    gradient, index, size, padding, scaled = node.args
    rows = span[1] - span[0]
    if rows > 1 and (padding >= 0 or scaled):
        return _by_vmap(r, node, span)

    def call(g: Tensor, i: Tensor) -> Tensor:
        offsets = torch.arange(rows, device=i.device).mul_(size).view(-1, *(1,) * i.dim())
        found = aten.embedding_dense_backward.default(g, i + offsets, rows * size, padding, scaled)
        return found.view(rows, size, g.shape[-1])  # type: ignore[no-any-return]

    return r.new(call, span[0], r.rows(gradient, span), r.values[index])


def _convolution(r: Recording, node: Node, span: Span) -> Any:
    """Evaluate a convolution: rows of inputs join the batch, rows of weights the output channels."""
    x, w, bias, *options = node.args
    rows, groups, transposed = span[1] - span[0], options[5], options[3]
    target = aten.convolution.default
    if bias is None and r.moves(x) and not r.moves(w):

        def of_input(x: Tensor, w: Tensor) -> Tensor:
            return target(x.flatten(0, 1), w, None, *options).unflatten(0, (rows, -1))  # type: ignore[no-any-return]

        return r.new(of_input, span[0], r.rows(x, span), r.values[w])
    if bias is None and not r.moves(x) and rows > 1 and groups == 1 and not transposed:

        def of_weight(x: Tensor, w: Tensor) -> Tensor:
            found = target(x, w.flatten(0, 1), None, *options)
            return found.unflatten(1, (rows, -1)).transpose(0, 1)  # type: ignore[no-any-return]

        return r.new(of_weight, span[0], r.values[x], r.rows(w, span))
    return _by_vmap(r, node, span)


def _convolution_backward(r: Recording, node: Node, span: Span) -> Any:
    """Evaluate the gradient of the input of a convolution, with the rows as part of the batch."""
    gradient, x, w, sizes, *options = node.args
    if not r.moves(gradient) or r.moves(w) or r.moves(x) or tuple(options[-1]) != (True, False, False):
        return _by_vmap(r, node, span)
    rows, info = span[1] - span[0], x.meta["val"]
    # Only the shape of the input matters, but torch copies one that is not contiguous.
    like = r.buffer((rows * info.shape[0], *info.shape[1:]), info, span[0]).tensor

    def call(g: Tensor, w: Tensor) -> list[Tensor | None]:
        found = aten.convolution_backward.default(g.flatten(0, 1), like, w, sizes, *options)
        return [found[0].unflatten(0, (rows, -1)), None, None]

    return r.new(call, span[0], r.rows(gradient, span), r.values[w])


# Everything else.


def _by_vmap(r: Recording, node: Node, span: Span) -> Any:
    """Evaluate any operation by vmap over the rows, or row by row if it has no rule for vmap."""
    target, rows, device = node.target, span[1] - span[0], r.device  # the calls must not keep the recording
    leaves, spec = tree_flatten((node.args, dict(node.kwargs)))
    places, values, dims, zeros = [], [], [], {}
    for i, leaf in enumerate(leaves):
        if is_node(leaf) and r.moves(leaf) and leaf not in r.values:  # it belongs to other blocks
            zeros[i] = leaf.meta["val"]
        elif is_node(leaf):
            places.append(i)
            values.append(r.operand(leaf, span))
            dims.append(0 if r.moves(leaf) else None)
    one_by_one = rows == 1 or target is aten.convolution_backward.default or bool(zeros)
    views = any(result.alias_info is not None for result in target._schema.returns)  # of memory that is used again

    def single(*tensors: Tensor) -> Any:
        whole = list(leaves)
        for i, like in zeros.items():
            whole[i] = torch.zeros(like.shape, dtype=like.dtype, device=device)
        for i, tensor in zip(places, tensors):
            whole[i] = tensor
        args, kwargs = tree_unflatten(whole, spec)
        found = target(*args, **kwargs)
        return tree_map_only(Tensor, torch.clone, found) if views else found

    tried = False

    def call(*tensors: Tensor) -> Any:
        nonlocal one_by_one, tried
        if not one_by_one and tried:
            return vmap(single, tuple(dims))(*tensors)
        if not one_by_one:
            tried = True
            try:
                with setting(*_FALLBACK, False):
                    return vmap(single, tuple(dims))(*tensors)
            except RuntimeError:  # no rule for this operation
                one_by_one = True
        found = [single(*(t if d is None else t[row] for t, d in zip(tensors, dims))) for row in range(rows)]
        if isinstance(found[0], Tensor):
            return found[0][None] if rows == 1 else torch.stack(found)
        return [None if part[0] is None else torch.stack(part) for part in zip(*found)]

    return r.new(call, span[0], *values)


RULES: dict[Any, Rule] = {
    combine: combination,
    aten.sum.dim_IntList: total,
    aten.sum.default: total,
    multiply: matrix_products,
    **dict.fromkeys((*VIEWS, aten.expand.default), _view),
    **dict.fromkeys(SPLITS, _split),
    operator.getitem: _part,
    aten.cat.default: _cat,
    aten.slice_backward.default: _part_backward,
    aten.select_backward.default: _part_backward,
    aten.embedding.default: _embedding,
    aten.embedding_dense_backward.default: _embedding_backward,
    aten.convolution.default: _convolution,
    aten.convolution_backward.default: _convolution_backward,
}


def evaluate(recording: Recording, node: Node, span: Span) -> Any:
    """Evaluate an operation for the rows of a span."""
    return RULES.get(node.target, _by_vmap)(recording, node, span)
