"""Statistics of the spectra of a result: densities, distribution functions, moments, eigenvalues.

All but block_spectrum are methods of Spectra.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess import _checks
from blockhess.analysis import axes, distribution
from blockhess.analysis import outliers as ritz_values
from blockhess.analysis.axes import Axis
from blockhess.analysis.density import (
    check_grid,
    check_sigma_in_range,
    default_sigma,
    node_grid,
    smallest_sigma,
    smooth,
)
from blockhess.analysis.errors.extremes import kth_interval
from blockhess.analysis.errors.intervals import check_confidence
from blockhess.analysis.outliers import Eigenvalue
from blockhess.analysis.selection import comparable_blocks, distributions, resolved_axis
from blockhess.problem.blocks import BlockInfo
from blockhess.results.data import NEGATIVE_TOLERANCE, SpectraData
from blockhess_ext.arguments import integer


@dataclass(frozen=True, eq=False)
class BlockSpectrum:
    """The spectrum of one block, the value of `spectra["name"]`.

    Attributes:
        block: name, shape, dim, parameters, note.
        nodes, weights: (n_probes, m) float64; the weights of a probe sum to 1.
        steps: (n_probes,) int64, the number of valid nodes.
        lambda_min, lambda_max: extreme nodes over all probes.
        trace, trace_stderr, frobenius_norm, frobenius_stderr: estimates and their standard errors.
        negative_mass: share of negative eigenvalues.
    """

    block: BlockInfo
    nodes: Tensor
    weights: Tensor
    steps: Tensor
    lambda_min: float
    lambda_max: float
    trace: float
    trace_stderr: float
    frobenius_norm: float
    frobenius_stderr: float
    negative_mass: float

    @property
    def name(self) -> str:
        """Canonical name of the block."""
        return self.block.name

    @property
    def dim(self) -> int:
        """Number of parameters in the block."""
        return self.block.dim


def block_spectrum(spectra: SpectraData, name: str) -> BlockSpectrum:
    """Return the spectrum of one block, or raise KeyError."""
    if name not in spectra:
        raise KeyError(f"Spectra: {spectra.unknown_name(name)}")
    row, q = spectra.names.index(name), spectra.quadrature
    columns = (*eigenvalue_range(spectra), *trace(spectra), *frobenius_norm(spectra), negative_mass(spectra))
    values = (float(column[row]) for column in columns)
    return BlockSpectrum(spectra.blocks[row], q.nodes[:, row], q.weights[:, row], q.steps[:, row], *values)


def density(
    spectra: SpectraData,
    sigma: float | None = None,
    grid: Tensor | Sequence[float] | None = None,
    axis: str | Axis = "linear",
    blocks: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the densities of the blocks, smoothed with the same Gaussian, on the same grid.

    Args:
        sigma: standard deviation of the Gaussian on the axis, at most the range of all nodes; None means
            default_sigma(blocks, axis).
        grid: (n_points,) points on the axis, strictly ascending; None means density.node_grid, which covers every
            node of every block; all densities are 0 in its gaps.
        axis: see js_matrix.
        blocks: names, in order; None means all.

    Returns:
        grid (n_points,), densities (n_blocks, n_points). On the default grid, torch.trapezoid(densities, grid)
        is 1. A block without a single Lanczos step has density 0.

    Raises:
        ValueError: a block cannot be normalized.

    Source: Zhang et al. 2024, appendix B.2.

    Example:
        >>> grid, densities = spectra.density(sigma=0.01)
    """
    axis = resolved_axis("density", spectra, blocks, axis)
    nodes, weights = distributions(spectra, blocks, axis)
    if sigma is None:
        compared = spectra.rows(comparable_blocks(spectra, axis)) if blocks is None else []
        sigma = max(default_sigma(nodes[compared] if compared else nodes), smallest_sigma(nodes))
    sigma = check_sigma_in_range("density", sigma, nodes)
    points = node_grid(nodes, sigma) if grid is None else check_grid("density", grid)
    return points, smooth(nodes, weights, points, sigma)


def cdf(spectra: SpectraData, x: Tensor | Sequence[float] | float | None = None) -> tuple[Tensor, Tensor]:
    """Return the cumulative distribution functions: step functions of the nodes and weights, without smoothing.

    Args:
        x: (n_points,) eigenvalues in any order, or a number; None means all nodes of all blocks, ascending.

    Returns:
        x (n_points,), share of eigenvalues <= x (n_blocks, n_points).

    Example:
        >>> _, share = spectra.cdf(0.0)
    """
    nodes, weights = spectra.merged
    points = torch.unique(nodes[spectra.known]) if x is None else _checks.reals("cdf", "x", x)
    if points.ndim > 1 or bool(points.isnan().any()):
        raise ValueError(f"cdf: x must have shape (n_points,) and no NaN, got {points}")
    points = points.reshape(-1)
    return points, distribution.cdf(nodes, weights, points)


def quantiles(spectra: SpectraData, q: Tensor | Sequence[float] | float) -> Tensor:
    """Return the smallest node x of every block with cdf(x) >= q.

    Args:
        q: (n_quantiles,) shares in [0, 1], or a number.

    Returns:
        (n_blocks, n_quantiles).

    Example:
        >>> median = spectra.quantiles(0.5)
    """
    shares = _checks.reals("quantiles", "q", q).reshape(-1)
    if not bool(((shares >= 0) & (shares <= 1)).all()):
        raise ValueError(f"quantiles: q must be in [0, 1], got {shares.tolist()}")
    return distribution.quantiles(*spectra.merged, shares)


def trace(spectra: SpectraData) -> tuple[Tensor, Tensor]:
    """Estimate tr H_l of every block.

    Returns:
        values, stderr: (n_blocks,) each. With one probe the standard error is infinite, except for a block of one
        element, where it is 0.

    Source: Hutchinson 1989.
    """
    return spectra.quadrature.moment(1)


def frobenius_norm(spectra: SpectraData) -> tuple[Tensor, Tensor]:
    """Estimate |H_l|_F = sqrt(tr H_l^2) of every block.

    Returns:
        values, stderr: (n_blocks,) each, the error by the delta method, stderr(|H|_F^2) / (2 |H|_F).
    """
    square, stderr = spectra.quadrature.second_moment()
    norm = square.sqrt()
    # A zero block is zero for every probe: its error is 0 already.
    return norm, torch.where(norm > 0, stderr / (2 * norm), stderr)


def eigenvalue_range(spectra: SpectraData) -> tuple[Tensor, Tensor]:
    """Return lambda_min, lambda_max of every block, (n_blocks,) each: extreme nodes over all probes.

    They lie inside the true range, up to rounding; extreme eigenvalues converge first.
    """
    return spectra.quadrature.extremes()


def negative_mass(spectra: SpectraData) -> Tensor:
    """Return the share of the quadrature's mass at negative nodes of every block, (n_blocks,).

    Nodes within 64 eps(dtype of the vectors) of zero, relative to the block's largest |node|, count as zero. The share
    of negative eigenvalues is in negative_interval; few steps may leave it open.
    """
    nodes, weights = spectra.merged
    eps = torch.finfo(getattr(torch, spectra.quadrature.dtype)).eps
    tolerance = NEGATIVE_TOLERANCE * eps * nodes.abs().amax(1, keepdim=True)
    mass = (weights * (nodes < -tolerance)).sum(1)
    return mass.masked_fill(~spectra.known, torch.nan)


def zero_mass(spectra: SpectraData, tolerance: float | None = None) -> Tensor:
    """Return the share of the quadrature's mass at zero nodes of every block, (n_blocks,).

    The share of zero eigenvalues, the rank deficiency divided by dim, is in zero_interval. The mass at zero is too
    small unless the other eigenvalues are well separated from zero.

    Args:
        tolerance: largest |node| that counts as zero, not negative; None means the larger of the block's hvp_error and
            64 eps(dtype of the vectors) of its largest |node|.
    """
    nodes, weights = spectra.merged
    bound = zero_bound("zero_mass", spectra, tolerance)
    return (weights * (nodes.abs() <= bound[:, None])).sum(1).masked_fill(~spectra.known, torch.nan)


def zero_bound(op: str, spectra: SpectraData, tolerance: float | None) -> Tensor:
    """Return the largest |eigenvalue| that counts as zero, (n_blocks,): zero_tolerance, unless a tolerance is given."""
    if tolerance is None:
        return spectra.zero_tolerance
    if not _checks.real(op, "tolerance", tolerance) >= 0:
        raise ValueError(f"{op}: tolerance must not be negative, got {tolerance}")
    return torch.full((len(spectra),), float(tolerance), dtype=torch.float64, device="cpu")


def kth_eigenvalue(spectra: SpectraData, k: int, confidence: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the k-th largest eigenvalue of every block, where dim (1 - cdf) crosses k - 1/2.

    Args:
        k: at least 1.
        confidence: probability of the interval, in (0, 1).

    Returns:
        value, lower, upper: (n_blocks,) each; NaN for a block of fewer than k eigenvalues. The interval consists of the
        x at which the total band of the distribution function, see cdf_band, allows the k-th eigenvalue; it ends at
        nodes. It has width 0 for blocks computed exactly, and is infinite if nothing is known.

    Example:
        >>> tenth, lower, upper = spectra.kth_eigenvalue(10)
    """
    k, confidence = integer("k", k, 1, op="kth_eigenvalue"), check_confidence("kth_eigenvalue", confidence)
    missing = ~spectra.known | (torch.tensor(spectra.dims, device="cpu") < k)
    value = axes.kth_largest(*spectra.merged, spectra.dims, k).masked_fill(missing, torch.nan)
    lower, upper = value.clone(), value.clone()
    for row in (~missing).nonzero().flatten().tolist():
        if not spectra.quadrature.is_exact(row):
            lower[row], upper[row] = kth_interval(spectra.quadrature, row, k, confidence)
    return value, lower, upper


def histogram(spectra: SpectraData, bins: int | Tensor | Sequence[float] = 50) -> tuple[Tensor, Tensor]:
    """Count the eigenvalues of every block in bins, without smoothing: dim times the mass.

    Args:
        bins: number of equal bins over the range of all nodes, or (n_bins + 1,) ascending edges. A bin includes its
            left edge, the last bin both edges; nodes outside the bins are not counted.

    Returns:
        edges (n_bins + 1,), counts (n_blocks, n_bins); NaN for a block without a single Lanczos step.

    Raises:
        ValueError: bins is below 1 or not ascending, or a number although no block has a Lanczos step.

    Example:
        >>> edges, counts = spectra.histogram(100)
    """
    nodes, weights = spectra.merged
    if isinstance(bins, int):
        bins = integer("bins", bins, 1, op="histogram")
        if not bool(spectra.known.any()):
            raise ValueError(f"histogram: bins must be edges if no block has a Lanczos step, got {bins}")
        low, high = float(nodes[spectra.known].min()), float(nodes[spectra.known].max())
        half = 0.5 if low == high else 0.0
        edges = torch.linspace(low - half, high + half, bins + 1, dtype=torch.float64, device="cpu")
    else:
        edges = check_grid("histogram", bins, "bins")
        if len(edges) < 2:
            raise ValueError("histogram: bins must have at least two edges, got 1")
    inside = (nodes >= edges[0]) & (nodes <= edges[-1])
    bin_of = (torch.searchsorted(edges, nodes, right=True) - 1).clamp(0, len(edges) - 2)
    counts = torch.zeros(len(spectra), len(edges) - 1, dtype=torch.float64, device="cpu")
    counts.scatter_add_(1, bin_of, weights * inside * torch.tensor(spectra.dims, device="cpu")[:, None])
    return edges, counts.masked_fill(~spectra.known[:, None], torch.nan)


def outliers(spectra: SpectraData, name: str, tolerance: float = ritz_values.CONVERGED) -> list[Eigenvalue]:
    """Return the converged Ritz values of a block, isolated eigenvalues, with residual bounds.

    Args:
        name: name of the block.
        tolerance: largest residual, relative to the block's largest |node|.

    Returns:
        eigenvalues, largest |value| first: see outliers.eigenvalues. All of them for a block smaller than the number
        of steps.

    Source: Parlett 1998, section 13.2; Paige 1980.

    Example:
        >>> [(e.value, e.residual) for e in spectra.outliers("0.weight")]
    """
    tolerance = _checks.real("outliers", "tolerance", tolerance)
    return ritz_values.eigenvalues(spectra.quadrature, spectra.rows([name])[0], tolerance)
