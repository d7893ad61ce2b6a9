"""Error bands of densities and distribution functions, for the error of random probes and of finite Lanczos steps.

    statistical band    confidence interval of the expectation over probes, at the same number of steps
    total band          interval of the exact value: the statistical band widened by the bounds of steps.py

The variance over probes is that of probes.py. Bands are pointwise, each with the stated confidence. With a single
probe the variance is unknown, and bands are as wide as possible.

On a normalized axis the statistical band includes the interval of the divisor, which is random too: see
normalized_block.py. The total band does not include the error of the divisor due to finite steps (0 for the trace).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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

LINEAR = Axis()

_ONE_SIGMA = 0.6827  # confidence of an interval of one standard error


@dataclass(frozen=True, eq=False)
class Band:
    """Values on a grid with their error bands.

    Attributes:
        x: (n_points,) eigenvalues.
        value: (n_blocks, n_points).
        lower, upper: (n_blocks, n_points), the statistical band.
        total_lower, total_upper: (n_blocks, n_points), the total band.
        confidence: probability of each band, pointwise.
    """

    x: Tensor
    value: Tensor
    lower: Tensor
    upper: Tensor
    total_lower: Tensor
    total_upper: Tensor
    confidence: float


def _stack(x: Tensor, bands: Iterable[tuple[Tensor, ...]], confidence: float) -> Band:
    value, lower, upper, total_lower, total_upper = map(torch.stack, zip(*bands))
    return Band(x, value, lower, upper, total_lower, total_upper, confidence)


def density_band(
    q: Quadrature, blocks: Sequence[int], grid: Tensor, sigma: float, confidence: float, axis: Axis = LINEAR
) -> Band:
    """Return the smoothed densities of the blocks with these indices, and their bands.

    Args:
        q: quadrature of all blocks.
        blocks: indices.
        grid: (n_points,) float64, ascending, on the axis.
        sigma: standard deviation of the Gaussian on the axis, the same for all blocks.
        confidence: probability in (0, 1).
        axis: resolved, see selection.resolved_axis.
    """
    return _stack(grid, (_density_band(q, block, grid, sigma, confidence, axis) for block in blocks), confidence)


def _density_band(
    q: Quadrature, block: int, grid: Tensor, sigma: float, confidence: float, axis: Axis
) -> tuple[Tensor, ...]:
    normalized = BlockOnAxis(q, block, axis)
    weights, nodes = normalized.recurrence.weights, normalized.axis.place(normalized.recurrence.nodes)
    peak = 1 / (sigma * math.sqrt(2 * math.pi))
    if not len(nodes):
        zero, highest = torch.zeros_like(grid), torch.full_like(grid, peak)
        return zero, zero, highest, zero, highest
    values = smooth(nodes, weights, grid, sigma)
    value = values.mean(0)
    # g^2 is a Gaussian of width sigma / sqrt(2), times peak / sqrt(2).
    squares = smooth(nodes, weights, grid, sigma / math.sqrt(2)).mean(0) * (peak / math.sqrt(2))
    lower, upper = gamma_interval(value, variance_of_probes(q, block, values, squares, confidence), confidence)
    changes = [
        normalized.density(scaled, grid, sigma) - value for scaled in normalized.divisor_range(confidence, sigma)
    ]
    lower, upper = _add_divisor_error(value, (lower, upper), changes)
    # Rounding shifts eigenvalues by about eps |H|, and |g'| is at most exp(-1/2) peak / sigma.
    slope = float(normalized.axis.slope(torch.zeros(1, dtype=torch.float64, device="cpu")))
    shift = torch.finfo(getattr(torch, q.dtype)).eps * float(normalized.recurrence.nodes.abs().max()) * slope
    rounding = shift / sigma * math.exp(-0.5) * peak
    lower, upper = (lower - rounding).clamp(min=0.0), (upper + rounding).clamp(max=peak)
    bound = steps.density_bound(q, block, grid, sigma, normalized.axis)
    return value, lower, upper, (lower - bound).clamp(min=0.0), (upper + bound).clamp(max=peak)


def cdf_band(q: Quadrature, blocks: Sequence[int], x: Tensor, confidence: float, axis: Axis = LINEAR) -> Band:
    """Return the shares of eigenvalues <= x of the blocks with these indices, and their bands.

    The cdf of a quadrature is a step function. Close to a node, few probes may all have their node on the same side of
    x: the sample variance is then 0, although the step is the largest part of the error. There the band includes the
    theoretical variance of the weights and the step times the upper bound of the probability of an event that did not
    occur in n_probes trials.

    Args:
        q: quadrature of all blocks.
        blocks: indices.
        x: (n_points,) float64, on the axis.
        confidence: probability in (0, 1).
        axis: resolved, see selection.resolved_axis.

    Source: Clopper and Pearson 1934 (an event that did not occur in n trials).
    """
    return _stack(x, (_cdf_band(q, block, x, confidence, axis) for block in blocks), confidence)


def share_bounds(q: Quadrature, block: int, x: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Return the total band of the share of the eigenvalues <= x of one block, (n_points,) each: see cdf_band."""
    return _cdf_band(q, block, x, confidence, LINEAR)[3:]


def _cdf_band(
    q: Quadrature, block: int, y: Tensor, confidence: float, axis: Axis
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    normalized = BlockOnAxis(q, block, axis)
    recurrence, x = normalized.recurrence, normalized.axis.invert(y)
    count = len(recurrence.steps)
    if count == 0:
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        return torch.full_like(x, math.nan), zero, one, zero, one
    values = recurrence.cdf(x)
    value = values.mean(0)
    scaled_axes = normalized.divisor_range(confidence)
    changes = [recurrence.cdf(scaled.invert(y)).mean(0) - value for scaled in scaled_axes]
    lower, upper = _add_divisor_error(value, _share_interval(q, block, values, confidence), changes)
    step = recurrence.polynomials(x.expand(count, -1))[0].masked_fill(recurrence.exact[:, None], 0.0).mean(0)
    unobserved = step * (1 - ((1 - confidence) / 2) ** (1 / count))
    weights = torch.minimum(
        variance_of_probes(q, block, values, value, confidence), 2 / (q.dims[block] + 2) * value * (1 - value) / count
    )
    half = torch.hypot(unobserved, normal_quantile(confidence) * weights.clamp(min=0.0).sqrt())
    half = torch.where(_may_cross(recurrence.nodes, x, confidence), half, 0.0)
    lower, upper = torch.minimum(lower, value - half).clamp(min=0.0), torch.maximum(upper, value + half).clamp(max=1.0)

    below, above = recurrence.cdf_bounds(x)
    low, high = (
        _add_divisor_error(part.mean(0), _share_interval(q, block, part, confidence), changes)[side]
        for side, part in enumerate((below, above))
    )
    total_lower, total_upper = torch.minimum(low, lower).clamp(min=0.0), torch.maximum(high, upper).clamp(max=1.0)
    return value, lower, upper, total_lower, total_upper


def _add_divisor_error(value: Tensor, band: tuple[Tensor, Tensor], changes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Widen a band for a fixed divisor, in quadrature, by the changes of the value over the interval of the divisor."""
    if not changes:
        return band
    low, high = torch.stack(list(changes)).aminmax(dim=0)
    lower = value - torch.hypot(value - band[0], low.clamp(max=0.0))
    return lower, value + torch.hypot(band[1] - value, high.clamp(min=0.0))


def _may_cross(nodes: Tensor, x: Tensor, confidence: float) -> Tensor:
    """Return whether x is in Student's prediction interval of a node nearest to it, (n_points,) bool.

    Args:
        nodes: (n_probes, m) float64, ascending.
        x: (n_points,) float64.
    """
    count = len(nodes)
    if count == 1:
        return torch.ones_like(x, dtype=torch.bool)
    reach = student_quantile(confidence, count - 1) * math.sqrt(1 + 1 / count)
    ends = torch.full((count, 1), math.inf, dtype=torch.float64, device="cpu")
    padded = torch.cat([-ends, nodes, ends], 1)
    upto = torch.searchsorted(nodes, x.expand(count, -1).contiguous(), right=True)
    left, right = x - padded.gather(1, upto), padded.gather(1, upto + 1) - x
    return (left.mean(0) <= reach * left.std(0)) | (right.mean(0) <= reach * right.std(0))


def _share_interval(q: Quadrature, block: int, shares: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Return the interval of the mean of shares (n_known, n_points), the Gamma interval of min(mean, 1 - mean)."""
    mean = shares.mean(0)
    variance = variance_of_probes(q, block, shares, mean, confidence)
    lower, upper = gamma_interval(mean, variance, confidence)
    rest_lower, rest_upper = gamma_interval((1 - mean).clamp(min=0.0), variance, confidence)
    small = mean < 0.5
    return (
        torch.where(small, lower, 1 - rest_upper).clamp(min=0.0),
        torch.where(small, upper, 1 - rest_lower).clamp(max=1.0),
    )


def wasserstein_error(q: Quadrature, blocks: Sequence[int], axis: Axis = LINEAR) -> tuple[Tensor, Tensor]:
    """Return the Wasserstein-1 errors of the spectra of the blocks with these indices, due to probes and to steps.

    Returns:
        probes, steps: (len(blocks),) each, in units of the axis: int stderr(cdf(y)) dy, an estimate (infinite with one
        probe), and the mean over probes of steps.wasserstein_bound.
    """
    normalized = [BlockOnAxis(q, block, axis) for block in blocks]
    from_probes = [_cdf_stderr_area(block_axis, q.is_exact(block)) for block_axis, block in zip(normalized, blocks)]
    from_steps = [float(steps.wasserstein_bound(block.recurrence, block.axis).mean()) for block in normalized]
    return torch.tensor(from_probes, dtype=torch.float64, device="cpu"), torch.tensor(
        from_steps, dtype=torch.float64, device="cpu"
    )


def _cdf_stderr_area(block: BlockOnAxis, exact: bool) -> float:
    nodes, weights = block.recurrence.nodes, block.recurrence.weights
    count = len(nodes)
    if count == 0:
        return math.nan
    if exact or count == 1:
        return 0.0 if exact else math.inf
    scaled = block.divisor_range(_ONE_SIGMA)
    y = torch.unique(torch.cat([axis.place(nodes).flatten() for axis in (block.axis, *scaled)]))
    _, variance, _ = mean_and_variance(distribution.cdf(block.axis.place(nodes), weights, y))
    stderr = (variance / count).sqrt()
    if scaled:
        low, high = (distribution.cdf(axis.place(nodes), weights, y).mean(0) for axis in (scaled[0], scaled[-1]))
        stderr = torch.hypot(stderr, (high - low) / 2)
    return float((stderr[:-1] * y.diff()).sum())
