"""Eigenvalues that Lanczos has found: converged Ritz values with residual bounds, merged over the probes of a block.

    some eigenvalue lies within |beta_m s_mi| of node i, s_i the i-th eigenvector of the tridiagonal matrix

That holds in exact arithmetic, and otherwise up to rounding of size eps |H|, ghost copies included (Paige 1980).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess_ext import Quadrature
from blockhess_ext.recurrences import EXHAUSTED_EPS

# A node is listed if its residual is at most this share of the block's largest |node|.
CONVERGED = 1e-3


@dataclass(frozen=True)
class Eigenvalue:
    """An eigenvalue that stands apart, found by one probe or more.

    Attributes:
        value: the node with the smallest residual.
        residual: an eigenvalue of the block lies within this distance of value.
        multiplicity: dim times the weight found there, mean over all probes: about 1 for a simple eigenvalue, with a
            relative error near sqrt(2 / n_probes).
        probes: how many probes found it.
    """

    value: float
    residual: float
    multiplicity: float
    probes: int


def residuals(quadrature: Quadrature, block: int) -> Tensor:
    """Return |beta_m s_mi| of every node of a block, (n_probes, m) float64, at least rounding; NaN where no node is.

    The eigenvectors of the tridiagonal matrices are computed anew, O(m^3) a probe.
    """
    q = quadrature
    bounds = torch.full_like(q.nodes[:, block], torch.nan)
    eps = EXHAUSTED_EPS * torch.finfo(getattr(torch, q.dtype)).eps
    for p, m in enumerate(q.steps[:, block].tolist()):
        if m == 0:
            continue
        coupling = q.beta[p, block, : m - 1]
        matrix = torch.diag(q.alpha[p, block, :m]) + torch.diag(coupling, 1) + torch.diag(coupling, -1)
        values, vectors = torch.linalg.eigh(matrix)
        rounding = eps * float(values.abs().max())
        bounds[p, :m] = (q.beta[p, block, m - 1] * vectors[m - 1]).abs().clamp(min=rounding)
    return bounds


def eigenvalues(quadrature: Quadrature, block: int, tolerance: float = CONVERGED) -> list[Eigenvalue]:
    """Return the eigenvalues that the probes of a block have found, largest |value| first.

    Nodes within each other's residuals are one eigenvalue, of whatever multiplicity.

    Args:
        quadrature: of all blocks.
        block: index.
        tolerance: largest residual, relative to the block's largest |node|.

    Source: Parlett 1998, section 13.2.

    Example:
        >>> from blockhess_ext import batched_slq
        >>> q = batched_slq(lambda v: torch.tensor([2.0, 2.0, 5.0]) * v, [3], num_probes=2)
        >>> [(round(e.value, 3), e.probes) for e in eigenvalues(q, 0)]
        [(5.0, 2), (2.0, 2)]
    """
    found = quadrature.valid[:, block]
    known = int((quadrature.steps[:, block] > 0).sum())
    if known == 0:
        return []
    bounds = residuals(quadrature, block)
    found = (
        found & (bounds <= tolerance * quadrature.nodes[:, block][found].abs().max()) if bool(found.any()) else found
    )
    probe, node = found.nonzero(as_tuple=True)
    value, weight = quadrature.nodes[probe, block, node], quadrature.weights[probe, block, node]
    bound = bounds[probe, node]
    order = (value - bound).argsort()
    clusters: list[list[int]] = []
    end = -torch.inf
    for i in order.tolist():
        low, high = float(value[i] - bound[i]), float(value[i] + bound[i])
        if low > end:
            clusters.append([])
        clusters[-1].append(i)
        end = max(end, high)
    merged = []
    for members in clusters:
        best = min(members, key=lambda i: float(bound[i]))
        share = float(weight[members].sum()) / known
        merged.append(
            Eigenvalue(
                value=float(value[best]),
                residual=float(bound[best]),
                multiplicity=quadrature.dims[block] * share,
                probes=len({int(probe[i]) for i in members}),
            )
        )
    return sorted(merged, key=lambda e: -abs(e.value))
