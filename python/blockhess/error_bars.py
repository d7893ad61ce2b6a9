"""Error bars of densities, distribution functions and traces: the random probes' part, and what the steps leave open.

    statistical band    where the expectation over probes lies, at the same number of steps
    total band          where the truth lies: the statistical band widened by the bounds of truncation.py

For Gaussian probes theory knows the variance that a spectrum causes (intervals.py); what a sample shows beyond it, and
for other probes all of it, is taken from the sample. Bands hold pointwise, each with the stated probability.
With a single probe nothing is known of its error, and bands are as wide as can be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess import truncation
from blockhess.density import smooth
from blockhess.intervals import gamma_interval, mean_and_variance, normal_quantile, student_quantile, variance_of_mean
from blockhess_ext import Quadrature


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


def _probes_of(q: Quadrature, block: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n_known, m) of the probes of a block that made a step, padded with the last node and 0."""
    recurrence = truncation.Recurrence(q, block)
    return recurrence.nodes, recurrence.weights


def _variance(q: Quadrature, block: int, values: Tensor, mean_square: Tensor, confidence: float) -> Tensor:
    """Variance of the mean of v^T f(H) v over probes, to be used with a normal factor: see intervals.

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


def density_band(q: Quadrature, blocks: Sequence[int], grid: Tensor, sigma: float, confidence: float) -> Band:
    """Return the smoothed densities of some blocks with their bands.

    Args:
        q: of all blocks.
        blocks: indices.
        grid: (n_points,) float64, ascending.
        sigma: width of the Gaussian, one for all.
        confidence: probability in (0, 1).
    """
    return _stack(grid, [_density_band(q, block, grid, sigma, confidence) for block in blocks], confidence)


def _density_band(q: Quadrature, block: int, grid: Tensor, sigma: float, confidence: float) -> tuple[Tensor, ...]:
    nodes, weights = _probes_of(q, block)
    peak = 1 / (sigma * math.sqrt(2 * math.pi))
    if not len(nodes):
        return (torch.zeros_like(grid),) * 2 + (torch.full_like(grid, peak),) + _nothing(grid, peak)
    values = smooth(nodes, weights, grid, sigma)
    value = values.mean(0)
    # g^2 is a Gaussian of width sigma / sqrt(2), times peak / sqrt(2).
    squares = smooth(nodes, weights, grid, sigma / math.sqrt(2)).mean(0) * (peak / math.sqrt(2))
    lower, upper = gamma_interval(value, _variance(q, block, values, squares, confidence), confidence)
    # Rounding moves eigenvalues by some eps |H|; g' is at most exp(-1/2) peak / sigma.
    rounding = torch.finfo(getattr(torch, q.dtype)).eps * float(nodes.abs().max()) / sigma * math.exp(-0.5) * peak
    lower, upper = (lower - rounding).clamp(min=0.0), (upper + rounding).clamp(max=peak)
    bound = truncation.density_bound(q, block, grid, sigma)
    return value, lower, upper, (lower - bound).clamp(min=0.0), (upper + bound).clamp(max=peak)


def _nothing(x: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    return torch.zeros_like(x), torch.full_like(x, largest)


def cdf_band(q: Quadrature, blocks: Sequence[int], x: Tensor, confidence: float) -> Band:
    """Return the shares of eigenvalues <= x of some blocks with their bands.

    Quadratures are steps, and where x lies so near a node that the next probe's may be on its other side, few probes
    may all be on one side: the sample then shows no spread though the step is the larger part of it. There the band is
    at least as wide as theory's variance of the weights and a step that n_probes probes in a row did not show.

    Args:
        q: of all blocks.
        blocks: indices.
        x: (n_points,) float64.
        confidence: probability in (0, 1).

    Source: Clopper and Pearson 1934 (an event not seen in n trials).
    """
    return _stack(x, [_cdf_band(q, block, x, confidence) for block in blocks], confidence)


def _cdf_band(q: Quadrature, block: int, x: Tensor, confidence: float) -> tuple[Tensor, ...]:
    recurrence = truncation.Recurrence(q, block)
    count = len(recurrence.steps)
    if count == 0:
        return (torch.full_like(x, math.nan), *_nothing(x, 1.0), *_nothing(x, 1.0))
    values = recurrence.cdf(x)
    value = values.mean(0)
    lower, upper = _share_interval(q, block, values, confidence)
    step = recurrence.polynomials(x.expand(count, -1))[0].masked_fill(recurrence.exact[:, None], 0.0).mean(0)
    unseen = step * (1 - ((1 - confidence) / 2) ** (1 / count))
    weights = torch.minimum(
        _variance(q, block, values, value, confidence), 2 / (q.dims[block] + 2) * value * (1 - value) / count
    )
    half = torch.hypot(unseen, normal_quantile(confidence) * weights.clamp(min=0.0).sqrt())
    half = torch.where(_may_step(recurrence.nodes, x, confidence), half, 0.0)
    lower, upper = torch.minimum(lower, value - half).clamp(min=0.0), torch.maximum(upper, value + half).clamp(max=1.0)

    below, above = recurrence.cdf_bounds(x)
    total_lower = torch.minimum(_share_interval(q, block, below, confidence)[0], lower)
    total_upper = torch.maximum(_share_interval(q, block, above, confidence)[1], upper)
    return value, lower, upper, total_lower, total_upper


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
    near_left, near_right = (gap.mean(0) <= reach * gap.std(0) for gap in (left, right))
    return near_left | near_right


def _share_interval(q: Quadrature, block: int, shares: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Interval of the expectation of shares in [0, 1], (n_known, n_points): Gamma on the side that is smaller."""
    mean = shares.mean(0)
    variance = _variance(q, block, shares, mean, confidence)
    lower, upper = gamma_interval(mean, variance, confidence)
    rest_lower, rest_upper = gamma_interval((1 - mean).clamp(min=0.0), variance, confidence)
    small = mean < 0.5
    return (
        torch.where(small, lower, 1 - rest_upper).clamp(min=0.0),
        torch.where(small, upper, 1 - rest_lower).clamp(max=1.0),
    )


def trace_interval(q: Quadrature, confidence: float) -> tuple[Tensor, Tensor]:
    """Return confidence intervals of the traces of all blocks, lower and upper (n_blocks,) each.

    The trace of a probe's quadrature is exact after one step, so this is the whole error. Positive and negative
    eigenvalues are taken as two Gamma variables that share the variance in proportion to their squares, and their
    intervals combined.

    Source: Zou and Donner 2008 (the interval of a difference from those of its parts).
    """
    intervals = []
    for block, dim in enumerate(q.dims):
        nodes, weights = _probes_of(q, block)
        if len(nodes) < (1 if q.is_exact(block) else 2):
            intervals.append((-math.inf, math.inf))
            continue
        values = (weights * nodes).sum(1)
        mean, square = values.mean(), (weights * nodes**2).sum(1).mean()
        variance = _variance(q, block, values, square, confidence)
        ends = []
        for sign in (1.0, -1.0):
            side = (sign * nodes).clamp(min=0.0)
            part = (weights * side).sum(1).mean()
            share = (weights * side**2).sum(1).mean() / square if square > 0 else torch.zeros_like(mean)
            lower, upper = gamma_interval(part[None], (variance * share)[None], confidence)
            ends.append((float(part - lower), float(upper - part)))
        (below, above), (other_below, other_above) = ends
        intervals.append(
            (
                dim * (float(mean) - math.hypot(below, other_above)),
                dim * (float(mean) + math.hypot(above, other_below)),
            )
        )
    lower, upper = torch.tensor(intervals, dtype=torch.float64).T
    return lower, upper


def wasserstein_error(q: Quadrature) -> tuple[Tensor, Tensor]:
    """Return how far, in Wasserstein-1 distance, probes and steps may have left the spectra from the truth.

    Returns:
        probes, steps: (n_blocks,) each, in units of the eigenvalues: int stderr(cdf(x)) dx, which estimates the part of
        the probes (infinite with one), and the bound of truncation.wasserstein_bound, mean over probes.
    """
    from_probes = [_cdf_stderr_area(*_probes_of(q, block), q.is_exact(block)) for block in range(len(q.dims))]
    bounds = truncation.wasserstein_bound(q)
    known = q.steps > 0
    steps = torch.where(known, bounds, 0.0).sum(0) / known.sum(0)
    return torch.tensor(from_probes, dtype=torch.float64), steps


def _cdf_stderr_area(nodes: Tensor, weights: Tensor, exact: bool) -> float:
    count, m = nodes.shape
    if count == 0:
        return math.nan
    if exact or count == 1:
        return 0.0 if exact else math.inf
    x, order = nodes.flatten().sort()
    jumps = torch.zeros(count, count * m, dtype=torch.float64)
    jumps[order // m, torch.arange(count * m)] = weights.flatten()[order]
    _, variance, _ = mean_and_variance(jumps.cumsum(1))
    return float(((variance[:-1] / count).sqrt() * x.diff()).sum())
