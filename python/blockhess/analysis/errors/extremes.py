"""Confidence bounds of single eigenvalues of a block: the extreme ones, beyond the extreme nodes, and the k-th.

    lambda_max >= the largest node of all probes, up to rounding
    mass of mu_p at x <= 1 / (p_0(x)^2 + ... + p_m(x)^2), for the measure mu_p of every probe: see steps.py
    mass of mu_p at an eigenvalue ~ Beta(1/2, (n - 1)/2), independently, for Gaussian probes in n dimensions

So lambda_max is at x only if all probes have a mass at x below their bounds there. The bound of lambda_max is the
largest x for which the product of these probabilities is not significantly small, by Fisher's method. No gap between
eigenvalues is assumed. A multiple eigenvalue has more mass, which makes the bound conservative.

Source: Szegő 1939, section 3.41; Fisher 1932, section 21.1 (the product of independent probabilities).
"""

from __future__ import annotations

import math

import scipy  # submodules load on first use
import torch
from torch import Tensor

from blockhess.analysis.errors.bands import share_bounds
from blockhess.analysis.errors.steps import Recurrence
from blockhess_ext import Quadrature

# Distances from the extreme node at which an eigenvalue is tested, relative to the bound of |T|; 33 % apart.
_LEAST, _LARGEST, _POINTS = -12, 4, 129

# Rounding of dim times a share.
_COUNT_ROUNDING = 1e-6


def extreme_bounds(q: Quadrature, block: int, confidence: float) -> tuple[float, float]:
    """Return a lower bound of lambda_min and an upper bound of lambda_max, each with this confidence.

    They are infinite where nothing is known: without a Lanczos step, or with probes that are not Gaussian.

    Args:
        q: quadrature of all blocks.
        block: index.
        confidence: probability in (0, 1) of each bound.
    """
    recurrence, dim = Recurrence(q, block), q.dims[block]
    count = len(recurrence.steps)
    if count == 0:
        return -math.inf, math.inf
    ends = float(recurrence.nodes.min()), float(recurrence.nodes.max())
    if q.is_exact(block) or bool(recurrence.exact.all()):
        return ends
    if q.distribution != "gaussian":
        return -math.inf, math.inf
    limit = float(scipy.special.chdtri(2 * count, 1 - confidence))
    away = float(recurrence.norm.max()) * torch.logspace(_LEAST, _LARGEST, _POINTS, dtype=torch.float64, device="cpu")
    bounds = []
    for side, end in zip((-1.0, 1.0), ends):
        x = end + side * away
        mass = recurrence.mass_bound(x.expand(count, -1)).clamp(max=1.0)
        chances = torch.from_numpy(scipy.special.betainc(0.5, (dim - 1) / 2, mass.numpy()))
        possible = (-2 * chances.log().sum(0) <= limit).nonzero()
        beyond = int(possible.max()) + 1 if len(possible) else 0
        bounds.append(float(x[beyond]) if beyond < _POINTS else side * math.inf)
    return bounds[0], bounds[1]


def kth_interval(q: Quadrature, block: int, k: int, confidence: float) -> tuple[float, float]:
    """Return the confidence interval of the k-th largest eigenvalue, between nodes, or between extreme_bounds.

    The k-th eigenvalue is above x if dim (1 - F(x)) > k - 1, and not above x if dim (1 - F(x)) < k.

    Args:
        k: at least 1, at most the dim.
        q, block, confidence: see extreme_bounds.
    """
    nodes = torch.unique(q.nodes[:, block][q.valid[:, block]])
    low, high = extreme_bounds(q, block, confidence)
    dim, size = q.dims[block], len(nodes)

    def is_above(index: Tensor) -> Tensor:
        """Return whether the k-th eigenvalue is above nodes, and whether it can be, (2, len(index)) bool."""
        least, most = share_bounds(q, block, nodes[index], confidence)
        above = dim * (1 - torch.stack([most, least]))  # least and largest number of eigenvalues above the nodes
        return above > torch.tensor([[k - 1 + _COUNT_ROUNDING], [k - _COUNT_ROUNDING]], device="cpu")

    # Both hold up to some node, which is searched among every sqrt(size)-th node, then between two of them.
    coarse = torch.arange(0, size, math.isqrt(size), device="cpu")
    starts = (is_above(coarse).sum(1) - 1).clamp(min=0) * math.isqrt(size)
    ranges = [torch.arange(start, min(start + math.isqrt(size), size), device="cpu") for start in starts.tolist()]
    fine = torch.split(is_above(torch.cat(ranges)), list(map(len, ranges)), dim=1)
    above, below = (start + int(fine[side][side].sum()) for side, start in enumerate(starts.tolist()))
    return float(nodes[above - 1]) if above else low, float(nodes[below]) if below < size else high
