"""Gaussian-smoothed spectral densities of quadratures, and grids on which they integrate to 1.

    density_l(t) = sum_k weights[l, k] exp(-(t - nodes[l, k])^2 / (2 sigma^2)) / (sigma sqrt(2 pi))

A grid is the part of a lattice h Z within WINDOW sigma of any node: it covers every node of every block, and its size
is bounded by the number of nodes for any range. h is a power of two, so that grid points are exact. In the gaps of the
grid all densities are 0. All tensors are float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess import _checks
from blockhess_ext import ops

# At the ends of the grid the densities are exp(-WINDOW^2 / 2) = 2e-22 of the peak of a node.
WINDOW = 10.0

# Least number of points per sigma. The error of the trapezoid rule for p log(p / q) of Gaussian mixtures is set by the
# complex zeros of p + q: exp(-d^2 / 8 - 2 pi^2 POINTS_PER_SIGMA / d) for nodes d sigma apart, below 1e-12 at 8.
POINTS_PER_SIGMA = 8

# Lower bounds of sigma: relative to the largest |node|, for the resolution of float64, and absolute, against overflow.
SMALLEST_RELATIVE_SIGMA, SMALLEST_SIGMA = 2.0**-40, 1e-290

# Default sigma, and upper bound of sigma in plots, relative to the range of the nodes.
DEFAULT_RELATIVE_SIGMA, WIDEST_RELATIVE_SIGMA = 0.01, 0.05


def smallest_sigma(nodes: Tensor) -> float:
    """Return the smallest sigma that float64 resolves for these nodes (any shape, not empty)."""
    return max(SMALLEST_SIGMA, SMALLEST_RELATIVE_SIGMA * float(nodes.abs().max()))


def default_sigma(nodes: Tensor) -> float:
    """Return DEFAULT_RELATIVE_SIGMA times the range of the nodes, or times the largest |node| if the range is rounding.

    Args:
        nodes: eigenvalues on any axis, any shape, not empty.

    Example:
        >>> default_sigma(torch.tensor([-1.0, 0.0, 3.0]))
        0.04
    """
    scale = _resolved_range(nodes)
    if scale is None:
        size = float(nodes.abs().max())
        scale = size if DEFAULT_RELATIVE_SIGMA * size >= smallest_sigma(nodes) else 1.0
    return DEFAULT_RELATIVE_SIGMA * scale


def _resolved_range(nodes: Tensor) -> float | None:
    """Return the range of all nodes, None if it is rounding."""
    scale = float(nodes.max() - nodes.min())
    return scale if DEFAULT_RELATIVE_SIGMA * scale >= smallest_sigma(nodes) else None


def check_sigma(op: str, sigma: float, nodes: Tensor) -> float:
    """Return sigma as a float; raise ValueError unless it is finite and at least smallest_sigma(nodes)."""
    sigma, smallest = _checks.real(op, "sigma", sigma), smallest_sigma(nodes)
    if not smallest <= sigma < math.inf:
        raise ValueError(f"{op}: sigma must be finite and at least {smallest:.3g}, got {sigma}")
    return sigma


def check_sigma_in_range(op: str, sigma: float, nodes: Tensor) -> float:
    """Return sigma as check_sigma does; raise ValueError also if it exceeds the range of the nodes.

    Nodes that are all equal, such as those of zero blocks, accept any sigma.

    Example:
        >>> check_sigma_in_range("density", 3.0, torch.tensor([-1.0, 2.0]))
        3.0
    """
    sigma, span = check_sigma(op, sigma, nodes), _resolved_range(nodes)
    if span is not None and sigma > span:
        raise ValueError(f"{op}: sigma must be at most the range of all nodes, {span:.6g}, got {sigma:.6g}")
    return sigma


def check_grid(op: str, grid: Tensor | Sequence[float], name: str = "grid") -> Tensor:
    """Return grid as float64 on the CPU; raise ValueError unless it is 1-D, nonempty, finite and strictly ascending."""
    points = _checks.reals(op, name, grid)
    if points.ndim != 1 or len(points) == 0:
        raise ValueError(f"{op}: {name} must have shape (n_points,), not empty, got {tuple(points.shape)}")
    if not bool(points.isfinite().all()):
        raise ValueError(f"{op}: {name} must be finite, got {points[~points.isfinite()][0].item()}")
    if not bool((points.diff() > 0).all()):
        raise ValueError(f"{op}: {name} must ascend strictly, got a step of {points.diff().min().item()}")
    return points.contiguous()


def grid_spacing(sigma: float, points_per_sigma: int = POINTS_PER_SIGMA) -> float:
    """Return the largest power of two that is at most sigma / points_per_sigma.

    Example:
        >>> grid_spacing(1.0), grid_spacing(0.9)
        (0.125, 0.0625)
    """
    _, exponent = math.frexp(sigma / points_per_sigma)  # = mantissa 2^exponent, mantissa in [0.5, 1)
    return math.ldexp(1.0, exponent - 1)


def node_grid(nodes: Tensor, sigma: float, points_per_sigma: int = POINTS_PER_SIGMA) -> Tensor:
    """Return the grid for densities of these nodes: the points of h Z within WINDOW sigma of any node.

    Args:
        nodes: eigenvalues, any shape, not empty.
        sigma: standard deviation of the Gaussian, at least smallest_sigma(nodes).
        points_per_sigma: h = grid_spacing(sigma, points_per_sigma).

    Returns:
        (n_points,) float64, strictly ascending multiples of h; sum(density) * h integrates a density.

    Example:
        >>> grid = node_grid(torch.tensor([0.0, 1e6]), 1.0)
        >>> len(grid), grid[0].item(), grid[-1].item()
        (322, -10.0, 1000010.0)
    """
    h = grid_spacing(sigma, points_per_sigma)
    reach = math.ceil(WINDOW * sigma / h)
    scaled = torch.unique(nodes.detach().double() / h)
    first = scaled.floor().long() - reach
    last = scaled.ceil().long() + reach

    # Overlapping or adjacent windows are merged; both ends ascend with the nodes.
    opens = torch.ones(len(scaled), dtype=torch.bool, device="cpu")
    opens[1:] = first[1:] > last[:-1] + 1
    starts = first[opens]
    sizes = last[torch.cat([opens[1:], torch.ones(1, dtype=torch.bool, device="cpu")])] - starts + 1

    before = sizes.cumsum(0) - sizes
    index = torch.arange(int(sizes.sum()), device="cpu") + torch.repeat_interleave(starts - before, sizes)
    return index * torch.tensor(h, dtype=torch.float64, device="cpu")


def smooth(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the densities of L quadratures on one grid.

    Args:
        nodes, weights: (L, K) float64; the weights of a block sum to 1.
        grid: (n_points,) float64, ascending.
        sigma: standard deviation of the Gaussian, or (L,) float64, one per block (for plots, not for comparisons).

    Returns:
        (L, n_points) float64, in 1 / (unit of the nodes).

    Source: Zhang et al. 2024, appendix B.2.

    Example:
        >>> density = smooth(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), torch.zeros(1).double(), 1.0)
        >>> round(density.item(), 6)
        0.398942
    """
    widths = torch.as_tensor(sigma, dtype=torch.float64, device=nodes.device).expand(nodes.shape[0]).contiguous()
    density: Tensor = ops.gaussian_density(nodes.contiguous(), weights.contiguous(), grid.contiguous(), widths)
    return density
