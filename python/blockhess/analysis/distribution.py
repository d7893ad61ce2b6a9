"""Exact distribution functions and quantiles of discrete measures, one measure per row."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A share counts as reached within this tolerance, for rounding errors of sums of weights.
_SHARE_TOLERANCE = 1e-12


def cdf(nodes: Tensor, weights: Tensor, x: Tensor) -> Tensor:
    """Return the weight of the nodes <= x as a share of all.

    Args:
        nodes, weights: (n_blocks, K) float64, in any order.
        x: (n_points,) float64.

    Returns:
        (n_blocks, n_points), in [0, 1], NaN for a block without weight.

    Example:
        >>> cdf(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.25, 0.75]]), torch.tensor([0.0, 1.0, 1.5, 2.0]))
        tensor([[0.0000, 0.7500, 0.7500, 1.0000]])
    """
    nodes, shares = _steps(nodes, weights)
    return shares.gather(1, torch.searchsorted(nodes, x.expand(len(nodes), -1).contiguous(), right=True))


def quantiles(nodes: Tensor, weights: Tensor, q: Tensor) -> Tensor:
    """Return the smallest node x with cdf(x) >= q.

    Args:
        nodes, weights: (n_blocks, K) float64, in any order.
        q: (n_quantiles,) float64 in [0, 1].

    Returns:
        (n_blocks, n_quantiles), NaN for a block without weight.

    Example:
        >>> quantiles(torch.tensor([[2.0, 1.0]]), torch.tensor([[0.25, 0.75]]), torch.tensor([0.5, 1.0]))
        tensor([[1., 2.]])
    """
    nodes, shares = _steps(nodes, weights)
    targets = (q - _SHARE_TOLERANCE).expand(len(nodes), -1).contiguous()
    index = torch.searchsorted(shares[:, 1:].contiguous(), targets).clamp(max=nodes.shape[1] - 1)
    return nodes.gather(1, index).masked_fill(shares[:, -1:].isnan(), math.nan)


def _steps(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted nodes (n_blocks, K) and the weights of the first 0, ..., K of them (n_blocks, K + 1)."""
    nodes, order = nodes.sort(dim=1)
    sums = torch.nn.functional.pad(weights.gather(1, order).cumsum(1), (1, 0))
    return nodes, sums / sums[:, -1:]
