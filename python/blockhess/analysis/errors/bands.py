"""Error bars of densities, distribution functions and traces: the random probes' part, and what the steps leave open.

    statistical band    where the expectation over probes lies, at the same number of steps
    total band          where the truth lies: the statistical band widened by the bounds of truncation.py

For Gaussian probes theory knows the variance that a spectrum causes (intervals.py); what a sample shows beyond it, and
for other probes all of it, is taken from the sample. Bands hold pointwise, each with the stated probability.
With a single probe nothing is known of its error, and bands are as wide as can be.

On a normalised axis the divisor is random too, and its interval is in the statistical band: see on_axis.py. What the
steps leave open of the divisor itself is not in the total band (that of the trace is none).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess.analysis import distribution
from blockhess.analysis.axes import Axis
from blockhess.analysis.density import smooth
from blockhess.analysis.errors import steps
from blockhess.analysis.errors.intervals import gamma_interval, mean_and_variance, normal_quantile, student_quantile
from blockhess.analysis.errors.normalized_block import BlockOnAxis
from blockhess.analysis.errors.probes import variance_of_probes
from blockhess_ext import Quadrature

RAW = Axis()

_ONE_SIGMA = 0.6827  # of a normal variable within its standard error


@dataclass(frozen=True, eq=False)
class Band:
    """Values on a grid with their error bars.

    Attributes:
        x: (n_points,) eigenvalues.
        value: (n_blocks, n_points).
        lower, upper: (n_blocks, n_points), the statistical band.
        total_lower, total_upper: (n_blocks, n_points), the total band.
        confidence: probability of either, pointwise.
    """

    x: Tensor
    value: Tensor
    lower: Tensor
    upper: Tensor
    total_lower: Tensor
    total_upper: Tensor
    confidence: float


def _stack(x: Tensor, parts: Sequence[tuple[Tensor, ...]], confidence: float) -> Band:
    value, lower, upper, total_lower, total_upper = (torch.stack(columns) for columns in zip(*parts))
    return Band(x, value, lower, upper, total_lower, total_upper, confidence)


def density_band(
    q: Quadrature, blocks: Sequence[int], grid: Tensor, sigma: float, confidence: float, axis: Axis = RAW
) -> Band:
    """Return the smoothed densities of some blocks with their bands.

    Args:
        q: of all blocks.
        blocks: indices.
        grid: (n_points,) float64, ascending, on the axis.
        sigma: width of the Gaussian on the axis, one for all.
        confidence: probability in (0, 1).
        axis: of the densities.
    """
    bands = [_density_band(q, block, BlockOnAxis(q, block, axis), grid, sigma, confidence) for block in blocks]
    return _stack(grid, bands, confidence)


def _density_band(
    q: Quadrature, block: int, seen: BlockOnAxis, grid: Tensor, sigma: float, confidence: float
) -> tuple[Tensor, ...]:
    weights, nodes = seen.recurrence.weights, seen.axis.place(seen.recurrence.nodes)
    peak = 1 / (sigma * math.sqrt(2 * math.pi))
    if not len(nodes):
        return (torch.zeros_like(grid), *_nothing(grid, peak), *_nothing(grid, peak))
    values = smooth(nodes, weights, grid, sigma)
    value = values.mean(0)
    # g^2 is a Gaussian of width sigma / sqrt(2), times peak / sqrt(2).
    squares = smooth(nodes, weights, grid, sigma / math.sqrt(2)).mean(0) * (peak / math.sqrt(2))
    lower, upper = gamma_interval(value, variance_of_probes(q, block, values, squares, confidence), confidence)
    moves = [seen.density(on, grid, sigma) - value for on in seen.divisor_range(confidence, sigma)]
    lower, upper = _moved_by_divisor(value, (lower, upper), moves)
    # Rounding moves eigenvalues by some eps |H|; g' is at most exp(-1/2) peak / sigma.
    steepest = float(seen.axis.slope(torch.zeros(1, dtype=torch.float64)))
    moved = torch.finfo(getattr(torch, q.dtype)).eps * float(seen.recurrence.nodes.abs().max()) * steepest
    rounding = moved / sigma * math.exp(-0.5) * peak
    lower, upper = (lower - rounding).clamp(min=0.0), (upper + rounding).clamp(max=peak)
    bound = steps.density_bound(q, block, grid, sigma, seen.axis)
    return value, lower, upper, (lower - bound).clamp(min=0.0), (upper + bound).clamp(max=peak)


def _nothing(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.full_like(x, largest)


def cdf_band(q: Quadrature, blocks: Sequence[int], x: Tensor, confidence: float, axis: Axis = RAW) -> Band:
    """Return the shares of eigenvalues <= x of some blocks with their bands.

    Quadratures are steps, and where x lies so near a node that the next probe's may be on its other side, few probes
    may all be on one side: the sample then shows no spread though the step is the larger part of it. There the band is
    at least as wide as theory's variance of the weights and a step that n_probes probes in a row did not show.

    Args:
        q: of all blocks.
        blocks: indices.
        x: (n_points,) float64, on the axis.
        confidence: probability in (0, 1).
        axis: of x.

    Source: Clopper and Pearson 1934 (an event not seen in n trials).
    """
    return _stack(x, [_cdf_band(q, block, BlockOnAxis(q, block, axis), x, confidence) for block in blocks], confidence)


def _cdf_band(q: Quadrature, block: int, seen: BlockOnAxis, y: Tensor, confidence: float) -> tuple[Tensor, ...]:
    recurrence, x = seen.recurrence, seen.axis.invert(y)
    count = len(recurrence.steps)
    if count == 0:
        return (torch.full_like(x, math.nan), *_nothing(x, 1.0), *_nothing(x, 1.0))
    values = recurrence.cdf(x)
    value = values.mean(0)
    moves = [recurrence.cdf(axis.invert(y)).mean(0) - value for axis in seen.divisor_range(confidence)]
    lower, upper = _moved_by_divisor(value, _share_interval(q, block, values, confidence), moves)
    step = recurrence.polynomials(x.expand(count, -1))[0].masked_fill(recurrence.exact[:, None], 0.0).mean(0)
    unseen = step * (1 - ((1 - confidence) / 2) ** (1 / count))
    weights = torch.minimum(
        variance_of_probes(q, block, values, value, confidence), 2 / (q.dims[block] + 2) * value * (1 - value) / count
    )
    half = torch.hypot(unseen, normal_quantile(confidence) * weights.clamp(min=0.0).sqrt())
    half = torch.where(_may_step(recurrence.nodes, x, confidence), half, 0.0)
    lower, upper = torch.minimum(lower, value - half).clamp(min=0.0), torch.maximum(upper, value + half).clamp(max=1.0)

    below, above = recurrence.cdf_bounds(x)
    low, high = (
        _moved_by_divisor(part.mean(0), _share_interval(q, block, part, confidence), moves)[side]
        for side, part in enumerate((below, above))
    )
    total_lower, total_upper = torch.minimum(low, lower).clamp(min=0.0), torch.maximum(high, upper).clamp(max=1.0)
    return value, lower, upper, total_lower, total_upper


def _moved_by_divisor(value: Tensor, band: tuple[Tensor, Tensor], moves: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Widen a band of a fixed divisor by what other divisors of its interval add to the value: squares added."""
    if not moves:
        return band
    low, high = torch.stack(list(moves)).aminmax(dim=0)
    lower = value - torch.hypot(value - band[0], low.clamp(max=0.0))
    return lower, value + torch.hypot(band[1] - value, high.clamp(min=0.0))


def _may_step(nodes: Tensor, x: Tensor, confidence: float) -> Tensor:
    """Whether the node of the next probe may lie on the other side of x, (n_points,): Student's prediction interval.

    Args:
        nodes: (n_probes, m) float64, ascending.
        x: (n_points,) float64.
    """
    count = len(nodes)
    if count == 1:
        return torch.ones_like(x, dtype=torch.bool)
    reach = student_quantile(confidence, count - 1) * math.sqrt(1 + 1 / count)
    ends = torch.full((count, 1), math.inf, dtype=torch.float64)
    padded = torch.cat([-ends, nodes, ends], 1)
    upto = torch.searchsorted(nodes, x.expand(count, -1).contiguous(), right=True)
    left, right = x - padded.gather(1, upto), padded.gather(1, upto + 1) - x
    return (left.mean(0) <= reach * left.std(0)) | (right.mean(0) <= reach * right.std(0))


def _share_interval(q: Quadrature, block: int, shares: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Interval of the expectation of shares in [0, 1], (n_known, n_points): Gamma on the side that is smaller."""
    mean = shares.mean(0)
    variance = variance_of_probes(q, block, shares, mean, confidence)
    lower, upper = gamma_interval(mean, variance, confidence)
    rest_lower, rest_upper = gamma_interval((1 - mean).clamp(min=0.0), variance, confidence)
    small = mean < 0.5
    return (
        torch.where(small, lower, 1 - rest_upper).clamp(min=0.0),
        torch.where(small, upper, 1 - rest_lower).clamp(max=1.0),
    )


def wasserstein_error(q: Quadrature, blocks: Sequence[int], axis: Axis = RAW) -> tuple[Tensor, Tensor]:
    """Return how far, in Wasserstein-1 distance, probes and steps may have left the spectra from the truth.

    Args:
        q: of all blocks.
        blocks: indices.
        axis: on which.

    Returns:
        probes, steps: (len(blocks),) each, in units of the axis: int stderr(cdf(y)) dy, which estimates the part of
        the probes (infinite with one), and the bound of truncation.wasserstein_bound, mean over probes.
    """
    seen = [BlockOnAxis(q, block, axis) for block in blocks]
    from_probes = [_cdf_stderr_area(one, q.is_exact(block)) for one, block in zip(seen, blocks)]
    from_steps = [float(steps.wasserstein_bound(one.recurrence, one.axis).mean()) for one in seen]
    return torch.tensor(from_probes, dtype=torch.float64), torch.tensor(from_steps, dtype=torch.float64)


def _cdf_stderr_area(seen: BlockOnAxis, exact: bool) -> float:
    nodes, weights = seen.recurrence.nodes, seen.recurrence.weights
    count = len(nodes)
    if count == 0:
        return math.nan
    if exact or count == 1:
        return 0.0 if exact else math.inf
    others = seen.divisor_range(_ONE_SIGMA)
    y = torch.unique(torch.cat([axis.place(nodes).flatten() for axis in (seen.axis, *others)]))
    _, variance, _ = mean_and_variance(distribution.cdf(seen.axis.place(nodes), weights, y))
    stderr = (variance / count).sqrt()
    if others:
        low, high = (distribution.cdf(axis.place(nodes), weights, y).mean(0) for axis in (others[0], others[-1]))
        stderr = torch.hypot(stderr, (high - low) / 2)
    return float((stderr[:-1] * y.diff()).sum())
