"""Axes of eigenvalues on which spectra are smoothed and compared: linear or asinh, as they are or normalised.

    linear   y = x / c_l
    asinh    y = asinh(x / (c_l s)): linear for |x| below c_l s, +- log(2 |x| / (c_l s)) above; one scale s for all

c_l is 1, or block l's spectral radius, k-th largest eigenvalue or trace.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess import _checks
from blockhess.analysis import distribution

AXES = ("linear", "asinh")

# normalisation -> what the eigenvalues of every block are divided by, as printed
NORMALIZATIONS = {"none": "", "radius": "the block's spectral radius", "trace": "the block's trace"}

# exp of it is no infinity; no eigenvalue in float64 lies so far out on an asinh axis unless the scale underflows.
_FAR = 300.0


@dataclass(frozen=True)
class Axis:
    """An axis with all that it depends on; print it whole.

    Attributes:
        name: one of AXES.
        normalize: one of NORMALIZATIONS, or k >= 1 for the k-th largest eigenvalue.
        scale: where the asinh axis turns from linear to logarithmic, in units of the (normalised) eigenvalues; None
            on the linear axis.
    """

    name: str = "linear"
    normalize: str | int = "none"
    scale: float | None = None

    def __str__(self) -> str:
        divisor = divisor_name(self.normalize)
        scale = "" if self.scale is None else f" (linear below {self.scale:.3g})"
        return f"{self.name} axis{scale}" + (f" of eigenvalues divided by {divisor}" if divisor else "")

    def of_block(self, divisor: float = 1.0) -> BlockAxis:
        """Return the axis as a block sees it whose eigenvalues are divided by this."""
        return BlockAxis(divisor, self.scale)

    def place(self, nodes: Tensor) -> Tensor:
        """Map eigenvalues, normalised already, to the axis."""
        return self.of_block().place(nodes)


@dataclass(frozen=True)
class BlockAxis:
    """The map y(x) from the eigenvalues of one block to an axis; it ascends.

    Attributes:
        divisor: c_l, positive.
        scale: s, None on the linear axis.

    Example:
        >>> BlockAxis(2.0).place(torch.tensor([4.0])).item()
        2.0
    """

    divisor: float = 1.0
    scale: float | None = None

    def place(self, x: Tensor) -> Tensor:
        """Return y(x)."""
        y = x / self.divisor
        return y if self.scale is None else (y / self.scale).asinh()

    def invert(self, y: Tensor) -> Tensor:
        """Return x(y)."""
        return y * self.divisor if self.scale is None else y.clamp(-_FAR, _FAR).sinh() * (self.scale * self.divisor)

    def slope(self, x: Tensor) -> Tensor:
        """Return y'(x)."""
        if self.scale is None:
            return torch.full_like(x, 1 / self.divisor)
        return torch.hypot(x, torch.full_like(x, self.scale * self.divisor)).reciprocal()

    def finest(self, sigma: float) -> float:
        """Return the least difference of eigenvalues over which a Gaussian of this width on the axis changes."""
        return sigma * self.divisor if self.scale is None else min(sigma, 1.0) * self.scale * self.divisor


def divisor_name(normalize: str | int) -> str:
    """Return what a normalisation divides by, in words; "" for "none"."""
    return f"the block's eigenvalue number {normalize}" if isinstance(normalize, int) else NORMALIZATIONS[normalize]


def check_axis(op: str, axis: str, normalize: str | int, scale: float | None) -> None:
    """Refuse what describes no axis.

    Raises:
        ValueError: axis or normalize is unknown, or scale is not positive or given for the linear axis.
    """
    if not isinstance(axis, str) or axis not in AXES:
        raise ValueError(f"{op}: axis must be one of {', '.join(AXES)}, got {axis!r}")
    whole = isinstance(normalize, int) and not isinstance(normalize, bool) and 1 <= normalize < 2**62
    if not (whole or (isinstance(normalize, str) and normalize in NORMALIZATIONS)):
        names = ", ".join(NORMALIZATIONS)
        raise ValueError(f"{op}: normalize must be one of {names} or k >= 1 for an eigenvalue, got {normalize!r}")
    if scale is not None and (axis != "asinh" or not 0 < _checks.real(op, "scale", scale) < math.inf):
        raise ValueError(f"{op}: scale must be positive and goes with the asinh axis, got {scale} for {axis}")


def default_scale(nodes: Tensor, weights: Tensor) -> float:
    """Return the median over the blocks of their root mean square eigenvalue; 1 where all are zero.

    Args:
        nodes, weights: (n_blocks, K) float64.

    Example:
        >>> default_scale(torch.tensor([[3.0], [5.0], [0.0]]), torch.ones(3, 1))
        3.0
    """
    # Relative to the largest node, so that no square underflows.
    largest = nodes.abs().amax(1, keepdim=True)
    relative = torch.where(largest > 0, nodes / largest, 0.0)
    sizes = largest[:, 0] * (weights * relative**2).sum(1).sqrt()
    sizes = sizes[sizes > 0]
    return float(sizes.median()) if len(sizes) else 1.0


def kth_largest(nodes: Tensor, weights: Tensor, dims: Sequence[int], k: float | Tensor) -> Tensor:
    """Estimate the k-th largest eigenvalue of every block: where dims (1 - cdf) crosses k - 1/2.

    Args:
        nodes, weights: (n_blocks, K) float64.
        dims: sizes of the blocks.
        k: counted from 1, one for all or (n_blocks,); clamped to a block's own first and last eigenvalue.

    Returns:
        (n_blocks,).
    """
    sizes = torch.tensor(dims, dtype=torch.float64)
    above = (torch.as_tensor(k, dtype=torch.float64).clamp(min=1.0) - 0.5).minimum(sizes - 0.5)
    shares = 1 - above / sizes
    return torch.stack(
        [distribution.quantiles(x[None], w[None], q[None])[0, 0] for x, w, q in zip(nodes, weights, shares)]
    )


def divisors(nodes: Tensor, weights: Tensor, dims: Sequence[int], normalize: str | int) -> Tensor:
    """Return c_l of every block (n_blocks,); see the head of this file."""
    if isinstance(normalize, int):
        return kth_largest(nodes, weights, dims, normalize)
    if normalize == "radius":
        return nodes.abs().amax(1)
    if normalize == "trace":
        return torch.tensor(dims, dtype=torch.float64) * (weights * nodes).sum(1)
    return torch.ones(len(nodes), dtype=torch.float64)
