"""Bias and standard error of Jensen-Shannon matrices and JS0 due to random probes, by the jackknife over probes.

The divergence is convex in the spectra, so noise raises it, with a bias of order 1 / n_probes, which the jackknife
removes. The bias of the distance, its square root, is not of this order where spectra agree, and is computed from the
corrected divergence: sqrt(D) - sqrt(max(0, D - bias of D)).

With a tolerance a block may have k < n probes. Leaving out another probe does not change its spectrum, so that its
contributions to the bias and to the squared standard error are overestimated by the factor k (n - 1) / (n (k - 1)), to
first order: at most 2. Intervals are then too wide, and their center is overcorrected.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from blockhess.analysis.errors.intervals import jackknife, leave_one_out, student_quantile
from blockhess.analysis.jensen_shannon import JS0, largest_value


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


def with_interval(js0: JS0, bias: float, stderr: float, n_probes: int, confidence: float) -> JS0:
    """Return JS0 with bias, standard error and Student's interval about value - bias, within the bounds of its kind."""
    center, half = js0.value - bias, student_quantile(confidence, max(n_probes - 1, 1)) * stderr
    lower, upper = 0.0, largest_value(js0.kind, js0.base)
    if not math.isnan(half):  # it is with one probe
        lower, upper = max(lower, center - half), min(upper, center + half)
    return dataclasses.replace(js0, interval=(lower, upper, confidence), bias=bias, stderr=stderr)
