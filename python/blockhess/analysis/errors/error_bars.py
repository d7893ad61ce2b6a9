"""Error bars of the values of a result, for the errors of random probes and of finite Lanczos steps.

Every function is a method of Spectra of the same name. Bands are pointwise: they hold with the stated probability at
every point, not at all points simultaneously.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from blockhess._text import format_table, number
from blockhess.analysis import density, distribution, selection
from blockhess.analysis.axes import Axis, as_axis
from blockhess.analysis.errors import bands, probes, steps
from blockhess.analysis.errors.bands import Band
from blockhess.analysis.errors.extremes import extreme_bounds
from blockhess.analysis.errors.intervals import check_confidence
from blockhess.analysis.errors.normalized_block import BlockOnAxis
from blockhess.analysis.selection import distributions, normalizable, resolved_axis
from blockhess.analysis.statistics import eigenvalue_range, zero_bound
from blockhess.results.data import SpectraData

# Default number of points of cdf_band over all blocks, and its lower bound per block.
_CDF_POINTS, _LEAST_QUANTILES = 128, 8


def resolved_sigma(spectra: SpectraData, blocks: Sequence[str] | None = None, axis: str | Axis = "linear") -> Tensor:
    """Return the sigma that the steps of each block resolve, range / steps, for plots.

    A smaller sigma shows the nodes rather than the density. Do not use it for comparisons, which need the same sigma
    for all blocks.

    Args:
        blocks: names, in order; None means all.
        axis: see js_matrix.

    Returns:
        (n_blocks,), between density.DEFAULT_RELATIVE_SIGMA and density.WIDEST_RELATIVE_SIGMA times the block's range;
        the former if the Krylov space is exhausted, as the nodes are then the eigenvalues.

    Source: Lin, Saad, Yang 2016, section 3.2 (resolution and number of steps).

    Example:
        >>> widths = spectra.resolved_sigma()
    """
    q, axis = spectra.quadrature, resolved_axis("resolved_sigma", spectra, blocks, axis)
    sigmas = [density.default_sigma(nodes) for nodes in distributions(spectra, blocks, axis)[0]]
    exhausted = (steps.exact(q) | (q.steps == 0)).all(0)
    shares = (1 / q.steps.amax(0).double()).clamp(density.DEFAULT_RELATIVE_SIGMA, density.WIDEST_RELATIVE_SIGMA)
    shares = shares.masked_fill(exhausted, density.DEFAULT_RELATIVE_SIGMA)[spectra.rows(blocks)]
    return torch.tensor(sigmas, dtype=torch.float64, device="cpu") * shares / density.DEFAULT_RELATIVE_SIGMA


def density_band(
    spectra: SpectraData,
    sigma: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    confidence: float = 0.95,
    blocks: Sequence[str] | None = None,
    axis: str | Axis = "linear",
) -> Band:
    """Return the densities, see `density`, with error bands.

    Args:
        sigma: standard deviation of the Gaussian on the axis; None means default_sigma(blocks, axis).
        grid: (n_points,) points on the axis, strictly ascending; None means density.node_grid of the blocks.
        confidence: probability of the bands, in (0, 1).
        blocks: names, in order; None means all.
        axis: see js_matrix. The statistical band includes the error of the divisor of a normalized axis, but the total
            band does not include the error of the divisor due to finite steps. The scale is taken as exact.

    Returns:
        Band with values and bands (n_blocks, n_points). The statistical band contains the limit of many probes at the
        same number of steps, the total band the density of the exact spectrum. With one probe they are trivial.

    Example:
        >>> band = spectra.density_band(sigma=0.01)
        >>> (band.total_lower <= band.lower).all()
        tensor(True)
    """
    axis = resolved_axis("density_band", spectra, blocks, axis)
    nodes = distributions(spectra, blocks, axis)[0]
    if sigma is None:
        sigma = selection.default_sigma(spectra, blocks, axis)
    sigma = density.check_sigma_in_range("density_band", sigma, nodes)
    points = density.node_grid(nodes, sigma) if grid is None else density.check_grid("density_band", grid)
    confidence = check_confidence("density_band", confidence)
    return bands.density_band(
        selection.quadrature_for(spectra, axis), spectra.rows(blocks), points, sigma, confidence, axis
    )


def cdf_band(
    spectra: SpectraData,
    x: Tensor | Sequence[float] | None = None,
    confidence: float = 0.95,
    blocks: Sequence[str] | None = None,
    axis: str | Axis = "linear",
) -> Band:
    """Return the distribution functions, see `cdf`, with error bands.

    The cost is one tridiagonal eigenvalue problem per point, block and probe.

    Args:
        x: (n_points,) points on the axis, strictly ascending; None means some quantiles of every block.
        confidence, blocks, axis: see density_band.

    Returns:
        Band with shares and bands (n_blocks, n_points), all in [0, 1], the bands as in density_band.

    Example:
        >>> band = spectra.cdf_band([0.0])
        >>> print(f"{band.total_lower[0, 0]:.3f} ... {band.total_upper[0, 0]:.3f}")
    """
    rows, axis = spectra.rows(blocks), resolved_axis("cdf_band", spectra, blocks, axis)
    confidence = check_confidence("cdf_band", confidence)
    if x is None:
        shares = torch.linspace(
            0, 1, max(_LEAST_QUANTILES, _CDF_POINTS // len(rows)), dtype=torch.float64, device="cpu"
        )
        points = distribution.quantiles(*distributions(spectra, blocks, axis), shares)
        points = torch.unique(points[points.isfinite()])
    else:
        points = density.check_grid("cdf_band", x, "x")
    return bands.cdf_band(selection.quadrature_for(spectra, axis), rows, points, confidence, axis)


def trace_interval(spectra: SpectraData, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return confidence intervals of the traces of all blocks: see probes.trace_interval.

    Args:
        confidence: probability of the intervals, in (0, 1).

    Returns:
        lower, upper: (n_blocks,) each, infinite with one probe. The steps add no error.

    Example:
        >>> lower, upper = spectra.trace_interval()
    """
    confidence = check_confidence("trace_interval", confidence)
    return _of_blocks(spectra, lambda row: probes.trace_interval(spectra.quadrature, row, confidence))


def frobenius_interval(spectra: SpectraData, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return confidence intervals of the Frobenius norms of all blocks: see probes.frobenius_interval.

    Args, Returns: see trace_interval.

    Example:
        >>> lower, upper = spectra.frobenius_interval()
    """
    confidence = check_confidence("frobenius_interval", confidence)
    return _of_blocks(spectra, lambda row: probes.frobenius_interval(spectra.quadrature, row, confidence))


def eigenvalue_bounds(spectra: SpectraData, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return a lower bound of lambda_min and an upper bound of lambda_max of every block: see extremes.py.

    The extreme nodes of eigenvalue_range are bounds from inside: lambda_max is between the largest node and the upper
    bound, up to zero_tolerance, which the bounds include.

    Args:
        confidence: probability of each bound, in (0, 1).

    Returns:
        lower, upper: (n_blocks,) each; infinite for probes that are not Gaussian, NaN for a block without a Lanczos
        step.

    Example:
        >>> lower, upper = spectra.eigenvalue_bounds()
    """
    confidence = check_confidence("eigenvalue_bounds", confidence)
    lower, upper = _of_blocks(spectra, lambda row: extreme_bounds(spectra.quadrature, row, confidence))
    unknown, error = ~spectra.known, spectra.zero_tolerance
    return (lower - error).masked_fill(unknown, torch.nan), (upper + error).masked_fill(unknown, torch.nan)


def negative_interval(spectra: SpectraData, confidence: float = 0.95) -> tuple[Tensor, Tensor]:
    """Return confidence intervals of the share of negative eigenvalues, those below -zero_tolerance, of every block.

    They include the errors of probes and of steps: the total band of the distribution function, see cdf_band.

    Args:
        confidence: probability of the intervals, in (0, 1).

    Returns:
        lower, upper: (n_blocks,) each, in [0, 1]; NaN for a block without a Lanczos step.

    Example:
        >>> lower, upper = spectra.negative_interval()
    """
    confidence = check_confidence("negative_interval", confidence)
    return negative_and_zero_intervals(spectra, confidence)[0]


def zero_interval(
    spectra: SpectraData, tolerance: float | None = None, confidence: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Return confidence intervals of the share of zero eigenvalues of every block.

    Args:
        tolerance: largest |eigenvalue| that counts as zero, not negative; None means zero_tolerance, see zero_mass.
        confidence: probability of the intervals, in (0, 1).

    Returns:
        lower, upper: as in negative_interval.

    Example:
        >>> lower, upper = spectra.zero_interval()
    """
    confidence = check_confidence("zero_interval", confidence)
    return negative_and_zero_intervals(spectra, confidence, zero_bound("zero_interval", spectra, tolerance))[1]


def negative_and_zero_intervals(
    spectra: SpectraData, confidence: float, tolerance: Tensor | None = None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return negative_interval and zero_interval at the cost of one of them; tolerance (n_blocks,)."""
    bound = spectra.zero_tolerance if tolerance is None else tolerance
    below = torch.nextafter(-bound, torch.full_like(bound, -torch.inf))
    points = torch.stack([below, bound], 1)

    def shares(row: int) -> tuple[Tensor, Tensor]:
        return bands.share_bounds(spectra.quadrature, row, points[row], confidence)

    bounds = torch.stack([torch.stack(shares(row)) for row in range(len(spectra))])
    bounds[~spectra.known] = torch.nan
    (below_low, upto_low), (below_high, upto_high) = bounds[:, 0].T, bounds[:, 1].T
    return (below_low, below_high), ((upto_low - below_high).clamp(min=0.0), upto_high - below_low)


def _of_blocks(spectra: SpectraData, interval: Callable[[int], tuple[float, float]]) -> tuple[Tensor, Tensor]:
    """Return the ends of the intervals of all rows, (n_blocks,) each."""
    lower, upper = (
        torch.tensor([interval(row) for row in range(len(spectra))], dtype=torch.float64, device="cpu").reshape(-1, 2).T
    )
    return lower, upper


def wasserstein_error(
    spectra: SpectraData, blocks: Sequence[str] | None = None, axis: str | Axis = "linear"
) -> tuple[Tensor, Tensor]:
    """Return the Wasserstein-1 errors of the spectra due to random probes and to finite steps.

    Args:
        blocks, axis: see density_band.

    Returns:
        probes, steps: (n_blocks,) each, in units of the axis: an estimate, the integral of the standard error of the
        cdf (infinite with one probe), and an a posteriori bound, mean over probes.

    Source: Chen, Trogdon, Ubaru 2021; see steps.wasserstein_bound.

    Example:
        >>> probes, steps = spectra.wasserstein_error()
    """
    axis = resolved_axis("wasserstein_error", spectra, blocks, axis)
    return bands.wasserstein_error(selection.quadrature_for(spectra, axis), spectra.rows(blocks), axis)


def error_table(
    spectra: SpectraData,
    blocks: Sequence[str] | None = None,
    confidence: float = 0.95,
    axis: str | Axis = "linear",
) -> str:
    """Return a plain-text table of the errors of every block, one block per line.

    Columns: intervals of the extreme eigenvalues (eigenvalue_range, eigenvalue_bounds), of the trace, and of the
    divisor of the axis; wasserstein_error on the axis, an estimate (probes) and a bound (steps).

    Args:
        blocks: names, in order; None means all that can be normalized.
        confidence, axis: see density_band.
    """
    title = f"trace, {100 * check_confidence('error_table', confidence):g} %"
    header = ["block", "lambda_min", "lambda_max", title, "divisor", "from ... to", "W1 probes", "W1 steps <="]
    axis = as_axis("error_table", axis)
    blocks = normalizable(spectra, axis) if blocks is None else blocks
    axis = resolved_axis("error_table", spectra, blocks, axis)
    least, largest = eigenvalue_bounds(spectra, confidence)
    ends = torch.stack([least, *eigenvalue_range(spectra), largest, *trace_interval(spectra, confidence)], 1)
    from_probes, from_steps = wasserstein_error(spectra, blocks, axis)
    lines = []
    for i, row in enumerate(spectra.rows(blocks)):
        shown = [number(end) for end in ends[row].tolist()]
        normalized = BlockOnAxis(spectra.quadrature, row, axis)
        low_divisor, high_divisor = normalized.divisor_interval(confidence)
        divisor = number(normalized.axis.divisor), f"{number(low_divisor)} ... {number(high_divisor)}"
        lines.append(
            [
                spectra.names[row],
                *(f"{shown[i]} ... {shown[i + 1]}" for i in (0, 2, 4)),
                *(divisor if axis.normalize != "none" else ("", "")),
                number(float(from_probes[i]), 2),
                number(float(from_steps[i]), 2),
            ]
        )
    table = format_table(header, lines)
    return table if axis == Axis() else f"W1 on the {axis}\n\n{table}"
