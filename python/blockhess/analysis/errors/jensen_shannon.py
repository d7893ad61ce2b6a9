"""What random probes do to Jensen-Shannon matrices and JS0, by the jackknife over probes.

The divergence is convex in the spectra, so noise raises it, by a bias that falls as 1 / n_probes: what the jackknife
removes. The distance, its square root, has no such bias where spectra agree, so its bias is taken from the corrected
divergence: sqrt(D) - sqrt(max(0, D - bias of D)).

A block may have k < n of the probes, where a tolerance chose how many. To leave out one that it lacks changes nothing
of it, so what it adds to the bias, and to the squared standard error, is overestimated by k (n - 1) / (n (k - 1)), to
first order: at most by 2. Intervals are then too wide, about a middle that is corrected too much.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess.analysis.errors.intervals import jackknife, leave_one_out, student_quantile
from blockhess.analysis.jensen_shannon import JS0, largest_value


@dataclass(frozen=True, eq=False)
class JSError:
    """Jackknife estimates for a js_matrix and its JS0.

    Attributes:
        bias, stderr: (L, L), of the matrix.
        js0_bias, js0_stderr: of its mean over pairs.
        num_probes: how many there were.
    """

    bias: Tensor
    stderr: Tensor
    js0_bias: float
    js0_stderr: float
    num_probes: int


def mean_of_pairs(matrix: Tensor) -> float:
    """Return the mean of the off-diagonal entries of a matrix with zero diagonal."""
    n = len(matrix)
    return float(matrix.sum()) / (n * (n - 1))


def js_error(matrix: Callable[[list[int], str], Tensor], kind: str, n_probes: int) -> JSError:
    """Estimate bias and standard error of a js_matrix of some kind.

    Args:
        matrix: maps the indices of the probes to use, and a kind, to a js_matrix.
        kind: one of jensen_shannon.KINDS.
        n_probes: number of probes; with one, all estimates are NaN.

    Source: Quenouille 1956; Tukey 1958.
    """
    raw = "divergence" if kind == "distance" else kind
    value, parts = leave_one_out(lambda probes: matrix(probes, raw), n_probes)
    bias, stderr = jackknife(value, parts)
    if kind == "distance":
        distance = value.sqrt()
        bias = distance - (value - bias).clamp(min=0.0).sqrt()
        parts = parts.sqrt()
        stderr = jackknife(distance, parts)[1]
    means = torch.tensor([mean_of_pairs(part) for part in parts], dtype=torch.float64)
    js0_stderr = float(jackknife(torch.tensor(0.0), means)[1])
    return JSError(bias, stderr, mean_of_pairs(bias), js0_stderr, n_probes)


def with_interval(js0: JS0, error: JSError, confidence: float) -> JS0:
    """Return JS0 with bias, standard error and Student's interval about value - bias, within the bounds of its kind."""
    student = student_quantile(confidence, max(error.num_probes - 1, 1))
    middle, half = js0.value - error.js0_bias, student * error.js0_stderr
    largest = largest_value(js0.kind, js0.base)
    if math.isnan(half):  # one probe tells nothing
        lower, upper = 0.0, largest
    else:
        lower, upper = max(0.0, middle - half), min(largest, middle + half)
    return dataclasses.replace(js0, interval=(lower, upper, confidence), bias=error.js0_bias, stderr=error.js0_stderr)
