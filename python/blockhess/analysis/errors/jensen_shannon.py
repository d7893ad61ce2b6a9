"""Errors of Jensen-Shannon matrices and JS0: due to random probes, by the jackknife, and due to finite steps.

The divergence is convex in the spectra, so noise raises it, with a bias of order 1 / n_probes, which the jackknife
removes. The bias of the distance, its square root, is not of this order where spectra agree, and is computed from the
corrected divergence: sqrt(D) - sqrt(max(0, D - bias of D)).

With a tolerance a block may have k < n probes. Leaving out another probe does not change its spectrum, so that its
contributions to the bias and to the squared standard error are overestimated by the factor k (n - 1) / (n (k - 1)), to
first order: at most 2. Intervals are then too wide, and their center is overcorrected.

The distance is a metric, so finite steps change the distance of P and Q by at most d(P, P_m) + d(Q, Q_m), where P_m and
Q_m are the quadratures of m steps. This holds even where these do not overlap, and their distance is near 1 for all m.
The error of a pair is taken as the larger of d(P_m, P_{m/2}) and d(Q_m, Q_{m/2}), that of the mean over the pairs of L
blocks as sqrt(2 / L) of their mean, since errors of different blocks partly cancel. bench/accuracy/columns.py measures
how often the interval contains the exact value.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from blockhess.analysis.errors.intervals import jackknife, leave_one_out, student_quantile
from blockhess.analysis.jensen_shannon import JS0, largest_value

# The jackknife's standard error is up to 10 % too small if few eigenvalues dominate: bench/accuracy/columns.py.
_FEW_PROBES = 1.1


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
    means = torch.tensor([mean_of_pairs(part) for part in parts], dtype=torch.float64, device="cpu")
    return bias, stderr, mean_of_pairs(bias), float(jackknife(torch.tensor(0.0, device="cpu"), means)[1])


def steps_error(matrix: Tensor, changes: Tensor, kind: str) -> float:
    """Estimate the error of JS0 due to finite steps.

    Args:
        matrix: (L, L) js_matrix of the result.
        changes: (L,) distances between the spectra from all and from half of the steps.
        kind: kind of the matrix. The divergence is the square of the distance.
    """
    error = torch.maximum(changes[:, None], changes).fill_diagonal_(0.0)
    if kind == "divergence":
        error = error * (2 * matrix.sqrt() + error)
    return math.sqrt(2 / len(changes)) * mean_of_pairs(error)


def with_interval(js0: JS0, bias: float, stderr: float, n_probes: int, confidence: float, steps: float = 0.0) -> JS0:
    """Return JS0 with bias, standard error and intervals, within the bounds of its kind.

    The interval for the probes is Student's about value - bias, times _FEW_PROBES. The total interval is wider by the
    error of the steps on both sides.

    Args:
        steps: see steps_error.
    """
    center, half = js0.value - bias, _FEW_PROBES * student_quantile(confidence, max(n_probes - 1, 1)) * stderr
    largest = largest_value(js0.kind, js0.base)

    def around(half: float) -> tuple[float, float, float]:
        return max(0.0, center - half), min(largest, center + half), confidence

    total, probes = around(half + steps), around(half)
    if math.isnan(half):  # one probe
        total = probes = 0.0, largest, confidence
    return dataclasses.replace(js0, interval=total, probes_interval=probes, bias=bias, stderr=stderr)
