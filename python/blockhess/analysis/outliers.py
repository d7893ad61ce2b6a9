"""Converged Ritz values with residual bounds, merged over the probes of a block.

    an eigenvalue lies within |beta_m s_mi| of node i, s_i the i-th eigenvector of the tridiagonal matrix

In floating-point arithmetic this holds up to rounding of size eps |H|, also for ghosts (Paige 1980).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess_ext import Quadrature
from blockhess_ext.recurrences import EXHAUSTED_EPS

# Largest residual of a converged node, relative to the block's largest |node|.
CONVERGED = 1e-3


@dataclass(frozen=True)
class Eigenvalue:
    """An isolated eigenvalue, converged for one probe or more.

    Attributes:
        value: the node with the smallest residual.
        residual: an eigenvalue of the block lies within this distance of value.
        multiplicity: dim times its weight, mean over all probes: about 1 for a simple eigenvalue, with a relative error
            near sqrt(2 / n_probes).
        probes: number of probes for which it converged.
    """

    value: float
    residual: float
    multiplicity: float
    probes: int


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
    merged = []
    for members in clusters:
        best = min(members, key=lambda i: float(bound[i]))
        multiplicity = quadrature.dims[block] * (float(weight[members].sum()) / known)
        probes = len({int(probe[i]) for i in members})
        merged.append(Eigenvalue(float(value[best]), float(bound[best]), multiplicity, probes))
    return sorted(merged, key=lambda e: -abs(e.value))
