"""Error bars of a result: what random probes and finite steps leave uncertain in each of its values.

Every function is a method of Spectra of the same name. Bands hold pointwise: at every point of x with the stated
probability, not at all of them at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess import _checks
from blockhess._text import format_table, number
from blockhess.analysis import distribution, outliers, selection
from blockhess.analysis.axes import Axis, as_axis
from blockhess.analysis.density import (
    DEFAULT_RELATIVE_SIGMA,
    WIDEST_RELATIVE_SIGMA,
    check_grid,
    check_sigma_in_range,
    default_sigma,
    node_grid,
)
from blockhess.analysis.errors import bands, probes, steps
from blockhess.analysis.errors.bands import Band
from blockhess.analysis.errors.intervals import check_confidence, jackknife, leave_one_out
from blockhess.analysis.errors.normalized_block import BlockOnAxis
from blockhess.analysis.selection import distributions, normalizable, resolved_axis
from blockhess.results.data import SpectraData
from blockhess_ext import Quadrature

# Points of a cdf_band for which none are given, at most, or a few a block.
_CDF_POINTS, _LEAST_QUANTILES = 128, 8


def resolved_sigma(
    spectra: SpectraData,
    blocks: Sequence[str] | None = None,
    axis: str | Axis = "linear",
) -> Tensor:
    """Return the width of the Gaussian that the steps of each block resolve, range / steps: for pictures.

    Less would draw the nodes, not the density. Never for comparisons: two equal spectra blurred differently differ.

    Args:
        blocks: names, in order; None means all.
        axis: see js_matrix.

    Returns:
        (n_blocks,), each between DEFAULT_RELATIVE_SIGMA and WIDEST_RELATIVE_SIGMA of the block's range; the former
        where the Krylov space was exhausted, so that the nodes are the eigenvalues.

    Source: Lin, Saad, Yang 2016, section 3.2 (resolution and number of steps).

    Example:
        >>> widths = spectra.resolved_sigma()
    """
    rows, q = spectra.rows(blocks), spectra.quadrature
    names = spectra.names if blocks is None else _checks.names(blocks)
    nodes = distributions(spectra, names, resolved_axis("resolved_sigma", spectra, names, axis))[0]
    exhausted = (steps.exact(q) | (q.steps == 0)).all(0)
    widths = []
    for i, row in enumerate(rows):
        share = DEFAULT_RELATIVE_SIGMA
        if not exhausted[row]:
            share = min(max(1 / int(q.steps[:, row].max()), share), WIDEST_RELATIVE_SIGMA)
        widths.append(default_sigma(nodes[i]) * share / DEFAULT_RELATIVE_SIGMA)
    return torch.tensor(widths, dtype=torch.float64)


def density_band(
    spectra: SpectraData,
    sigma: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    confidence: float = 0.95,
    blocks: Sequence[str] | None = None,
    axis: str | Axis = "linear",
) -> Band:
    """Smooth the spectra as `density` does, with error bars.

    Args:
        sigma: width of the Gaussian on the axis; None means default_sigma().
        grid: (n_points,) points of the axis, strictly ascending; None means density.node_grid of the blocks.
        confidence: of the bands, in (0, 1).
        blocks: names, in order; None means all.
        axis: see js_matrix. On a normalized axis the divisor of a block is random as well: its interval is in the
            statistical band. The total band adds the error of finite steps in the spectrum, not in the divisor. The
            scale is taken as given.

    Returns:
        Band with values and bands (n_blocks, n_points). The statistical band holds what many probes would give at
        the same number of steps, the total band the density of the exact spectrum. With one probe they hold
        everything.

    Raises:
        ValueError: an argument breaks its rule.

    Source: see bands and steps.

    Example:
        >>> band = spectra.density_band(sigma=0.01)
        >>> (band.total_lower <= band.lower).all()
        tensor(True)
    """
    rows, names = spectra.rows(blocks), spectra.names if blocks is None else _checks.names(blocks)
    where = resolved_axis("density_band", spectra, names, axis)
    nodes = distributions(spectra, names, where)[0]
    if sigma is None:
        sigma = selection.default_sigma(spectra, blocks, where)
    sigma = check_sigma_in_range("density_band", sigma, nodes)
    points = node_grid(nodes, sigma) if grid is None else check_grid("density_band", grid)
    confidence = check_confidence("density_band", confidence)
    return bands.density_band(spectra.quadrature, rows, points, sigma, confidence, where)


def cdf_band(
    spectra: SpectraData,
    x: Tensor | Sequence[float] | None = None,
    confidence: float = 0.95,
    blocks: Sequence[str] | None = None,
    axis: str | Axis = "linear",
) -> Band:
    """Count eigenvalues as `cdf` does, with error bars.

    Args:
        x: (n_points,) points of the axis, strictly ascending; None means some quantiles of every block.
        confidence: of the bands, in (0, 1).
        blocks: names, in order; None means all.
        axis: as of density_band.

    Returns:
        Band with shares and bands (n_blocks, n_points), all in [0, 1]. The statistical band holds what many probes
        would give at the same number of steps, the total band the share of the exact spectrum. Cost: one
        tridiagonal problem a point, block and probe.

    Raises:
        ValueError: an argument breaks its rule.

    Source: see bands and steps.

    Example:
        >>> band = spectra.cdf_band([0.0])
        >>> print(f"{band.total_lower[0, 0]:.3f} ... {band.total_upper[0, 0]:.3f}")
    """
    rows, names = spectra.rows(blocks), spectra.names if blocks is None else _checks.names(blocks)
    where = resolved_axis("cdf_band", spectra, names, axis)
    confidence = check_confidence("cdf_band", confidence)
    if x is None:
        nodes, weights = distributions(spectra, names, where)
        count = max(_LEAST_QUANTILES, _CDF_POINTS // len(rows))
        shares = torch.linspace(0, 1, count, dtype=torch.float64)
        points = distribution.quantiles(nodes, weights, shares)
        points = torch.unique(points[points.isfinite()])
    else:
        points = check_grid("cdf_band", x, "x")
    return bands.cdf_band(spectra.quadrature, rows, points, confidence, where)


def trace_interval(spectra: SpectraData, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return confidence intervals of the traces of all blocks.

    Args:
        confidence: in (0, 1).

    Returns:
        lower, upper: (n_blocks,) each. The steps add no error. Infinite with one probe.

    Raises:
        ValueError: confidence is not between 0 and 1.

    Source: see probes.trace_interval.

    Example:
        >>> lower, upper = spectra.trace_interval()
    """
    confidence = check_confidence("trace_interval", confidence)
    intervals = [probes.trace_interval(spectra.quadrature, block, confidence) for block in range(len(spectra.names))]
    lower, upper = torch.tensor(intervals, dtype=torch.float64).T
    return lower, upper


def range_error(spectra: SpectraData) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Estimate by the jackknife how far eigenvalue_range still is from what many probes would give.

    Extremes over probes lie inside the true range: the bias of lambda_min is positive, that of lambda_max negative.
    What too few steps leave is not in it; the residuals of `outliers` bound that.

    Returns:
        (bias, stderr) of lambda_min and of lambda_max, (n_blocks,) each, from a block's own probes; NaN where it
        has only one.

    Source: Quenouille 1956; Miller 1974.

    Example:
        >>> (_, _), (bias, stderr) = spectra.range_error()
    """
    errors = []
    for row in range(len(spectra.names)):
        block = spectra.quadrature.select_blocks([row])
        known = (block.steps[:, 0] > 0).nonzero().flatten().tolist() or [0]

        def extremes(chosen: list[int], block: Quadrature = block, known: list[int] = known) -> Tensor:
            return torch.cat(block.of_probes([known[i] for i in chosen]).extremes())

        errors.append(torch.stack(jackknife(*leave_one_out(extremes, len(known)))))
    bias, stderr = torch.stack(errors, -1)
    return (bias[0], stderr[0]), (bias[1], stderr[1])


def wasserstein_error(
    spectra: SpectraData,
    blocks: Sequence[str] | None = None,
    axis: str | Axis = "linear",
) -> tuple[Tensor, Tensor]:
    """Return how far, in Wasserstein-1 distance, probes and steps may have left the spectra from the truth.

    Args:
        blocks: names, in order; None means all.
        axis: as of density_band.

    Returns:
        probes, steps: (n_blocks,) each, in units of the axis: the area under the standard error of the cdf
        (infinite with one probe), and an a-posteriori bound of what the steps leave open, mean over probes.

    Raises:
        ValueError: an argument breaks its rule, or a block cannot be normalized.

    Source: Chen, Trogdon, Ubaru 2021; see steps.wasserstein_bound.

    Example:
        >>> probes, steps = spectra.wasserstein_error()
    """
    names = spectra.names if blocks is None else _checks.names(blocks)
    where = resolved_axis("wasserstein_error", spectra, names, axis)
    return bands.wasserstein_error(spectra.quadrature, spectra.rows(blocks), where)


def error_table(
    spectra: SpectraData,
    blocks: Sequence[str] | None = None,
    confidence: float = 0.95,
    axis: str | Axis = "linear",
) -> str:
    """Return a plain-text table of the errors of every block, one a line.

    Columns: bias of the extreme eigenvalues and its standard error, by the jackknife (range_error); the residual of
    the largest node in size (outliers); the interval of the trace; what the block is divided by and the
    interval of that; wasserstein_error on the axis.

    Args:
        blocks: names, in the order wanted; None means all that can be normalized.
        confidence: of the intervals.
        axis: as of density_band.

    Raises:
        ValueError: a name is unknown, a block cannot be normalized, or confidence is not between 0 and 1.
    """
    title = f"trace, {100 * check_confidence('error_table', confidence):g} %"
    header = ["block", "lambda_min bias", "+-", "lambda_max bias", "+-", "residual", title, "divided by", "from ... to"]
    names = normalizable(spectra, as_axis("error_table", axis)) if blocks is None else _checks.names(blocks)
    where = resolved_axis("error_table", spectra, names, axis)
    (low, low_error), (high, high_error) = range_error(spectra)
    lower, upper = trace_interval(spectra, confidence)
    from_probes, from_steps = wasserstein_error(spectra, names, where)
    lines = []
    for i, row in enumerate(spectra.rows(names)):
        bounds, nodes = outliers.residuals(spectra.quadrature, row), spectra.quadrature.nodes[:, row]
        largest = torch.where(bounds.isnan(), -1.0, nodes.abs()).argmax()
        values = (low, low_error, high, high_error)
        seen = BlockOnAxis(spectra.quadrature, row, where)
        low_divisor, high_divisor = seen.divisor_interval(confidence)
        divided = number(seen.axis.divisor), f"{number(low_divisor)} ... {number(high_divisor)}"
        lines.append(
            [
                spectra.names[row],
                *(number(float(value[row]), 2) for value in values),
                number(float(bounds.flatten()[largest]), 2),
                f"{number(float(lower[row]))} ... {number(float(upper[row]))}",
                *(divided if where.normalize != "none" else ("", "")),
                number(float(from_probes[i]), 2),
                number(float(from_steps[i]), 2),
            ]
        )
    table = format_table([*header, "W1 probes", "W1 steps"], lines)
    return table if where == Axis() else f"W1 on the {where}\n\n{table}"
