"""Variance of v^T f(H) v over random probes v, and the confidence intervals of the trace and of the Frobenius norm.

For Gaussian probes the variance is at least the theoretical one (intervals.py), times 1 + 1 / n_probes, as it is
computed from means over the same probes. Any excess of the sample variance is added, scaled by Student's factor. For
other probes it is the sample variance alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess.analysis.errors.intervals import gamma_interval, variance_of_mean
from blockhess.analysis.errors.steps import Recurrence
from blockhess_ext import Quadrature


def variance_of_probes(q: Quadrature, block: int, values: Tensor, mean_square: Tensor, confidence: float) -> Tensor:
    """Return the variance of the mean of v^T f(H) v over probes, for a normal interval: see variance_of_mean.

    Args:
        values: (n_known, ...) v^T f(H) v of every probe.
        mean_square: (...) mean of f^2 over the eigenvalues, for the theoretical variance of Gaussian probes.
    """
    if q.is_exact(block):  # all probes give the same value
        return torch.zeros_like(mean_square)
    known = torch.zeros_like(mean_square)
    if q.distribution == "gaussian":
        known = (2 / (q.dims[block] + 2) * (mean_square - values.mean(0) ** 2)).clamp(min=0.0) * (1 + 1 / len(values))
    return variance_of_mean(values, known, confidence)


def trace_interval(q: Quadrature, block: int, confidence: float) -> tuple[float, float]:
    """Return the confidence interval of the trace of a block; (-inf, inf) with one probe unless it is exact.

    The first moment of a probe's quadrature is exact after one step, so the steps add no error. The sums of positive
    and of negative eigenvalues are taken as two Gamma variables, which share the variance in proportion to their sums
    of squares, and their intervals are combined.

    Source: Zou and Donner 2008 (the interval of a difference from those of its parts).
    """
    recurrence, dim = Recurrence(q, block), q.dims[block]
    nodes, weights = recurrence.nodes, recurrence.weights
    if len(nodes) < (1 if q.is_exact(block) else 2):
        return -math.inf, math.inf
    values = (weights * nodes).sum(1)
    mean, square = values.mean(), (weights * nodes**2).sum(1).mean()
    variance = variance_of_probes(q, block, values, square, confidence)
    ends = []
    for sign in (1.0, -1.0):
        side = (sign * nodes).clamp(min=0.0)
        part = (weights * side).sum(1).mean()
        share = (weights * side**2).sum(1).mean() / square if square > 0 else torch.zeros_like(mean)
        lower, upper = gamma_interval(part[None], (variance * share)[None], confidence)
        ends.append((float(part - lower), float(upper - part)))
    (below, above), (other_below, other_above) = ends
    return dim * (float(mean) - math.hypot(below, other_above)), dim * (float(mean) + math.hypot(above, other_below))


def frobenius_interval(q: Quadrature, block: int, confidence: float) -> tuple[float, float]:
    """Return the confidence interval of |H|_F of a block; (0, inf) with one probe unless it is exact.

    The second moment of a probe's quadrature is exact after two steps, and |H v|^2 = alpha_0^2 + beta_0^2 after one, so
    the steps add no error.
    """
    recurrence = Recurrence(q, block)
    if len(recurrence.nodes) < (1 if q.is_exact(block) else 2):
        return 0.0, math.inf
    # Relative to the largest node, as fourth powers could underflow.
    scale = float(recurrence.nodes.abs().max()) or 1.0
    relative = recurrence.nodes / scale
    residual = torch.where(recurrence.steps == 1, recurrence.beta[:, 0] / scale, 0.0)
    values = (recurrence.weights * relative**2).sum(1) + residual**2
    fourth = (recurrence.weights * relative**4).sum(1).mean()
    variance = variance_of_probes(q, block, values, fourth, confidence)
    ends = gamma_interval(values.mean()[None], variance[None], confidence)
    lower, upper = (scale * math.sqrt(q.dims[block] * float(end)) for end in ends)
    return lower, upper
