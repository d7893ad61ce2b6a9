"""One block on an axis whose divisor (spectral radius, k-th largest eigenvalue, trace) is estimated by the same probes.

The divisor has a confidence interval: of the trace from probes.py, of the k-th eigenvalue as in kth_eigenvalue, of the
spectral radius by the jackknife over probes with Student's factor. A band on the axis includes the changes of the value
over this interval, without linearization: a jackknife of the normalized density, which linearizes, fails if the error
of the divisor exceeds sigma. The scale of an asinh axis, one number for all blocks, is taken as fixed.

Source: Zou and Donner 2008 (the interval of what depends on two estimates, from the interval of each).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess.analysis import axes
from blockhess.analysis.axes import Axis, BlockAxis
from blockhess.analysis.density import smooth
from blockhess.analysis.errors.intervals import jackknife, leave_one_out, normal_quantile, student_quantile
from blockhess.analysis.errors.probes import trace_interval
from blockhess.analysis.errors.steps import Recurrence
from blockhess_ext import Quadrature

# Lower bound of a divisor, relative to its estimate.
_LEAST_DIVISOR = 1e-3

_MOST_DIVISORS = 64


class BlockOnAxis:
    """The recurrences of one block, and its axis.

    Attributes:
        recurrence: recurrences of the probes with at least one step.
        axis: axis with the divisor estimated from all of these probes.
    """

    def __init__(self, quadrature: Quadrature, block: int, axis: Axis) -> None:
        self._quadrature, self._block, self._axis = quadrature, block, axis
        self.recurrence = Recurrence(quadrature, block)
        count = len(self.recurrence.nodes)
        self.axis = axis.of_block(float(self._divisor(list(range(count))))) if count else axis.of_block()

    def _pooled(self, probes: list[int]) -> tuple[Tensor, Tensor]:
        nodes, weights = self.recurrence.nodes[probes], self.recurrence.weights[probes]
        return nodes.flatten()[None], (weights / len(probes)).flatten()[None]

    def _divisor(self, probes: list[int]) -> Tensor:
        return axes.divisors(*self._pooled(probes), [self._quadrature.dims[self._block]], self._axis.normalize)[0]

    def divisor_interval(self, confidence: float) -> tuple[float, float]:
        """Return the confidence interval of the divisor, of width 0 if the divisor is fixed or the block exact."""
        kind, value, count = self._axis.normalize, self.axis.divisor, len(self.recurrence.nodes)
        if kind == "none" or count == 0 or self._quadrature.is_exact(self._block):
            return value, value
        if kind == "trace":
            low, high = trace_interval(self._quadrature, self._block, confidence)
        elif isinstance(kind, int):
            half = normal_quantile(confidence) * math.sqrt(2 * kind / count)
            pooled, dims = self._pooled(list(range(count))), [self._quadrature.dims[self._block]]
            low, high = (float(axes.kth_largest(*pooled, dims, k)) for k in (kind + half, kind - half))
        else:
            _, stderr = jackknife(*leave_one_out(self._divisor, count))
            half = student_quantile(confidence, max(count - 1, 1)) * float(stderr)
            low, high = value - half, value + half
        return (max(low, _LEAST_DIVISOR * value), high) if high < math.inf else (value, value)

    def divisor_range(self, confidence: float, sigma: float | None = None) -> list[BlockAxis]:
        """Return axes whose divisors span divisor_interval: none if its width is 0, else two or more.

        Args:
            confidence: probability of the interval.
            sigma: largest shift of an eigenvalue on the axis from one divisor to the next, unless _MOST_DIVISORS is
                reached; None means the two ends of the interval only.
        """
        low, high = self.divisor_interval(confidence)
        if not low < high:
            return []
        points = 2
        if sigma is not None:
            nodes = self.recurrence.nodes
            shift = float((nodes.abs() * self.axis.slope(nodes)).max()) * math.log(high / low)
            points = min(_MOST_DIVISORS, points + int(shift / sigma))
        return [
            self._axis.of_block(c)
            for c in torch.logspace(math.log10(low), math.log10(high), points, device="cpu").tolist()
        ]

    def density(self, axis: BlockAxis, grid: Tensor, sigma: float) -> Tensor:
        """Return the density on an axis, mean over probes, (n_points,)."""
        nodes, weights = self._pooled(list(range(len(self.recurrence.nodes))))
        return smooth(axis.place(nodes), weights, grid, sigma)[0]
