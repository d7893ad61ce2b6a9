"""Axes of eigenvalues on which spectra are smoothed and compared: linear or asinh, with or without normalization.

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

# normalization -> what the eigenvalues of every block are divided by, as printed
NORMALIZATIONS = {"none": "", "radius": "the block's spectral radius", "trace": "the block's trace"}

# exp of it is no infinity; no eigenvalue in float64 lies so far out on an asinh axis unless the scale underflows.
_FAR = 300.0


@dataclass(frozen=True)
class Axis:
    """An axis of eigenvalues.

    Args:
        name: "linear", or "asinh": logarithmic towards both sides beyond `scale`.
        normalize: what the eigenvalues of every block are divided by first: "none", "radius" (spectral radius),
            "trace", or k >= 1 for the k-th largest eigenvalue (10 in the paper's figures).
        scale: where the asinh axis turns from linear to logarithmic, in units of the (normalized) eigenvalues, one for
            all blocks; None means the median block's root mean square (default_scale). Linear axes have none.

    Raises:
        ValueError: name or normalize is unknown, or scale is not positive or given for the linear axis.

    Example:
        >>> print(Axis("asinh", normalize="radius", scale=0.01))
        asinh axis (linear below 0.01) of eigenvalues divided by the block's spectral radius
    """

    name: str = "linear"
    normalize: str | int = "none"
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or self.name not in AXES:
            raise ValueError(f"Axis: name must be one of {', '.join(AXES)}, got {self.name!r}")
        k = self.normalize
        whole = isinstance(k, int) and not isinstance(k, bool) and 1 <= k < 2**62
        if not (whole or (isinstance(k, str) and k in NORMALIZATIONS)):
            names = ", ".join(NORMALIZATIONS)
            raise ValueError(f"Axis: normalize must be one of {names} or k >= 1 for an eigenvalue, got {k!r}")
        if self.scale is not None:
            if self.name != "asinh" or not 0 < _checks.real("Axis", "scale", self.scale) < math.inf:
                raise ValueError(
                    f"Axis: scale must be positive and goes with the asinh axis, got {self.scale} for {self.name}"
                )
            object.__setattr__(self, "scale", float(self.scale))

    def __str__(self) -> str:
        scale = "" if self.scale is None else f" (linear below {self.scale:.3g})"
        return f"{self.name} axis{scale}" + (
            f" of eigenvalues divided by {self.divisor_name}" if self.divisor_name else ""
        )

    @property
    def divisor_name(self) -> str:
        """What the eigenvalues of a block are divided by; "" for normalize="none"."""
        k = self.normalize
        return f"the block's eigenvalue number {k}" if isinstance(k, int) else NORMALIZATIONS[k]

    def of_block(self, divisor: float = 1.0) -> BlockAxis:
        """Return the axis as a block sees it whose eigenvalues are divided by this."""
        return BlockAxis(divisor, self.scale)

    def place(self, nodes: Tensor) -> Tensor:
        """Map eigenvalues, normalized already, to the axis."""
        return self.of_block().place(nodes)


def as_axis(op: str, axis: str | Axis) -> Axis:
    """Return the axis of this name, or the axis itself.

    Raises:
        ValueError: the name is unknown.
    """
    if isinstance(axis, Axis):
        return axis
    if not isinstance(axis, str) or axis not in AXES:
        raise ValueError(f"{op}: axis must be one of {', '.join(AXES)} or an Axis, got {axis!r}")
    return Axis(axis)


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
