"""Converged Ritz values with residual bounds, merged over the probes of a block.

    an eigenvalue lies within |beta_m s_mi| of node i, s_i the i-th eigenvector of the tridiagonal matrix

In floating-point arithmetic this holds up to rounding of size eps |H|, also for ghosts (Paige 1980). Ten residuals from
a node of weight w, and far from other nodes, the bounds of the distribution function in steps.py differ by w / 101.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess.analysis.errors.intervals import gamma_interval
from blockhess.analysis.errors.probes import variance_of_probes
from blockhess.analysis.errors.steps import Recurrence
from blockhess_ext import Quadrature
from blockhess_ext.recurrences import EXHAUSTED_EPS

# Largest residual of a converged node, relative to the block's largest |node|.
CONVERGED = 1e-3

# Confidence of intervals of multiplicities, and largest distance of the eigenvalues that they count, in residuals.
_CONFIDENCE = 0.95
_REACH = 10.0


@dataclass(frozen=True)
class Eigenvalue:
    """An isolated eigenvalue, converged for one probe or more.

    Attributes:
        value: the node with the smallest residual.
        residual: an eigenvalue of the block lies within this distance of value.
        probes: number of probes for which it converged.
        reach: ten residuals, of the probe with the largest for which it converged; at most to the middle between the
            residual intervals of value and of the next listed eigenvalue above or below.
        multiplicity: number of eigenvalues within reach of value: dim times their mass, mean over all probes, at least
            1. None if the eigenvalue converged for fewer than half of the probes.
        multiplicity_interval: 95 % confidence interval, including the error of finite steps; None if multiplicity is.
    """

    value: float
    residual: float
    probes: int
    reach: float
    multiplicity: float | None
    multiplicity_interval: tuple[float, float] | None


def residuals(quadrature: Quadrature, block: int) -> Tensor:
    """Return |beta_m s_mi| of every node of a block, (n_probes, m) float64, at least rounding; NaN for padding.

    The eigenvectors of the tridiagonal matrices are recomputed, O(m^3) per probe.
    """
    q = quadrature
    bounds = torch.full_like(q.nodes[:, block], torch.nan)
    eps = EXHAUSTED_EPS * torch.finfo(getattr(torch, q.dtype)).eps
    for p, m in enumerate(q.steps[:, block].tolist()):
        if m == 0:
            continue
        beta = q.beta[p, block, : m - 1]
        matrix = torch.diag(q.alpha[p, block, :m]) + torch.diag(beta, 1) + torch.diag(beta, -1)
        values, vectors = torch.linalg.eigh(matrix)
        rounding = eps * float(values.abs().max())
        bounds[p, :m] = (q.beta[p, block, m - 1] * vectors[m - 1]).abs().clamp(min=rounding)
    return bounds


def eigenvalues(quadrature: Quadrature, block: int, tolerance: float = CONVERGED) -> list[Eigenvalue]:
    """Return the converged Ritz values of a block, largest |value| first.

    A node belongs to the eigenvalues with a smaller residual whose residual intervals overlap its own.

    Args:
        quadrature: quadrature of all blocks.
        block: index.
        tolerance: largest residual, relative to the block's largest |node|.

    Source: Parlett 1998, section 13.2.

    Example:
        >>> from blockhess_ext import batched_slq
        >>> q = batched_slq(lambda v: torch.tensor([2.0, 2.0, 5.0]) * v, [3], num_probes=2)
        >>> [(round(e.value, 3), e.probes) for e in eigenvalues(q, 0)]
        [(5.0, 2), (2.0, 2)]
    """
    valid = quadrature.valid[:, block]
    known = int((quadrature.steps[:, block] > 0).sum())
    if known == 0:
        return []
    bounds = residuals(quadrature, block)
    largest = quadrature.nodes[:, block][valid].abs().max()
    converged = valid & (bounds <= tolerance * largest)
    nodes = quadrature.nodes[:, block]
    value, residual = _separate(nodes[converged], bounds[converged])
    probes, largest_residual = [], []
    for x, distance in zip(value, residual):
        own = converged & ((nodes - x).abs() <= bounds + distance)
        least = bounds.masked_fill(~own, torch.inf).amin(1)
        probes.append(int(own.any(1).sum()))
        largest_residual.append(float(least[own.any(1)].max()))
    gaps = torch.nn.functional.pad((value - residual)[1:] - (value + residual)[:-1], (1, 1), value=torch.inf)
    reach = residual + torch.minimum(gaps[:-1], gaps[1:]) / 2
    reach = torch.minimum(reach, _REACH * torch.tensor(largest_residual, dtype=torch.float64, device="cpu"))

    recurrence, dim = Recurrence(quadrature, block), quadrature.dims[block]
    ends = torch.cat([torch.nextafter(value - reach, torch.full_like(value, -torch.inf)), value + reach])
    share = recurrence.cdf(ends)
    error = recurrence.mass_bound(ends.expand(known, -1)).masked_fill(recurrence.exact[:, None], 0.0)
    mass, error = share[:, len(value) :] - share[:, : len(value)], error[:, : len(value)] + error[:, len(value) :]

    def count_of(share: float) -> float:
        return min(max(1.0, dim * share), float(dim))

    found = []
    for i, count in enumerate(probes):
        multiplicity = interval = None
        if 2 * count >= known:
            lower, _ = _mean_interval(quadrature, block, (mass - error)[:, i].clamp(min=0.0))
            _, upper = _mean_interval(quadrature, block, (mass + error)[:, i].clamp(max=1.0))
            multiplicity, interval = count_of(float(mass[:, i].mean())), (count_of(lower), count_of(upper))
        found.append(Eigenvalue(float(value[i]), float(residual[i]), count, float(reach[i]), multiplicity, interval))
    return sorted(found, key=lambda e: -abs(e.value))


def _separate(nodes: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Choose nodes, smallest residual first, whose residual intervals do not overlap.

    Returns:
        nodes, residuals: those of the chosen nodes, by ascending node.
    """
    order = residual.argsort(stable=True)
    nodes, residual = nodes[order], residual[order]
    chosen, rest = [], torch.ones_like(order, dtype=torch.bool)
    while bool(rest.any()):
        best = int(rest.int().argmax())
        chosen.append(best)
        rest &= (nodes - nodes[best]).abs() > residual + residual[best]
        rest[best] = False
    value, ascending = nodes[chosen].sort()
    return value, residual[chosen][ascending]


def _mean_interval(q: Quadrature, block: int, masses: Tensor) -> tuple[float, float]:
    """Return the confidence interval of the mean of masses (n_known,) near one eigenvalue."""
    mean = masses.mean()[None]
    # The mean of f^2 is that of the indicator f of an interval; masses may be widened by the error of the steps.
    variance = variance_of_probes(q, block, masses[:, None], mean, _CONFIDENCE)
    lower, upper = gamma_interval(mean, variance, _CONFIDENCE)
    return float(lower), float(upper)
