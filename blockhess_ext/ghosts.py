"""Ghosts: eigenvalues of T that loss of orthogonality adds to those of the operator.

    copy      mu_i - mu_{i-1} <= 64 eps |T|, eps of the vectors     (T itself has no multiple eigenvalue)
    spurious  mu simple, and, to rounding, also an eigenvalue of T without its first row and column

Copies share the weight of one eigenvalue and spurious nodes have weight zero, so densities are not affected by ghosts;
numbers of nodes, gaps between them, and the number of steps needed are.

Source: Cullum and Willoughby 1985, Lanczos algorithms for large symmetric eigenvalue computations, section 4.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess_ext import ops

COPY_TOLERANCE, SPURIOUS_TOLERANCE = 64, 64  # in units of eps |T|: eps of the vectors, and of T's float64


def count_ghosts(alpha: Tensor, beta: Tensor, steps: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how many eigenvalues of each tridiagonal matrix are copies or spurious.

    Args:
        alpha, beta, steps: (n_problems, m), (n_problems, m) float64 and (n_problems,) int64, as for
            `ops.tridiag_quadrature`.
        dtype: data type of the Lanczos vectors.

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
    neighbors = torch.stack([inner.gather(1, after), inner.gather(1, (after - 1).clamp(min=0))])
    distance = (neighbors - nodes).abs().amin(0)
    spurious = simple & (distance <= SPURIOUS_TOLERANCE * torch.finfo(torch.float64).eps * norm)
    return (copy | spurious).sum(1)
