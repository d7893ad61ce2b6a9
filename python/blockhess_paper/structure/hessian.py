"""Exact Hessians of small models, by batched Hessian-vector products with the unit vectors.

H e_i = d/dw <g(w), e_i>,   g = dL/dw,   CHUNK rows at a time through one retained graph of g
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from blockhess.problem.batches import as_batches
from blockhess.problem.blocks import Block, BlockInfo, BlockSpec, partition
from blockhess.problem.losses import make_loss
from blockhess.problem.model_state import fixed_state

# Unit vectors per batched product.
CHUNK = 256


def gradient_graph(
    model: nn.Module, data: Any, loss_fn: Callable[..., Any] | None, blocks: tuple[Block, ...]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the differentiable gradient of every block; to be called inside `fixed_state`.

    Args:
        model, data, loss_fn: as for `blockhess.spectrum`, one batch.
        blocks: blocks of `partition`.

    Returns:
        The flattened gradient (dim_l,) of every block, and name -> parameter.

    Raises:
        ValueError: data is more than one batch.
    """
    loss = make_loss(loss_fn)
    batches = as_batches(data, pairs=loss.pairs)
    if len(batches) != 1:
        raise ValueError(f"hessian: data must be one batch, got {len(batches)}")
    parameters = {piece.name: piece.tensor for block in blocks for piece in block.pieces}
    value = loss(model, batches[0])[0]
    found = torch.autograd.grad(
        value, list(parameters.values()), create_graph=True, allow_unused=True, materialize_grads=True
    )
    gradients = dict(zip(parameters, found))
    flat = [torch.cat([piece.of(gradients[piece.name]).flatten() for piece in block.pieces]) for block in blocks]
    return flat, parameters


def exact_hessian(
    model: nn.Module, data: Any, loss_fn: Callable[..., Any] | None = None, *, blocks: BlockSpec = "parameter"
) -> tuple[Tensor, tuple[BlockInfo, ...]]:
    """Return the Hessian of the loss with respect to the given blocks, including cross-block entries.

    Args:
        model: a small model, as the result has n^2 entries; float64 parameters give full accuracy.
        data: one batch, as for `blockhess.spectrum`.
        loss_fn, blocks: as for `blockhess.spectrum`.

    Returns:
        H (n, n) on the CPU, rows and columns in the order of the blocks, and the blocks.

    Raises:
        ValueError: data is more than one batch, or an argument is invalid.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False).double()
        >>> data = torch.eye(2, dtype=torch.float64), torch.zeros(2, 1, dtype=torch.float64)
        >>> exact_hessian(model, data, torch.nn.MSELoss())[0]
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    cut = partition(model, blocks)
    with fixed_state(model):
        flat, parameters = gradient_graph(model, data, loss_fn, cut.blocks)
        gradient = torch.cat(flat)
        hessian = torch.zeros(len(gradient), len(gradient), dtype=gradient.dtype)
        if gradient.requires_grad:
            for start in range(0, len(gradient), CHUNK):
                units = torch.eye(len(gradient), dtype=gradient.dtype, device=gradient.device)[start : start + CHUNK]
                rows = torch.autograd.grad(
                    gradient,
                    list(parameters.values()),
                    units,
                    retain_graph=True,
                    is_grads_batched=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                by_name = dict(zip(parameters, rows))
                pieces = [piece for block in cut.blocks for piece in block.pieces]
                columns = [torch.vmap(piece.of)(by_name[piece.name]).flatten(1) for piece in pieces]
                hessian[start : start + CHUNK] = torch.cat(columns, 1)
    return hessian, tuple(block.info for block in cut.blocks)
