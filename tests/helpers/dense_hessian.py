"""Dense Hessians of tiny models: by autograd.functional, and by applying a BlockOperator to unit vectors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blockhess.hvp import ENGINES
from blockhess.hvp.operator import BlockOperator
from blockhess.problem.batches import as_batches
from blockhess.problem.blocks import BlockSpec, partition
from blockhess.problem.losses import make_loss
from blockhess.problem.problem import Problem

EPS = torch.finfo(torch.float64).eps


def dense_hessian(model: nn.Module, loss: Callable[[Callable[..., Any]], Tensor], names: Sequence[str]) -> Tensor:
    """d2 loss / d w2 for w = the named parameters, flattened and joined; `loss` is given the model as a function."""
    old = dict(model.named_parameters(remove_duplicate=False))
    shapes = [old[name].shape for name in names]

    def of_flat(flat: Tensor) -> Tensor:
        pieces = flat.split([shape.numel() for shape in shapes])
        new = {name: piece.view(shape) for name, piece, shape in zip(names, pieces, shapes)}
        return loss(lambda *args, **kwargs: functional_call(model, new, args, kwargs))

    return torch.autograd.functional.hessian(of_flat, torch.cat([old[name].detach().flatten() for name in names]))


def problem(model: nn.Module, data: Any, loss_fn: Any, blocks: BlockSpec = "parameter", **options: Any) -> Problem:
    """The problem as `spectrum` poses it, for a model whose state needs no fixing."""
    loss = make_loss(loss_fn)
    return Problem(model, loss, as_batches(data, pairs=loss.pairs), partition(model, blocks).blocks, **options)


def operator(
    model: nn.Module, data: Any, loss_fn: Any, blocks: BlockSpec = "parameter", engine: str = "autograd", **options: Any
) -> BlockOperator:
    """The operator of all blocks with one engine."""
    prepared_problem = problem(model, data, loss_fn, blocks)
    return BlockOperator(prepared_problem, ENGINES[engine](prepared_problem, **options))


def operator_blocks(hessian: BlockOperator) -> dict[str, Tensor]:
    """Block name -> dense block, by products with unit vectors. Fails if a block's product leaks into another."""
    dense = {}
    start = 0
    for info in hessian.problem.infos:
        columns = slice(start, start + info.dim)
        start += info.dim
        vectors = torch.zeros(info.dim, sum(hessian.dims), dtype=hessian.problem.dtype)
        vectors[:, columns] = torch.eye(info.dim, dtype=hessian.problem.dtype)
        products = hessian(vectors)
        dense[info.name] = products[:, columns].clone()
        products[:, columns] = 0
        assert not products.any()
    return dense


def assert_close(actual: Tensor, expected: Tensor, growth: float = 1e4) -> None:
    """Equal up to growth x eps x the largest entry."""
    assert actual.shape == expected.shape
    error = float((actual - expected).abs().max())
    assert error <= growth * EPS * max(float(expected.abs().max()), 1e-300), error
