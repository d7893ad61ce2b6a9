"""Converged Ritz values with residual bounds, merged over the probes of a block.

    an eigenvalue lies within |beta_m s_mi| of node i, s_i the i-th eigenvector of the tridiagonal matrix

In floating-point arithmetic this holds up to rounding of size eps |H|, also for ghosts (Paige 1980).
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

# Confidence of intervals of multiplicities.
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Eigenvalue:
    """An isolated eigenvalue, converged for one probe or more.

    Attributes:
        value: the node with the smallest residual.
        residual: an eigenvalue of the block lies within this distance of value.
        probes: number of probes for which it converged.
        multiplicity: dim times its weight, mean over all probes: about 1 for a simple eigenvalue. None if it converged
            for fewer than half of the probes.
        multiplicity_interval: 95 % confidence interval; None if multiplicity is. The weight of a probe for which it did
            not converge is between 0 and the bound of steps.Recurrence.mass_bound.
    """

    value: float
    residual: float
    probes: int
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

    Nodes within each other's residuals are merged into one eigenvalue.

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
    probe, node = (valid & (bounds <= tolerance * largest)).nonzero(as_tuple=True)
    value, weight = quadrature.nodes[probe, block, node], quadrature.weights[probe, block, node]
    bound = bounds[probe, node]
    clusters: list[list[int]] = []
    end = -torch.inf
    for i in (value - bound).argsort().tolist():
        low, high = float(value[i] - bound[i]), float(value[i] + bound[i])
        if low > end:
            clusters.append([])
        clusters[-1].append(i)
        end = max(end, high)
    if not clusters:
        return []
    best = [min(members, key=lambda i: float(bound[i])) for members in clusters]
    ends = (value[best] + torch.linspace(-1, 1, 5, dtype=torch.float64, device="cpu")[:, None] * bound[best]).flatten()
    unseen = Recurrence(quadrature, block).mass_bound(ends.expand(known, -1)).view(known, 5, -1).amax(1).clamp(max=1.0)
    recurrence_of = ((quadrature.steps[:, block] > 0).cumsum(0) - 1)[probe]
    merged, dim = [], quadrature.dims[block]
    for i, members, largest in zip(best, clusters, unseen.T):
        seen = torch.zeros(known, dtype=torch.float64, device="cpu").index_add(
            0, recurrence_of[members], weight[members]
        )
        probes, multiplicity, interval = int((seen > 0).sum()), None, None
        if 2 * probes >= known:
            lower, _ = _mean_interval(quadrature, block, seen)
            _, upper = _mean_interval(quadrature, block, torch.where(seen > 0, seen, largest))
            multiplicity, interval = dim * float(seen.mean()), (dim * lower, dim * upper)
        merged.append(Eigenvalue(float(value[i]), float(bound[i]), probes, multiplicity, interval))
    return sorted(merged, key=lambda e: -abs(e.value))


def _mean_interval(q: Quadrature, block: int, masses: Tensor) -> tuple[float, float]:
    """Return the confidence interval of the mean of the masses at one eigenvalue, (n_known,)."""
    mean = masses.mean()[None]
    variance = variance_of_probes(q, block, masses[:, None], mean, _CONFIDENCE)  # f is an indicator: f^2 = f
    lower, upper = gamma_interval(mean, variance, _CONFIDENCE)
    return float(lower), float(upper)
