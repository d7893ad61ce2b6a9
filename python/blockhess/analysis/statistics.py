"""Statistics of the spectrum of every block of a result: densities, distribution functions, moments, eigenvalues.

Every function is a method of Spectra of the same name.
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
from blockhess.analysis.errors.intervals import check_confidence, normal_quantile
from blockhess.analysis.outliers import Eigenvalue
from blockhess.analysis.selection import distributions, resolved_axis
from blockhess.problem.blocks import BlockInfo
from blockhess.results.data import NEGATIVE_TOLERANCE, SpectraData
from blockhess_ext.arguments import integer


@dataclass(frozen=True, eq=False)
class BlockSpectrum:
    """The spectrum of one block, as `spectra["name"]` returns it.

    Attributes:
        block: name, shape, dim, parameters, note.
        nodes, weights: (n_probes, m) float64; the weights of a probe sum to 1.
        steps: (n_probes,) int64, how many of the m nodes are valid.
        lambda_min, lambda_max: extreme nodes over all probes.
        trace, trace_stderr, frobenius_norm, frobenius_stderr: estimates and their standard errors.
        negative_mass: share of eigenvalues below zero.
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
    """Return the spectrum of one block.

    Raises:
        KeyError: no block has this name.
    """
    row, q = spectra.row(name), spectra.quadrature
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
    """Smooth the spectra of all blocks with one Gaussian, on one grid.

    Args:
        sigma: width of the Gaussian on the axis, at most the range of all nodes; None means default_sigma().
        grid: (n_points,) points of the axis, strictly ascending; None means density.node_grid, which covers every
            node of every block; between its patches all densities are 0.
        axis: see js_matrix.
        blocks: names, in order; None means all.

    Returns:
        grid (n_points,), densities (n_blocks, n_points). On the default grid, torch.trapezoid(densities, grid)
        is 1. A block without a single Lanczos step has density 0.

    Raises:
        ValueError: an argument breaks its rule, or a block cannot be normalized.

    Source: Zhang et al. 2024, appendix B.2.

    Example:
        >>> grid, densities = spectra.density(sigma=0.01)
    """
    names = spectra.names if blocks is None else _checks.names(blocks)
    nodes, weights = distributions(spectra, names, resolved_axis("density", spectra, names, axis))
    if sigma is None:
        excluded = dict(spectra.excluded)
        chosen = [i for i, name in enumerate(names) if blocks is not None or name not in excluded]
        sigma = max(default_sigma(nodes[chosen] if chosen else nodes), smallest_sigma(nodes))
    sigma = check_sigma_in_range("density", sigma, nodes)
    points = node_grid(nodes, sigma) if grid is None else check_grid("density", grid)
    return points, smooth(nodes, weights, points, sigma)


def cdf(spectra: SpectraData, x: Tensor | Sequence[float] | float | None = None) -> tuple[Tensor, Tensor]:
    """Count eigenvalues: the exact step function of the nodes and weights, not smoothed.

    Args:
        x: (n_points,) eigenvalues, in any order, or one; None means every node of every block, ascending.

    Returns:
        x (n_points,), share of eigenvalues <= x (n_blocks, n_points).

    Raises:
        ValueError: x has more than one dimension or is NaN.

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
    """Invert the cdf: the smallest node x of every block with cdf(x) >= q.

    Args:
        q: (n_quantiles,) shares in [0, 1], or one.

    Returns:
        (n_blocks, n_quantiles).

    Raises:
        ValueError: a share is outside [0, 1].

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
        values, stderr: (n_blocks,) each. With one probe the standard error is infinite, except for blocks of one
        element, where it is always 0.

    Source: Hutchinson 1989.
    """
    return spectra.quadrature.moment(1)


def frobenius_norm(spectra: SpectraData) -> tuple[Tensor, Tensor]:
    """Estimate |H_l|_F = sqrt(tr H_l^2) of every block.

    Returns:
        values, stderr: (n_blocks,) each; the error by the delta method, stderr(|H|_F^2) / (2 |H|_F).
    """
    square, stderr = spectra.quadrature.second_moment()
    norm = square.sqrt()
    # All probes see a zero block as zero: no error to scale.
    return norm, torch.where(norm > 0, stderr / (2 * norm), stderr)


def eigenvalue_range(spectra: SpectraData) -> tuple[Tensor, Tensor]:
    """Return lambda_min, lambda_max of every block, (n_blocks,) each: extreme nodes over all probes.

    They lie inside the true range, within rounding, and reach its ends first.
    """
    return spectra.quadrature.extremes()


def negative_mass(spectra: SpectraData) -> Tensor:
    """Return the share of eigenvalues of every block (n_blocks,) that are negative.

    Nodes within 64 eps(dtype of the vectors) of zero, relative to the block's largest |node|, count as zero.
    """
    nodes, weights = spectra.merged
    eps = torch.finfo(getattr(torch, spectra.quadrature.dtype)).eps
    tolerance = NEGATIVE_TOLERANCE * eps * nodes.abs().amax(1, keepdim=True)
    mass = (weights * (nodes < -tolerance)).sum(1)
    return mass.masked_fill(~spectra.known, torch.nan)


def zero_mass(spectra: SpectraData, tolerance: float | None = None) -> Tensor:
    """Return the share of eigenvalues of every block (n_blocks,) at zero: its rank deficiency, as a share.

    Args:
        tolerance: nodes up to this size are zero; None means the block's hvp_error, or 64 eps(dtype of the vectors)
            of its largest |node| where that is more. Lanczos finds a mass at zero only where the other eigenvalues
            stay away from it: otherwise this is too small.

    Raises:
        ValueError: tolerance is negative.
    """
    if tolerance is not None and not _checks.real("zero_mass", "tolerance", tolerance) >= 0:
        raise ValueError(f"zero_mass: tolerance must not be negative, got {tolerance}")
    nodes, weights = spectra.merged
    bound = spectra.zero_tolerance if tolerance is None else torch.tensor([float(tolerance)], dtype=torch.float64)
    return (weights * (nodes.abs() <= bound[:, None])).sum(1).masked_fill(~spectra.known, torch.nan)


def kth_eigenvalue(spectra: SpectraData, k: int, confidence: float = 0.95) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the k-th largest eigenvalue of every block, where dim (1 - cdf) crosses k - 1/2.

    Args:
        k: counted from 1.
        confidence: of the interval.

    Returns:
        value, lower, upper: (n_blocks,) each; NaN where a block has fewer than k. The interval is between the
        crossings of k - 1/2 -+ z sqrt(2 k / n_probes): among the weights of a block's n_probes Gaussian vectors the
        count of the k largest has that standard error, none where the block was written out. It does not include the
        error of too few steps.

    Raises:
        ValueError: k is below 1, or confidence is not between 0 and 1.

    Example:
        >>> tenth, lower, upper = spectra.kth_eigenvalue(10)
    """
    k = integer("k", k, 1, op="kth_eigenvalue")
    z, q = normal_quantile(check_confidence("kth_eigenvalue", confidence)), spectra.quadrature
    exact = torch.tensor([q.is_exact(row) for row in range(len(spectra))])
    half = (z * (2 * k / (q.steps > 0).sum(0).double()).sqrt()).masked_fill(exact, 0.0)
    missing = ~spectra.known | (torch.tensor(spectra.dims) < k)
    value, lower, upper = (
        axes.kth_largest(*spectra.merged, spectra.dims, count).masked_fill(missing, torch.nan)
        for count in (k, k + half, k - half)
    )
    return value, lower, upper


def histogram(spectra: SpectraData, bins: int | Tensor | Sequence[float] = 50) -> tuple[Tensor, Tensor]:
    """Count the eigenvalues of every block in bins, not smoothed: dim times the mass.

    Args:
        bins: number of equal bins over the nodes of all blocks, or (n_bins + 1,) ascending edges. A bin includes its
            left edge, the last one both; nodes outside all bins are not counted.

    Returns:
        edges (n_bins + 1,), counts (n_blocks, n_bins); NaN for a block without a single Lanczos step.

    Raises:
        ValueError: bins is below 1 or not ascending, or a number where nothing is known of any block.

    Example:
        >>> edges, counts = spectra.histogram(100)
    """
    nodes, weights = spectra.merged
    if isinstance(bins, int):
        bins = integer("bins", bins, 1, op="histogram")
        if not bool(spectra.known.any()):
            raise ValueError(f"histogram: bins must be edges where nothing is known of any block, got {bins}")
        low, high = float(nodes[spectra.known].min()), float(nodes[spectra.known].max())
        half = 0.5 if low == high else 0.0
        edges = torch.linspace(low - half, high + half, bins + 1, dtype=torch.float64)
    else:
        edges = check_grid("histogram", bins, "bins")
        if len(edges) < 2:
            raise ValueError("histogram: bins must have at least two edges, got 1")
    inside = (nodes >= edges[0]) & (nodes <= edges[-1])
    bin_of = (torch.searchsorted(edges, nodes, right=True) - 1).clamp(0, len(edges) - 2)
    counts = torch.zeros(len(spectra), len(edges) - 1, dtype=torch.float64)
    counts.scatter_add_(1, bin_of, weights * inside * torch.tensor(spectra.dims)[:, None])
    return edges, counts.masked_fill(~spectra.known[:, None], torch.nan)


def outliers(spectra: SpectraData, name: str, tolerance: float = ritz_values.CONVERGED) -> list[Eigenvalue]:
    """Return the eigenvalues of a block that stand apart so far that Lanczos has found them, with residual bounds.

    Args:
        name: of the block.
        tolerance: largest residual, relative to the block's largest |node|.

    Returns:
        eigenvalues, largest |value| first: see outliers.eigenvalues. Of a block smaller than the number of steps, all.

    Raises:
        ValueError: no block has this name.

    Source: Parlett 1998, section 13.2; Paige 1980.

    Example:
        >>> [(e.value, e.residual) for e in spectra.outliers("0.weight")]
    """
    tolerance = _checks.real("outliers", "tolerance", tolerance)
    return ritz_values.eigenvalues(spectra.quadrature, spectra.rows([name])[0], tolerance)
