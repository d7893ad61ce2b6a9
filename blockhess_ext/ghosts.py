"""Eigenvalues of a tridiagonal matrix that stand for none of the operator's own: ghosts of a lost orthogonality.

    copy      mu_i - mu_{i-1} <= 64 eps |T|, eps of the vectors     (T itself has no multiple eigenvalue)
    spurious  mu simple, and an eigenvalue of T without its first row and column too, to rounding

Copies share the weight of their eigenvalue and spurious nodes have none, so a density loses nothing by ghosts; counts
of nodes, gaps between them, and the steps that they took do.

Source: Cullum and Willoughby 1985, Lanczos algorithms for large symmetric eigenvalue computations, section 4.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess_ext import ops

COPY_TOLERANCE, SPURIOUS_TOLERANCE = 64, 64  # eps |T|, of the vectors' and of T's own precision


def count_ghosts(alpha: Tensor, beta: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """How many eigenvalues of each tridiagonal matrix are copies or spurious.

    Args:
        alpha, beta, steps: (n_problems, m), (n_problems, m) float64 and (n_problems,) int64, as of
            `ops.tridiag_quadrature`.
        dtype: of the vectors that they come from.

    Returns:
        (n_problems,) int64.

    Example:
        >>> T = torch.tensor([[1.0, 1.0, 5.0]]).double(), torch.tensor([[1e-9, 1.0, 0.0]]).double(), torch.tensor([2])
        >>> count_ghosts(*T, torch.float32)
        tensor([1])
    """
    nodes, _ = ops.tridiag_quadrature(alpha, beta, steps)
    position = torch.arange(alpha.shape[1], device=alpha.device)
    valid = position < steps[:, None]
    norm = nodes.abs().amax(1, keepdim=True)
    near = COPY_TOLERANCE * torch.finfo(dtype).eps * norm
    copy = torch.zeros_like(valid)
    copy[:, 1:] = valid[:, 1:] & (nodes.diff(dim=1) <= near)
    simple = valid & ~copy
    simple[:, :-1] &= ~copy[:, 1:]

    if alpha.shape[1] == 1:
        return copy.sum(1)
    inner, _ = ops.tridiag_quadrature(alpha[:, 1:].contiguous(), beta[:, 1:].contiguous(), (steps - 1).clamp(min=0))
    inner = torch.where(position[:-1] < steps[:, None] - 1, inner, math.inf)
    after = torch.searchsorted(inner, nodes).clamp(max=inner.shape[1] - 1)
    neighbours = torch.stack([inner.gather(1, after), inner.gather(1, (after - 1).clamp(min=0))])
    distance = (neighbours - nodes).abs().amin(0)
    spurious = simple & (distance <= SPURIOUS_TOLERANCE * torch.finfo(torch.float64).eps * norm)
    return (copy | spurious).sum(1)
