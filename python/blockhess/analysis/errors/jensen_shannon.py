"""Errors of Jensen-Shannon matrices and JS0: due to random probes, by the jackknife, and due to finite steps, bounds.

The divergence is convex in the spectra, so noise raises it, with a bias of order 1 / n_probes, which the jackknife
removes. The bias of the distance, its square root, is not of this order where spectra agree, and is computed from the
corrected divergence: sqrt(D) - sqrt(max(0, D - bias of D)).

With a tolerance a block may have k < n probes. Leaving out another probe does not change its spectrum, so that its
contributions to the bias and to the squared standard error are overestimated by the factor k (n - 1) / (n (k - 1)), to
first order: at most 2. Intervals are then too wide, and their center is overcorrected.

The integrand of the divergence of p and q is convex, and zero for p = q. If p and q lie between bounds, those of
steps.density_bound, its maximum is at a corner of this rectangle. Its minimum is zero if the bounds overlap, and at the
corner with the closest values if not.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockhess.analysis.axes import Axis
from blockhess.analysis.density import grid_spacing, node_grid
from blockhess.analysis.errors.intervals import jackknife, leave_one_out, student_quantile
from blockhess.analysis.errors.normalized_block import BlockOnAxis
from blockhess.analysis.errors.steps import density_bound
from blockhess.analysis.jensen_shannon import JS0, largest_value
from blockhess_ext import Quadrature

# The jackknife's standard error is up to 10 % too small if few eigenvalues dominate: bench/accuracy/columns.py.
_FEW_PROBES = 1.1

# Number of points that fill the gaps between nodes.
_FILLING = 1000

# Of the grid on which bounds are integrated, which costs much more than the divergence of two densities.
_POINTS_PER_SIGMA = 2


def mean_of_pairs(matrix: Tensor) -> float:
    """Return the mean of the off-diagonal entries of a matrix with zero diagonal."""
    n = len(matrix)
    return float(matrix.sum()) / (n * (n - 1))


def js_error(
    divergence: Callable[[list[int]], Tensor], kind: str, n_probes: int
) -> tuple[Tensor, Tensor, float, float]:
    """Estimate the bias and standard error of a js_matrix and of its mean over pairs.

    Args:
        divergence: maps the indices of the probes to use to a js_matrix of kind "divergence".
        kind: kind of the js_matrix, one of jensen_shannon.KINDS.
        n_probes: number of probes; with one, all estimates are NaN.

    Returns:
        bias, stderr of the matrix, (L, L) each; bias, stderr of JS0.

    Source: Quenouille 1956; Tukey 1958.
    """
    value, parts = leave_one_out(divergence, n_probes)
    bias, stderr = jackknife(value, parts)
    if kind == "distance":
        distance = value.sqrt()
        bias = distance - (value - bias).clamp(min=0.0).sqrt()
        parts = parts.sqrt()
        stderr = jackknife(distance, parts)[1]
    means = torch.tensor([mean_of_pairs(part) for part in parts], dtype=torch.float64)
    return bias, stderr, mean_of_pairs(bias), float(jackknife(torch.tensor(0.0), means)[1])


def steps_range(q: Quadrature, rows: Sequence[int], axis: Axis, js0: JS0) -> tuple[float, float]:
    """Return bounds of JS0 with as many steps as needed and the same probes.

    Args:
        q: quadrature of all blocks, see selection.quadrature_for.
        rows: indices of the compared blocks.
        axis: resolved, see selection.resolved_axis.
        js0: kind, base and sigma.
    """
    parts = [BlockOnAxis(q, row, axis) for row in rows]
    nodes = torch.cat([part.axis.place(part.recurrence.nodes).flatten() for part in parts])
    # Gaps between nodes may hold eigenvalues that were not seen: the grid has none.
    between = torch.linspace(float(nodes.min()), float(nodes.max()), _FILLING, dtype=torch.float64)
    grid = node_grid(torch.cat([nodes, between]), js0.sigma, _POINTS_PER_SIGMA)
    density = torch.stack([part.density(part.axis, grid, js0.sigma) for part in parts])
    error = torch.stack([density_bound(q, row, grid, js0.sigma, part.axis) for row, part in zip(rows, parts)])
    low, high = (density - error).clamp(min=0.0), density + error
    sums = torch.zeros(2, len(rows), len(rows), dtype=torch.float64)
    for i in range(len(rows) - 1):
        own, others = (low[i], high[i]), (low[i + 1 :], high[i + 1 :])
        above = _divergence(own[0], torch.minimum(own[0], others[1]))
        below = _divergence(torch.minimum(own[1], others[0]), others[0])
        least = torch.maximum(above, below)  # at most one of them is not zero
        most = torch.maximum(_divergence(own[1], others[0]), _divergence(own[0], others[1]))
        sums[0, i, i + 1 :], sums[1, i, i + 1 :] = least.sum(1), most.sum(1)
    largest = largest_value("divergence", js0.base)
    sums = (sums * (grid_spacing(js0.sigma, _POINTS_PER_SIGMA) / math.log(js0.base))).clamp(max=largest)
    lower, upper = (mean_of_pairs(part + part.T) for part in (sums.sqrt() if js0.kind == "distance" else sums))
    return min(lower, js0.value), max(upper, js0.value)


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """Return 1/2 p log(p / m) + 1/2 q log(q / m), m = (p + q) / 2, not below 0."""
    m = ((p + q) / 2).clamp(min=1e-300)
    return (0.5 * (torch.xlogy(p, p / m) + torch.xlogy(q, q / m))).clamp(min=0.0)


def with_interval(
    js0: JS0, bias: float, stderr: float, n_probes: int, confidence: float, steps: tuple[float, float]
) -> JS0:
    """Return JS0 with bias, standard error and intervals, within the bounds of its kind.

    The interval for the probes is Student's about value - bias, times _FEW_PROBES. The total interval is wider by the
    distances of the value from its bounds for the steps.

    Args:
        steps: see steps_range.
    """
    center, half = js0.value - bias, _FEW_PROBES * student_quantile(confidence, max(n_probes - 1, 1)) * stderr
    largest = largest_value(js0.kind, js0.base)

    def widened(below: float, above: float) -> tuple[float, float, float]:
        return max(0.0, center - half - below), min(largest, center + half + above), confidence

    total, probes = widened(js0.value - steps[0], steps[1] - js0.value), widened(0.0, 0.0)
    if math.isnan(half):  # one probe
        total = probes = 0.0, largest, confidence
    return dataclasses.replace(js0, interval=total, probes_interval=probes, bias=bias, stderr=stderr)
