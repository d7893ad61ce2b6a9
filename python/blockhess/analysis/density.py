"""Gaussian-smoothed spectral densities of quadratures, and grids on which they integrate to 1.

    density_l(t) = sum_k weights[l, k] exp(-(t - nodes[l, k])^2 / (2 sigma^2)) / (sigma sqrt(2 pi))

A grid is the part of one lattice h Z that lies within WINDOW sigma of any node, so it covers every node of every
block, outliers included, and its size is bounded by the number of nodes however wide the spectrum is. h is a power
of two, which makes every grid point exact: no rounding of the grid enters an integral. Between patches of the grid
all densities are 0. Everything is float64 on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess import _checks
from blockhess_ext import ops

# The densities vanish where a grid patch ends: exp(-WINDOW^2 / 2) = 2e-22 of a node's peak.
WINDOW = 10.0

# Points per sigma, at least. The trapezoid sum of p log(p / q) over Gaussian mixtures errs by the zeros that p + q
# has off the real axis: exp(-d^2 / 8 - 2 pi^2 POINTS_PER_SIGMA / d) for nodes d sigma apart, below 1e-12 at 8.
POINTS_PER_SIGMA = 8

# Sigma is at least this share of the largest |node|, so that grid and nodes resolve it in float64 ...
SMALLEST_RELATIVE_SIGMA = 2.0**-40
# ... and at least this, so that no density overflows.
SMALLEST_SIGMA = 1e-290

# Default sigma: this share of the range of all nodes that are smoothed or compared together.
DEFAULT_RELATIVE_SIGMA = 0.01

# However few the steps, no picture is blurred by more than this share of the range.
WIDEST_RELATIVE_SIGMA = 0.05


def smallest_sigma(nodes: Tensor) -> float:
    """Return the smallest sigma that float64 can resolve next to these nodes (any shape, not empty)."""
    return max(SMALLEST_SIGMA, SMALLEST_RELATIVE_SIGMA * float(nodes.abs().max()))


def default_sigma(nodes: Tensor) -> float:
    """Return DEFAULT_RELATIVE_SIGMA times the range of all nodes; times their size where the range is rounding only.

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
    """Return the range of all nodes, None where it is rounding only."""
    scale = float(nodes.max() - nodes.min())
    return scale if DEFAULT_RELATIVE_SIGMA * scale >= smallest_sigma(nodes) else None


def check_sigma(op: str, sigma: float, nodes: Tensor) -> float:
    """Return sigma as a float, or refuse it where float64 cannot resolve it next to these nodes.

    Raises:
        ValueError: sigma is not finite or below smallest_sigma(nodes).
    """
    sigma, smallest = _checks.real(op, "sigma", sigma), smallest_sigma(nodes)
    if not smallest <= sigma < math.inf:
        raise ValueError(f"{op}: sigma must be finite and at least {smallest:.3g}, got {sigma}")
    return sigma


def check_sigma_in_range(op: str, sigma: float, nodes: Tensor) -> float:
    """Return sigma as check_sigma does, or refuse it where it blurs all spectra into one another.

    Nodes that are all one, such as those of zero blocks, may be blurred by any width.

    Raises:
        ValueError: as check_sigma, or sigma is above the range of all nodes.

    Example:
        >>> check_sigma_in_range("density", 3.0, torch.tensor([-1.0, 2.0]))
        3.0
    """
    sigma, span = check_sigma(op, sigma, nodes), _resolved_range(nodes)
    if span is not None and sigma > span:
        raise ValueError(f"{op}: sigma must be at most the range of all nodes, {span:.6g}, got {sigma:.6g}")
    return sigma


def check_grid(op: str, grid: Tensor | Sequence[float], name: str = "grid") -> Tensor:
    """Return grid as float64 on the CPU, or refuse it.

    Raises:
        ValueError: grid is not one-dimensional, empty, not finite or not strictly ascending.
    """
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
    """Return the grid that carries the densities of these nodes: h Z within WINDOW sigma of any of them.

    Args:
        nodes: eigenvalues, any shape, not empty.
        sigma: width of the Gaussian, at least smallest_sigma(nodes).
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

    # Overlapping or touching windows become one patch; both ends ascend with the nodes.
    opens = torch.ones(len(scaled), dtype=torch.bool)
    opens[1:] = first[1:] > last[:-1] + 1
    starts = first[opens]
    sizes = last[torch.cat([opens[1:], torch.ones(1, dtype=torch.bool)])] - starts + 1

    before = sizes.cumsum(0) - sizes
    index = torch.arange(int(sizes.sum())) + torch.repeat_interleave(starts - before, sizes)
    return index * torch.tensor(h, dtype=torch.float64)


def smooth(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float | Tensor) -> Tensor:
    """Return the densities of L quadratures on one grid.

    Args:
        nodes, weights: (L, K) float64; the weights of a block sum to 1.
        grid: (n_points,) float64, ascending.
        sigma: one width for all blocks, or (L,) float64, one a block (for pictures only: two equal spectra blurred
            differently differ).

    Returns:
        (L, n_points) float64, in 1 / (unit of the nodes).

    Source: Zhang et al. 2024, appendix B.2.

    Example:
        >>> density = smooth(torch.zeros(1, 1).double(), torch.ones(1, 1).double(), torch.zeros(1).double(), 1.0)
        >>> round(density.item(), 6)
        0.398942
    """
    widths = torch.as_tensor(sigma, dtype=torch.float64).expand(nodes.shape[0]).contiguous()
    density: Tensor = ops.gaussian_density(nodes.contiguous(), weights.contiguous(), grid.contiguous(), widths)
    return density
