"""Eigenvalue axes on which spectra are smoothed and compared: linear or asinh, with or without normalization.

    linear   y = x / c_l
    asinh    y = asinh(x / (c_l s)): linear for |x| below c_l s, +- log(2 |x| / (c_l s)) above; one scale s for all

c_l is 1, or the spectral radius, k-th largest eigenvalue or trace of block l.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess import _checks
from blockhess.analysis import distribution
from blockhess_ext.arguments import choice

AXES = ("linear", "asinh")

# normalization -> the divisor of the eigenvalues of every block, as printed
NORMALIZATIONS = {"none": "", "radius": "the block's spectral radius", "trace": "the block's trace"}

# Default scale relative to the lower quartile of the blocks' root mean square eigenvalues. Above, flat blocks are in
# the linear part and JS0 depends on sigma; below, models differ less: measured in bench/accuracy/comparisons.py.
RELATIVE_SCALE = 0.03
SCALE_RULE = "3 % of the lower quartile of the blocks' r.m.s. eigenvalues"

# Largest |y| on an asinh axis: sinh of it is finite, and no eigenvalue lies beyond it unless the scale underflows.
_LARGEST = 300.0


@dataclass(frozen=True)
class Axis:
    """An axis of eigenvalues.

    Args:
        name: "linear", or "asinh", which is logarithmic on both sides beyond `scale`.
        normalize: divisor of the eigenvalues of every block: "none", "radius" (spectral radius), "trace", or k >= 1
            for the k-th largest eigenvalue (10 in the paper's figures).
        scale: transition of the asinh axis from linear to logarithmic, in units of the normalized eigenvalues, the
            same for all blocks; None means default_scale. Linear axes have none.

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
        choice("name", self.name, AXES, op="Axis")
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
        divisor = f" of eigenvalues divided by {self.divisor_name}" if self.divisor_name else ""
        return f"{self.name} axis{scale}{divisor}"

    @property
    def divisor_name(self) -> str:
        """Text of the divisor of the eigenvalues; "" for normalize="none"."""
        k = self.normalize
        return f"the block's eigenvalue number {k}" if isinstance(k, int) else NORMALIZATIONS[k]

    def of_block(self, divisor: float = 1.0) -> BlockAxis:
        """Return the axis for a block with this divisor."""
        return BlockAxis(divisor, self.scale)

    def place(self, nodes: Tensor) -> Tensor:
        """Map normalized eigenvalues to the axis."""
        return self.of_block().place(nodes)


def as_axis(op: str, axis: str | Axis) -> Axis:
    """Return the axis of this name, or the axis itself; raise ValueError for an unknown name."""
    if isinstance(axis, Axis):
        return axis
    if not isinstance(axis, str) or axis not in AXES:
        raise ValueError(f"{op}: axis must be one of {', '.join(AXES)} or an Axis, got {axis!r}")
    return Axis(axis)


@dataclass(frozen=True)
class BlockAxis:
    """The map y(x) from the eigenvalues of one block to an axis, increasing.

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
        return (
            y * self.divisor
            if self.scale is None
            else y.clamp(-_LARGEST, _LARGEST).sinh() * (self.scale * self.divisor)
        )

    def slope(self, x: Tensor) -> Tensor:
        """Return y'(x)."""
        if self.scale is None:
            return torch.full_like(x, 1 / self.divisor)
        return torch.hypot(x, torch.full_like(x, self.scale * self.divisor)).reciprocal()

    def finest(self, sigma: float) -> float:
        """Return the smallest width in x of a Gaussian of width sigma in y."""
        return sigma * self.divisor if self.scale is None else min(sigma, 1.0) * self.scale * self.divisor


def default_scale(nodes: Tensor, weights: Tensor) -> float:
    """Return RELATIVE_SCALE times the lower quartile of the root mean square eigenvalues of the blocks.

    The lower quartile of n nonzero blocks is the value of rank ceil(n / 4), the smallest up to n = 4: it follows the
    flat blocks, and changes little when one is added. The scale is 1 if all eigenvalues are zero.

    Args:
        nodes, weights: (n_blocks, K) float64.

    Example:
        >>> default_scale(torch.tensor([[300.0], [500.0], [0.0]]), torch.ones(3, 1))
        9.0
    """
    # Relative to the largest node, as squares could underflow.
    largest = nodes.abs().amax(1, keepdim=True)
    relative = torch.where(largest > 0, nodes / largest, 0.0)
    sizes = largest[:, 0] * (weights * relative**2).sum(1).sqrt()
    sizes = sizes[sizes > 0]
    return RELATIVE_SCALE * float(sizes.sort().values[(len(sizes) - 1) // 4]) if len(sizes) else 1.0


def kth_largest(nodes: Tensor, weights: Tensor, dims: Sequence[int], k: float | Tensor) -> Tensor:
    """Estimate the k-th largest eigenvalue of every block: where dims (1 - cdf) crosses k - 1/2.

    Args:
        nodes, weights: (n_blocks, K) float64.
        dims: sizes of the blocks.
        k: counted from 1, a number or (n_blocks,); clamped to [1, dim].

    Returns:
        (n_blocks,).
    """
    sizes = torch.tensor(dims, dtype=torch.float64, device="cpu")
    above = (torch.as_tensor(k, dtype=torch.float64, device="cpu").clamp(min=1.0) - 0.5).minimum(sizes - 0.5)
    shares = 1 - above / sizes
    return torch.stack(
        [distribution.quantiles(x[None], w[None], q[None])[0, 0] for x, w, q in zip(nodes, weights, shares)]
    )


def divisors(nodes: Tensor, weights: Tensor, dims: Sequence[int], normalize: str | int) -> Tensor:
    """Return the divisor c_l of every block, (n_blocks,)."""
    if isinstance(normalize, int):
        return kth_largest(nodes, weights, dims, normalize)
    if normalize == "radius":
        return nodes.abs().amax(1)
    if normalize == "trace":
        return torch.tensor(dims, dtype=torch.float64, device="cpu") * (weights * nodes).sum(1)
    return torch.ones(len(nodes), dtype=torch.float64, device="cpu")
