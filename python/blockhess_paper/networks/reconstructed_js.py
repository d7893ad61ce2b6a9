"""Reconstructions of the paper's "JS distance", which it does not define, next to the library's definitions.

    p_l = density of block l, one sigma for all;  m = (p + q) / 2
    "jeffreys"      int (p - q) (log p - log q), the symmetrized KL divergence
    "unnormalized"  sum_g 1/2 p log(p / m) + 1/2 q log(q / m) over a uniform grid, without its spacing

The values of Zhang et al. 2024 (arXiv:2402.16788) reach 353, so they are neither of the library's "distance" and
"divergence", which are bounded. As there, matrices are symmetric, finite and non-negative, with an exactly zero
diagonal, also where spectra do not overlap. The relative error of "jeffreys" is near 1e-6 at worst, where a block lies
between two distant nodes of another: log q has a kink there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess.analysis import jensen_shannon
from blockhess.analysis.axes import Axis
from blockhess.analysis.density import POINTS_PER_SIGMA, check_sigma, grid_spacing, node_grid
from blockhess.analysis.errors.jensen_shannon import mean_of_pairs
from blockhess.analysis.jensen_shannon import JS0, sum_over_grid
from blockhess.analysis.selection import distributions
from blockhess.spectra import Spectra
from blockhess_ext.arguments import choice

# The library's definitions, then the reconstructions.
KINDS = (*jensen_shannon.KINDS, "jeffreys", "unnormalized")

# The uniform grid of "unnormalized": number of points and margin beyond the extreme nodes, as in the paper's code.
GRID_POINTS = 10_000
GRID_MARGIN = 1.0

# Between two distant nodes of q its density does not smooth log q, so "jeffreys" needs a finer grid than the library.
JEFFREYS_POINTS_PER_SIGMA = 4 * POINTS_PER_SIGMA


def js_matrix(
    nodes: Tensor,
    weights: Tensor,
    *,
    sigma: float,
    kind: str = "distance",
    base: float = 2.0,
    grid_points: int = GRID_POINTS,
) -> Tensor:
    """Compare the smoothed spectra of L blocks pair by pair.

    Args:
        nodes, weights, sigma, base: see blockhess.analysis.jensen_shannon.js_matrix.
        kind: one of KINDS.
        grid_points: number of points of the uniform grid of "unnormalized", from the smallest node - 1 to the largest
            + 1. As in the paper's code, it need not resolve sigma: a narrow peak may fall between two points.

    Returns:
        (L, L) float64.

    Raises:
        ValueError: kind, base or sigma is invalid.

    Source: Jeffreys 1946; Zhang et al. 2024, section 2.5.

    Example:
        >>> spikes = torch.tensor([[0.0], [3.0]], dtype=torch.float64)
        >>> js_matrix(spikes, torch.ones_like(spikes), sigma=1.0, kind="jeffreys", base=math.e).round().tolist()
        [[0.0, 9.0], [9.0, 0.0]]
    """
    choice("kind", kind, KINDS, op="js_matrix")
    if kind in jensen_shannon.KINDS:
        return jensen_shannon.js_matrix(nodes, weights, sigma=sigma, kind=kind, base=base)
    sigma = check_sigma("js_matrix", sigma, nodes)
    if kind == "jeffreys":
        grid = node_grid(nodes, sigma, JEFFREYS_POINTS_PER_SIGMA)
        total = sum_over_grid(nodes, weights, grid, sigma, _jeffreys_sums)
        total *= grid_spacing(sigma, JEFFREYS_POINTS_PER_SIGMA)
    else:
        low, high = float(nodes.min()) - GRID_MARGIN, float(nodes.max()) + GRID_MARGIN
        grid = torch.linspace(low, high, grid_points, dtype=torch.float64)
        total = sum_over_grid(nodes, weights, grid, sigma)
    return total / math.log(base)


def js0_value(spectra: Spectra, kind: str, where: JS0) -> float:
    """Return the mean over pairs of different blocks by a definition of KINDS.

    Args:
        spectra: of the blocks.
        kind: one of KINDS.
        where: a JS0 of these spectra by the library; its blocks, axis, sigma and base are taken.

    Example:
        >>> js0_value(spectra, "jeffreys", spectra.js0(axis="asinh"))
    """
    axis = Axis(where.axis, where.normalize, where.scale)
    nodes, weights = distributions(spectra, where.blocks, axis)
    return mean_of_pairs(js_matrix(nodes, weights, sigma=where.sigma, kind=kind, base=where.base))


def _jeffreys_sums(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Return the (L, L) upper triangle of sum_g (p - q) (log p - log q), each summand non-negative.

    log p = logsumexp_k(log w_k - (t - x_k)^2 / (2 sigma^2)) - log(sigma sqrt(2 pi)) stays finite far from all nodes,
    where p itself underflows.
    """
    n_blocks, n_nodes = nodes.shape
    log_p = torch.empty(n_blocks, len(grid), dtype=torch.float64)
    columns = max(1, jensen_shannon.CHUNK_ELEMENTS // n_nodes)
    for block in range(n_blocks):
        carried = weights[block] > 0
        x, log_w = nodes[block, carried, None], weights[block, carried, None].log()
        for start in range(0, len(grid), columns):
            t = grid[start : start + columns]
            log_p[block, start : start + columns] = (log_w - 0.5 * ((t - x) / sigma) ** 2).logsumexp(0)
    log_p -= math.log(sigma * math.sqrt(2 * math.pi))

    p = log_p.exp()
    sums = torch.zeros(n_blocks, n_blocks, dtype=torch.float64)
    for i in range(n_blocks - 1):
        sums[i, i + 1 :] = ((p[i] - p[i + 1 :]) * (log_p[i] - log_p[i + 1 :])).sum(1)
    return sums
