"""The spectral measures of all blocks: probes merged, moments with error bars, exact distribution functions.

    mu_l = mean over probes of sum_i weights[p, l, i] delta(t - nodes[p, l, i]),    tr f(H_l) = dim_l int f dmu_l

Only recurrences that made a step take part; where a block has none, every value is NaN, as nothing is known of it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import replace

import torch
from torch import Tensor

from blockhess_ext import Quadrature

# Sums of weights carry rounding errors; a share counts as reached this close to it.
_SHARE_TOLERANCE = 1e-12


def with_probes(quadrature: Quadrature, probes: slice | list[int]) -> Quadrature:
    """Return the quadrature of some of the probes alone."""
    tensors = ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")
    return dataclasses.replace(quadrature, **{name: getattr(quadrature, name)[probes] for name in tensors})


def merge_probes(quadrature: Quadrature) -> tuple[Tensor, Tensor]:
    """Return nodes and weights (n_blocks, n_probes m) of the measures mu_l.

    The weights of a block sum to 1. Padding repeats the block's largest node with weight 0; a block without any step
    has only zeros.
    """
    valid = quadrature.valid
    probes = valid.any(-1).sum(0).clamp(min=1)[None, :, None]
    weights = torch.where(valid, quadrature.weights / probes, 0.0)
    largest = torch.where(valid, quadrature.nodes, -math.inf).amax((0, 2))
    padding = torch.where(largest > -math.inf, largest, 0.0)[None, :, None]
    nodes = torch.where(valid, quadrature.nodes, padding)
    return nodes.transpose(0, 1).flatten(1).contiguous(), weights.transpose(0, 1).flatten(1).contiguous()


def moment(quadrature: Quadrature, power: int) -> tuple[Tensor, Tensor]:
    """Return tr H_l^power = dim_l mean_p sum_i w_i x_i^power and its standard error over probes, (n_blocks,) each.

    See Quadrature.integrate for blocks with one probe, one element, or without any step.
    """
    return quadrature.integrate(lambda nodes: nodes**power)


def second_moment(quadrature: Quadrature) -> tuple[Tensor, Tensor]:
    """Return tr H_l^2 and its standard error over probes, (n_blocks,) each; right after a single step too.

    One step's rule is exact to degree 1 only, but its residual holds what is missing:  |H v|^2 = alpha_0^2 + beta_0^2.
    """
    length = torch.hypot(quadrature.nodes[..., :1], quadrature.beta[..., :1])
    nodes = torch.where(quadrature.steps[..., None] == 1, length, quadrature.nodes)
    return moment(replace(quadrature, nodes=nodes), 2)


def extremes(quadrature: Quadrature) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest node of every block over all probes, (n_blocks,) each."""
    valid = quadrature.valid
    unknown = ~valid.any(-1).any(0)
    smallest = torch.where(valid, quadrature.nodes, math.inf).amin((0, 2))
    largest = torch.where(valid, quadrature.nodes, -math.inf).amax((0, 2))
    return smallest.masked_fill(unknown, math.nan), largest.masked_fill(unknown, math.nan)


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
    wanted = (q - _SHARE_TOLERANCE).expand(len(nodes), -1).contiguous()
    index = torch.searchsorted(shares[:, 1:].contiguous(), wanted).clamp(max=nodes.shape[1] - 1)
    return nodes.gather(1, index).masked_fill(shares[:, -1:].isnan(), math.nan)


def _steps(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sorted nodes (n_blocks, K) and the shares below all, up to the 1st, ... (n_blocks, K + 1)."""
    nodes, order = nodes.sort(dim=1)
    sums = torch.nn.functional.pad(weights.gather(1, order).cumsum(1), (1, 0))
    return nodes, sums / sums[:, -1:]
