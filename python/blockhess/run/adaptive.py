"""How many probes a block needs: the statistical error of its spectrum, known before any spread is seen.

The weights that a Gaussian probe gives the eigenvalues follow a Dirichlet distribution, whatever the eigenvectors are:

    var(v^T f(H) v) = 2 (mean f^2 - (mean f)^2) / (dim + 2),   the mean over the eigenvalues,

for every function f; Rademacher probes have at most (dim + 2) / dim times that. With f = 1 up to x, 0 beyond, this is
2 F (1 - F) / (dim + 2), the variance of the distribution function; with f = Gauss(x - t; sigma), that of the density.
A mean of P probes is off by sqrt(2 / pi) int sqrt(var / P) dx on average, in Wasserstein-1 distance or in L1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess.analysis.density import smooth
from blockhess.analysis.errors import steps
from blockhess_ext import Quadrature
from blockhess_ext.early_stopping import GRID_MARGIN, GRID_POINTS_PER_SIGMA, converged_at_end

# What of the tolerance is the probes' part. A settled quadrature is off by 0.8 of it in Wasserstein distance, which
# falls as 1 / m, but by less than half in L1, which falls faster than any power of m; the two parts add in squares. One
# draw of the Wasserstein part is up to twice its mean; the L1 part is a sum over many resolved points and varies less.
WASSERSTEIN_SHARE, L1_SHARE = 0.5, 0.8
# One probe gives no spread, and so no error bar to anything else that is computed from the spectrum.
LEAST_PROBES = 2


def statistical_error(quadrature: Quadrature, sigma: float | None = None) -> Tensor:
    """Expected distance of every block's spectrum from the mean over infinitely many probes.

    Args:
        quadrature: one or more probes, which need not have made a step in every block.
        sigma: None for the Wasserstein-1 distance as a share of the range of the nodes; else the L1 distance of the
            densities blurred by a Gaussian of this share of the range.

    Returns:
        (n_blocks,) float64; 0 where all nodes are one, infinite where nothing is known.

    Source: moments of the Dirichlet distribution; for Rademacher probes Hutchinson 1989.

    Example:
        >>> q = blockhess_ext.batched_slq(lambda v: v * torch.linspace(0, 1, 100_000), [100_000], num_probes=1)
        >>> f"{statistical_error(q).item():.1e}"
        '1.4e-03'
    """
    nodes, weights = quadrature.merged()
    nodes, order = nodes.sort(dim=1)
    weights = weights.gather(1, order)
    spread = nodes[:, -1] - nodes[:, 0]
    unit = (nodes - nodes[:, :1]) / torch.where(spread > 0, spread, 1.0)[:, None]
    if sigma is None:
        share = weights.cumsum(1)[:, :-1].clamp(max=1.0)
        area = ((share * (1 - share)).sqrt() * unit.diff(dim=1)).sum(1)
    else:
        h, reach = sigma / GRID_POINTS_PER_SIGMA, GRID_MARGIN * sigma
        grid = torch.arange(-reach, 1 + reach + h, h, dtype=torch.float64, device=nodes.device)
        density = smooth(unit, weights, grid, sigma)
        squares = smooth(unit, weights, grid, sigma / math.sqrt(2)) / (2 * sigma * math.sqrt(math.pi))
        area = (squares - density**2).clamp(min=0.0).sqrt().sum(1) * h
    probes = (quadrature.steps > 0).sum(0)
    dims = torch.tensor(quadrature.dims, dtype=torch.float64, device=nodes.device)
    error = area * (4 / math.pi / (dims + 2) / probes).sqrt()
    return torch.where(probes == 0, math.inf, torch.where(spread > 0, error, 0.0))


def _share(tol: float, sigma: float | None) -> float:
    return tol * (WASSERSTEIN_SHARE if sigma is None else L1_SHARE)


def probes_needed(quadrature: Quadrature, tol: float, sigma: float | None) -> list[int]:
    """How many probes of every block bring its statistical error within its share of tol; LEAST_PROBES at least."""
    known = (quadrature.steps > 0).sum(0).clamp(min=1)
    error = statistical_error(quadrature, sigma).nan_to_num(posinf=0.0)  # more probes of what fails would fail too
    needed = known * (error / _share(tol, sigma)) ** 2
    return needed.clamp(max=2.0**62).ceil().long().clamp(min=LEAST_PROBES).tolist()


def missed(quadrature: Quadrature, tol: float, sigma: float | None) -> list[bool]:
    """Of which blocks num_steps or the number of probes were too few for the tolerance."""
    few = statistical_error(quadrature, sigma) > _share(tol, sigma)
    dims = torch.tensor(quadrature.dims, device=few.device)
    open_ = ~steps.exact(quadrature.to("cpu")).to(few.device)
    cut_off = (quadrature.steps == quadrature.num_steps) & (dims > quadrature.num_steps) & open_
    alpha, beta = (table[cut_off][:, : quadrature.num_steps] for table in (quadrature.alpha, quadrature.beta))
    cut_off[cut_off.clone()] = ~converged_at_end(alpha, beta, tol, sigma)
    return (few | cut_off.any(0)).tolist()
