"""One block on an axis whose divisor (spectral radius, k-th largest eigenvalue, trace) comes from the same probes.

The divisor has a confidence interval of its own: the trace's is that of probe_error.py, the k-th eigenvalue's that of
kth_eigenvalue, the radius' by the jackknife over probes, with Student's factor. What a band on the axis owes to it is
how far a divisor of that interval moves the value. This is not linearised: the jackknife of the whole normalised
density, which is, fails where the divisor is uncertain by more than sigma. The scale of an asinh axis is taken as
fixed: it is one number for all blocks, printed with the axis.

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

# A divisor is taken as known to be at least this share of its estimate.
_LEAST_DIVISOR = 1e-3

_MOST_DIVISORS = 64


class BlockOnAxis:
    """The probes of one block that made a step, and an axis.

    Attributes:
        recurrence: of the probes.
        axis: with the divisor of all of them.
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
        """Return the confidence interval of the divisor; of width 0 where it is fixed or the block exact."""
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
            half = student_quantile(confidence, max(count - 1, 1)) * float(
                jackknife(*leave_one_out(self._divisor, count))[1]
            )
            low, high = value - half, value + half
        return (max(low, _LEAST_DIVISOR * value), high) if high < math.inf else (value, value)

    def divisor_range(self, confidence: float, sigma: float | None = None) -> list[BlockAxis]:
        """Return axes whose divisors span that interval: none where it has width 0, else both ends or more.

        Args:
            confidence: of the interval.
            sigma: from one divisor to the next no eigenvalue moves by more on the axis, up to _MOST_DIVISORS.
        """
        low, high = self.divisor_interval(confidence)
        if not low < high:
            return []
        points = 2
        if sigma is not None:
            nodes = self.recurrence.nodes
            moved = float((nodes.abs() * self.axis.slope(nodes)).max()) * math.log(high / low)
            points = min(_MOST_DIVISORS, points + int(moved / sigma))
        return [self._axis.of_block(c) for c in torch.logspace(math.log10(low), math.log10(high), points).tolist()]

    def density(self, axis: BlockAxis, grid: Tensor, sigma: float) -> Tensor:
        """Return the density on an axis, (n_points,), mean over probes."""
        nodes, weights = self._pooled(list(range(len(self.recurrence.nodes))))
        return smooth(axis.place(nodes), weights, grid, sigma)[0]
