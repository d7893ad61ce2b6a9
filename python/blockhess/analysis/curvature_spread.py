"""Spread of the curvature over the blocks: standard deviation of the logarithm of their largest |eigenvalue|.

    std over l of log10 r_l,    r_l = the largest |node| of block l over all probes

It needs no sigma and no axis, and does not change when the loss is multiplied by a constant. Extreme nodes converge
first, so about ten Lanczos steps are enough.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blockhess._text import number, printable
from blockhess.analysis import outliers
from blockhess.analysis.errors.intervals import check_confidence, jackknife, leave_one_out, student_quantile
from blockhess.analysis.selection import comparable_blocks, weights_only
from blockhess.results.data import SpectraData

# Largest number of zero blocks that str() names.
_MOST_ZERO = 6


@dataclass(frozen=True)
class CurvatureSpread:
    """The spread of the largest |eigenvalue| over the blocks, with everything on which it depends.

    Attributes:
        value: standard deviation of log10 of the largest |eigenvalue|, in decades; also float(spread).
        interval: (lower, upper, confidence); None if a block has one probe.
        smallest, largest: the extremes of the largest |eigenvalue|.
        flattest, sharpest: names of their blocks.
        blocks: names of the blocks, weights only if weights is true.
        weights: whether the blocks are those of two dimensions or more.
        zero: names of the blocks left out: zero within the error of Hessian-vector products, or all nodes 0.
    """

    value: float
    interval: tuple[float, float, float] | None
    smallest: float
    largest: float
    flattest: str
    sharpest: str
    blocks: tuple[str, ...]
    weights: bool
    zero: tuple[str, ...]

    @property
    def ratio(self) -> float:
        """largest / smallest."""
        return self.largest / self.smallest

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes and the ratio as JSON values."""
        return {**asdict(self), "ratio": self.ratio}

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.interval is None:
            interval = "no interval: one probe"
        else:
            lower, upper, confidence = self.interval
            interval = f"{lower:.2f} ... {upper:.2f} with {100 * confidence:g} %"
        text = (
            f"Curvature spread = {self.value:.2f} decades ({interval}): standard deviation of log10 of the largest "
            f"|eigenvalue| of {len(self.blocks)} {'weight ' if self.weights else ''}blocks; from "
            f"{number(self.smallest, 3)} ({self.flattest}) to {number(self.largest, 3)} ({self.sharpest}), "
            f"a factor of {float(f'{self.ratio:.2g}'):,g}"
        )
        if self.zero:
            more = len(self.zero) - _MOST_ZERO
            text += f"; zero, left out: {', '.join(self.zero[:_MOST_ZERO])}" + (f" and {more} more" if more > 0 else "")
        return printable(text)


def curvature_spread(spectra: SpectraData, confidence: float = 0.95) -> CurvatureSpread | None:
    """Return the standard deviation over the weight blocks of log10 of their largest |eigenvalue|.

    Weight blocks are those of two dimensions or more: matrices, kernels and embeddings, no biases and no norm gains. If
    fewer than two of them can be compared, all blocks of comparable_blocks count. Blocks that are zero within the error
    of Hessian-vector products are left out, and named; so are those whose nodes are all 0, if that error is unknown.

    Args:
        confidence: probability of the interval, in (0, 1). The interval contains the error of the probes (jackknife,
            Student's factor), and the residual bounds of the largest nodes as error of the steps.

    Returns:
        The spread, or None if fewer than two blocks can be compared.

    Source: Zhang et al. 2024, section 3.1 (the largest eigenvalue of a block limits its learning rate); Parlett 1998,
    section 13.2 (residual bounds).

    Example:
        >>> print(spectra.curvature_spread())
    """
    confidence = check_confidence("curvature_spread", confidence)
    zero = {name for name, nodes in zip(spectra.names, spectra.merged[0]) if not nodes.any()} | {*spectra.zero_blocks}
    names = tuple(name for name in weights_only(spectra) if name not in zero)
    is_weights = len(names) >= 2
    names = names if is_weights else tuple(name for name in comparable_blocks(spectra) if name not in zero)
    rows, q = spectra.rows(names), spectra.quadrature
    if len(names) < 2 or not bool(spectra.known[rows].all()):
        return None

    def deviation(probes: list[int]) -> Tensor:
        return q.of_probes(probes).merged()[0][rows].abs().amax(1).log10().std()

    value, parts = leave_one_out(deviation, q.num_probes)
    radii = spectra.merged[0][rows].abs().amax(1)
    stderr = float(jackknife(value, parts)[1])  # NaN with one probe, of all blocks or of one
    half = student_quantile(confidence, max(1, q.num_probes - 1)) * stderr + _step_error(spectra, rows, radii)
    interval = (max(0.0, float(value) - half), float(value) + half, confidence) if half < math.inf else None
    low, high = int(radii.argmin()), int(radii.argmax())
    candidates = {block.name for block in spectra.blocks if len(block.shape) >= 2} if is_weights else set(spectra.names)
    return CurvatureSpread(
        value=float(value),
        interval=interval,
        smallest=float(radii[low]),
        largest=float(radii[high]),
        flattest=names[low],
        sharpest=names[high],
        blocks=names,
        weights=is_weights,
        zero=tuple(name for name in spectra.names if name in zero & candidates),
    )


def _step_error(spectra: SpectraData, rows: list[int], radii: Tensor) -> float:
    """Return a bound of the change of the standard deviation if every radius grows by its residual bound.

    The standard deviation of a vector changes by at most that of the change.
    """
    growth = []
    for row, radius in zip(rows, radii.tolist()):
        bounds, nodes = outliers.residuals(spectra.quadrature, row), spectra.quadrature.nodes[:, row].abs()
        at = torch.where(bounds.isnan(), -1.0, nodes).argmax()
        growth.append(math.log10(1 + float(bounds.flatten()[at]) / radius))
    return float(torch.tensor(growth, dtype=torch.float64, device="cpu").norm()) / math.sqrt(len(rows) - 1)
