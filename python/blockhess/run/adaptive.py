"""Number of probes that a block needs, from the statistical error of its spectrum, which one probe already gives.

The weights of the eigenvalues for a Gaussian probe have a Dirichlet distribution, independent of the eigenvectors:

    var(v^T f(H) v) = 2 (mean f^2 - (mean f)^2) / (dim + 2),   the mean over the eigenvalues,

for every function f; for Rademacher probes it is at most (dim + 2) / dim times that. With f = 1 up to x and 0 beyond,
this is 2 F (1 - F) / (dim + 2), the variance of the distribution function; with f = Gauss(x - t; sigma), that of the
density. The expected error of the mean over P probes is sqrt(2 / pi) int sqrt(var / P) dx, in Wasserstein-1 distance or
in L1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess.analysis.density import smooth
from blockhess.analysis.errors import steps
from blockhess_ext import Quadrature
from blockhess_ext.early_stopping import GRID_MARGIN, GRID_POINTS_PER_SIGMA, converged_at_end

# Share of the tolerance for the error of the probes. The error of a converged quadrature is 0.8 of the tolerance in
# Wasserstein distance, which decays as 1 / m, but less than half of it in L1, which decays faster than any power of m;
# squares of the two errors add. A sample of the Wasserstein error is up to twice its mean; the L1 error is a sum over
# many resolved points and varies less.
WASSERSTEIN_SHARE, L1_SHARE = 0.5, 0.8
# One probe has no sample variance, so statistics of the spectrum would have no error bars.
LEAST_PROBES = 2


def statistical_error(quadrature: Quadrature, sigma: float | None = None) -> Tensor:
    """Return the expected distance of every block's spectrum from the mean over infinitely many probes.

    Args:
        quadrature: of one or more probes; some may have no step in some blocks.
        sigma: None for the Wasserstein-1 distance relative to the range of the nodes; otherwise for the L1 distance of
            the densities smoothed by a Gaussian of standard deviation sigma times the range.

    Returns:
        (n_blocks,) float64; 0 if all nodes are equal, infinite for blocks without a step.

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
    """Return the number of probes, at least LEAST_PROBES, that every block needs for the probes' share of tol."""
    known = (quadrature.steps > 0).sum(0).clamp(min=1)
    error = statistical_error(quadrature, sigma).nan_to_num(posinf=0.0)  # more probes of a failing block would fail too
    needed = known * (error / _share(tol, sigma)) ** 2
    return needed.clamp(max=2.0**62).ceil().long().clamp(min=LEAST_PROBES).tolist()


def largest_exact(tol: float, sigma: float | None) -> float:
    """Return the size of blocks up to which LEAST_PROBES are too few for the probes' share of tol.

    That is the size of a block with a single eigenvalue that is not zero, whose spectrum few probes estimate best.

    Example:
        >>> round(largest_exact(0.01, None))
        160
    """
    dim = math.sqrt(4 / math.pi / LEAST_PROBES) / _share(tol, sigma)
    return dim if sigma is None else 2 * dim  # the densities of both eigenvalues err


def missed(quadrature: Quadrature, tol: float, sigma: float | None) -> list[bool]:
    """Return whether num_steps or the number of probes of each block is too small for the tolerance."""
    few = statistical_error(quadrature, sigma) > _share(tol, sigma)
    dims = torch.tensor(quadrature.dims, device=few.device)
    open_ = ~steps.exact(quadrature.to("cpu")).to(few.device)
    cut_off = (quadrature.steps == quadrature.num_steps) & (dims > quadrature.num_steps) & open_
    alpha, beta = (table[cut_off][:, : quadrature.num_steps] for table in (quadrature.alpha, quadrature.beta))
    cut_off[cut_off.clone()] = ~converged_at_end(alpha, beta, tol, sigma)
    return (few | cut_off.any(0)).tolist()
