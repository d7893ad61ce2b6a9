"""What random probes leave open of v^T f(H) v: its variance, and the interval of the trace.

For Gaussian probes theory knows the variance that a spectrum causes (intervals.py); what a sample shows beyond it, and
for other probes all of it, is taken from the sample.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess.analysis.errors.intervals import gamma_interval, variance_of_mean
from blockhess.analysis.errors.steps import Recurrence
from blockhess_ext import Quadrature


def variance_of_probes(q: Quadrature, block: int, values: Tensor, mean_square: Tensor, confidence: float) -> Tensor:
    """Return the variance of the mean of v^T f(H) v over probes, to be used with a normal factor: see intervals.

    Args:
        values: (n_known, ...) of the probes.
        mean_square: (...) mean of f^2 over the eigenvalues, for what theory knows of Gaussian probes.
    """
    if q.is_exact(block):  # every probe gives the same
        return torch.zeros_like(mean_square)
    known = torch.zeros_like(mean_square)
    if q.distribution == "gaussian":
        known = (2 / (q.dims[block] + 2) * (mean_square - values.mean(0) ** 2)).clamp(min=0.0)
    return variance_of_mean(values, known, confidence)


def trace_interval(q: Quadrature, block: int, confidence: float) -> tuple[float, float]:
    """Return the confidence interval of the trace of a block; the whole line where one probe says all there is.

    The trace of a probe's quadrature is exact after one step, so this is the whole error. Positive and negative
    eigenvalues are taken as two Gamma variables that share the variance in proportion to their squares, and their
    intervals combined.

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
