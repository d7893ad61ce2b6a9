"""Pairwise comparison of the blocks of a result: Jensen-Shannon matrices, JS0 with its error, other distances."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockhess.analysis import distances, jensen_shannon
from blockhess.analysis.axes import Axis, as_axis
from blockhess.analysis.density import check_sigma_in_range, default_sigma
from blockhess.analysis.errors.intervals import check_confidence
from blockhess.analysis.errors.jensen_shannon import js_error, mean_of_pairs, steps_error, with_interval
from blockhess.analysis.errors.steps import exact, shortened
from blockhess.analysis.jensen_shannon import JS0
from blockhess.analysis.selection import compared, distributions, excluded, resolved_axis
from blockhess.results.data import SpectraData
from blockhess_ext import Quadrature


def js_matrix(
    spectra: SpectraData,
    kind: str = "distance",
    base: float = 2.0,
    sigma: float | None = None,
    axis: str | Axis = "asinh",
    blocks: Sequence[str] | None = None,
) -> Tensor:
    """Return the Jensen-Shannon distances between the smoothed spectra of all pairs of blocks.

    Args:
        kind: "distance", or "divergence", its square: see jensen_shannon.js_matrix.
        base: base of the logarithm; with base 2 both kinds are in [0, 1].
        sigma: standard deviation of the Gaussian on the axis, the same for all blocks, at most the range of all nodes;
            None means default_sigma(blocks, axis).
        axis: "asinh", logarithmic on both sides of zero, whose default scale resolves flat and sharp blocks (see
            axes.default_scale); "linear", which resolves the sharpest; or an Axis, which can also normalize the
            eigenvalues of every block.
        blocks: names; None means comparable_blocks(axis).

    Returns:
        (n_compared, n_compared), rows in the order of the compared blocks.

    Raises:
        ValueError: a named block cannot be normalized, or fewer than two blocks are compared.

    Example:
        >>> spectra.js_matrix(axis=Axis("asinh", normalize="radius"), blocks=["0.weight", "2.weight"])
    """
    return compare(spectra, kind, base, sigma, axis, blocks)[0]


def js0(
    spectra: SpectraData,
    kind: str = "distance",
    base: float = 2.0,
    sigma: float | None = None,
    axis: str | Axis = "asinh",
    blocks: Sequence[str] | None = None,
    confidence: float | None = None,
) -> JS0:
    """Return the mean of js_matrix over all pairs of different blocks, the paper's measure of heterogeneity.

    Random probes bias it upwards. With `confidence` the jackknife estimates the bias and the error of the probes, at
    the cost of n_probes more matrices. The error of finite steps is estimated by the changes of the spectra between
    half and all of the steps.

    Args, Raises: see js_matrix.
        confidence: probability of the interval of the exact spectra, in (0, 1); None means no interval.

    Returns:
        JS0: float(js0) is the mean, str(js0) adds everything on which it depends.

    Source: Zhang et al. 2024, section 2.5.

    Example:
        >>> print(spectra.js0(confidence=0.95))
    """
    return compare(spectra, kind, base, sigma, axis, blocks, confidence)[1]


def _steps_error(spectra: SpectraData, mean: JS0, matrix: Tensor) -> float:
    quadrature = spectra.quadrature
    single = (quadrature.steps == 1) & ~exact(quadrature)
    if bool(single[:, spectra.rows(mean.blocks)].any()):
        return math.inf  # there are no fewer steps
    all_steps, half = _placed(spectra, mean, quadrature), _placed(spectra, mean, shortened(quadrature, 1 / 2))
    pairs = zip(*(torch.stack(parts, 1) for parts in zip(all_steps, half)))
    changes = [jensen_shannon.js_matrix(*pair, sigma=mean.sigma, base=mean.base)[0, 1] for pair in pairs]
    return steps_error(matrix, torch.stack(changes), mean.kind)


def _placed(spectra: SpectraData, like: JS0, quadrature: Quadrature) -> tuple[Tensor, Tensor]:
    """Return the nodes and weights of another quadrature of the blocks of `like`, on its axis."""
    return distributions(spectra, like.blocks, Axis(like.axis, like.normalize, like.scale), quadrature)


def _matrix(spectra: SpectraData, like: JS0, quadrature: Quadrature, kind: str) -> Tensor:
    """Return js_matrix of another quadrature of the same blocks, with the axis, scale and sigma of `like`."""
    placed = _placed(spectra, like, quadrature)
    return jensen_shannon.js_matrix(*placed, sigma=like.sigma, kind=kind, base=like.base)


def js_matrix_error(spectra: SpectraData, **comparison: Any) -> tuple[Tensor, Tensor]:
    """Estimate by the jackknife the bias and standard error of js_matrix due to the random probes.

    Args:
        comparison: arguments of js_matrix, by name.

    Returns:
        bias, stderr: (n_compared, n_compared) each; NaN with one probe. js_matrix - bias estimates the limit of many
        probes at the same number of steps.

    Source: Quenouille 1956; Tukey 1958.

    Example:
        >>> bias, stderr = spectra.js_matrix_error(sigma=0.01)
    """
    return probe_error(spectra, compare(spectra, **comparison)[1])[:2]


def probe_error(spectra: SpectraData, mean: JS0) -> tuple[Tensor, Tensor, float, float]:
    """Return what js_error does, of a comparison of these spectra."""

    def divergence(probes: list[int]) -> Tensor:
        values = _matrix(spectra, mean, spectra.quadrature.of_probes(probes), "divergence")
        unknown = ~(spectra.quadrature.steps[probes] > 0).any(0)[spectra.rows(mean.blocks)]
        return values.masked_fill(unknown[:, None] | unknown, math.nan)

    return js_error(divergence, mean.kind, spectra.quadrature.num_probes)


def compare(
    spectra: SpectraData,
    kind: str = "distance",
    base: float = 2.0,
    sigma: float | None = None,
    axis: str | Axis = "asinh",
    blocks: Sequence[str] | None = None,
    confidence: float | None = None,
) -> tuple[Tensor, JS0]:
    """Return js_matrix and js0 at the cost of one of them. Args, Raises: see js0."""
    given = as_axis("js_matrix", axis)
    names = compared(spectra, blocks, given)
    axis = resolved_axis("js_matrix", spectra, names, given)
    nodes, weights = distributions(spectra, names, axis)
    sigma = default_sigma(nodes) if sigma is None else check_sigma_in_range("js_matrix", sigma, nodes)
    matrix = jensen_shannon.js_matrix(nodes, weights, kind=kind, base=base, sigma=sigma)
    mean = JS0(
        value=mean_of_pairs(matrix),
        kind=kind,
        base=float(base),
        axis=axis.name,
        sigma=sigma,
        blocks=names,
        excluded=excluded(spectra, axis) if blocks is None else (),
        batchnorm=str(spectra.provenance.get("batchnorm") or ""),
        normalize=axis.normalize,
        scale=axis.scale,
        default_scale=axis.scale is not None and given.scale is None,
    )
    if confidence is None:
        return matrix, mean
    confidence = check_confidence("js0", confidence)
    _, _, bias, stderr = probe_error(spectra, mean)
    steps = _steps_error(spectra, mean, matrix)
    return matrix, with_interval(mean, bias, stderr, spectra.quadrature.num_probes, confidence, steps)


def distance_matrix(
    spectra: SpectraData,
    metric: str = "wasserstein",
    axis: str | Axis = "linear",
    blocks: Sequence[str] | None = None,
) -> Tensor:
    """Return the distances between the spectra of all pairs of blocks, exact, without smoothing.

    Args:
        metric: "wasserstein" (in units of the axis) or "kolmogorov" (in [0, 1]): see distances.distance_matrix.
        axis, blocks: see js_matrix.

    Returns:
        (n_compared, n_compared), rows in the order of the compared blocks.

    Example:
        >>> spectra.distance_matrix("kolmogorov", axis=Axis(normalize="radius"))
    """
    axis = as_axis("distance_matrix", axis)
    names = compared(spectra, blocks, axis)
    axis = resolved_axis("distance_matrix", spectra, names, axis)
    return distances.distance_matrix(*distributions(spectra, names, axis), metric)
