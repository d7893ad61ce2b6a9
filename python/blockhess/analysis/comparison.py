"""Blocks of a result compared pair by pair: Jensen-Shannon matrices and JS0 with its error, Wasserstein distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from blockhess import _checks
from blockhess.analysis import distances, jensen_shannon
from blockhess.analysis.axes import Axis, as_axis
from blockhess.analysis.density import check_sigma_in_range, default_sigma
from blockhess.analysis.errors.intervals import check_confidence
from blockhess.analysis.errors.jensen_shannon import JSError, js_error, mean_of_pairs, with_interval
from blockhess.analysis.jensen_shannon import JS0
from blockhess.analysis.selection import compared, distributions, excluded, resolved_axis
from blockhess.results.data import SpectraData


def js_matrix(
    spectra: SpectraData,
    kind: str = "distance",
    base: float = 2.0,
    sigma: float | None = None,
    axis: str | Axis = "linear",
    blocks: Sequence[str] | None = None,
) -> Tensor:
    """Compare the spectra pair by pair.

    Args:
        kind: "distance", or "divergence", its square: see jensen_shannon.js_matrix.
        base: of the logarithm; with base 2 both kinds are in [0, 1].
        sigma: width of the Gaussian on the axis, one for all blocks, at most the range of all nodes; None means
            default_sigma(blocks, axis).
        axis: "linear", "asinh", or an Axis, which can also normalize the eigenvalues of every block.
        blocks: names; None means comparable_blocks(axis).

    Returns:
        (n_compared, n_compared), rows in the order of the compared blocks.

    Raises:
        ValueError: an argument breaks its rule, a named block cannot be normalized, or fewer than two blocks are
            compared.

    Example:
        >>> spectra.js_matrix(axis=Axis("asinh", normalize="radius"), blocks=["0.weight", "2.weight"])
    """
    return compare(spectra, kind, base, sigma, axis, blocks)[0]


def js0(
    spectra: SpectraData,
    kind: str = "distance",
    base: float = 2.0,
    sigma: float | None = None,
    axis: str | Axis = "linear",
    blocks: Sequence[str] | None = None,
    confidence: float | None = None,
) -> JS0:
    """Average js_matrix over all pairs of different blocks: the paper's measure of heterogeneity.

    Random probes raise it. With `confidence` the jackknife estimates by how much, and an interval for what many
    probes would give at the same number of steps; that costs n_probes more matrices.

    Args, Raises: see js_matrix.
        confidence: probability of the interval, in (0, 1); None means no interval.

    Returns:
        JS0: float(js0) is the mean, str(js0) adds everything it depends on.

    Source: Zhang et al. 2024, section 2.5.

    Example:
        >>> print(spectra.js0(confidence=0.95))
    """
    mean = compare(spectra, kind, base, sigma, axis, blocks)[1]
    if confidence is None:
        return mean
    return with_interval(mean, _js_error(spectra, mean), check_confidence("js0", confidence))


def js_matrix_error(spectra: SpectraData, **comparison: Any) -> tuple[Tensor, Tensor]:
    """Estimate by the jackknife the bias and standard error that random probes cause in js_matrix.

    Args:
        comparison: arguments of js_matrix, by name.

    Returns:
        bias, stderr: (n_compared, n_compared) each; NaN with one probe. js_matrix - bias is the better estimate of
        what many probes would give at the same number of steps.

    Source: Quenouille 1956; Tukey 1958.

    Example:
        >>> bias, stderr = spectra.js_matrix_error(sigma=0.01)
    """
    error = _js_error(spectra, compare(spectra, **comparison)[1])
    return error.bias, error.stderr


def _js_error(spectra: SpectraData, mean: JS0) -> JSError:
    axis = Axis(mean.axis, mean.normalize, mean.scale)

    def matrix(probes: list[int], kind: str) -> Tensor:
        values = jensen_shannon.js_matrix(
            *distributions(spectra, mean.blocks, axis, probes), kind=kind, base=mean.base, sigma=mean.sigma
        )
        unknown = ~(spectra.quadrature.steps[probes] > 0).any(0)[spectra.rows(mean.blocks)]
        return values.masked_fill(unknown[:, None] | unknown, math.nan)

    return js_error(matrix, mean.kind, spectra.quadrature.num_probes)


def compare(
    spectra: SpectraData,
    kind: str = "distance",
    base: float = 2.0,
    sigma: float | None = None,
    axis: str | Axis = "linear",
    blocks: Sequence[str] | None = None,
) -> tuple[Tensor, JS0]:
    """Return js_matrix and js0 at the cost of one. Args, Raises: see js_matrix."""
    axis = as_axis("js_matrix", axis)
    names = compared(spectra, blocks, axis)
    where = resolved_axis("js_matrix", spectra, names, axis)
    nodes, weights = distributions(spectra, names, where)
    if sigma is None:
        sigma = default_sigma(nodes)
    else:
        sigma = check_sigma_in_range("js_matrix", _checks.real("js_matrix", "sigma", sigma), nodes)
    matrix = jensen_shannon.js_matrix(nodes, weights, kind=kind, base=base, sigma=sigma)
    return matrix, JS0(
        value=mean_of_pairs(matrix),
        kind=kind,
        base=float(base),
        axis=where.name,
        sigma=sigma,
        blocks=names,
        excluded=excluded(spectra, axis) if blocks is None else (),
        batchnorm=str(spectra.provenance.get("batchnorm") or ""),
        normalize=where.normalize,
        scale=where.scale,
    )


def distance_matrix(
    spectra: SpectraData,
    metric: str = "wasserstein",
    axis: str | Axis = "linear",
    blocks: Sequence[str] | None = None,
) -> Tensor:
    """Compare the spectra pair by pair without smoothing: exact, with no sigma to choose.

    Args:
        metric: "wasserstein" (in units of the axis) or "kolmogorov" (in [0, 1]): see distances.
        axis, blocks: see js_matrix.

    Returns:
        (n_compared, n_compared), rows in the order of the compared blocks.

    Raises:
        ValueError: as js_matrix.

    Source: see distances.distance_matrix.

    Example:
        >>> spectra.distance_matrix("kolmogorov", axis=Axis(normalize="radius"))
    """
    axis = as_axis("distance_matrix", axis)
    names = compared(spectra, blocks, axis)
    where = resolved_axis("distance_matrix", spectra, names, axis)
    return distances.distance_matrix(*distributions(spectra, names, where), metric)
