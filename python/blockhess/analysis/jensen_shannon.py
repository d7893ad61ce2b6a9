"""Jensen-Shannon matrices of smoothed spectra.

    p_l = density of block l, one sigma for all;  m = (p + q) / 2
    "divergence"    D = 1/2 int p log(p / m) + 1/2 int q log(q / m)
    "distance"      sqrt(D)

All matrices are symmetric, finite and non-negative, with an exactly zero diagonal, also if spectra do not overlap. The
integrals are sums over density.node_grid, with errors near 1e-12, in chunks of CHUNK_ELEMENTS / L points.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from blockhess import _checks
from blockhess._text import plural, printable
from blockhess.analysis.axes import SCALE_RULE, Axis
from blockhess.analysis.density import check_sigma, grid_spacing, node_grid, smooth
from blockhess_ext.arguments import choice

# kind -> text
KINDS = {"distance": "Jensen-Shannon distance", "divergence": "Jensen-Shannon divergence"}

# BatchNorm policy in provenance -> text
BATCHNORM_POLICIES = {
    "eval": "BatchNorm in eval mode",
    "batch": "BatchNorm with batch statistics",
    "frozen_batch_stats": "BatchNorm with frozen batch statistics",
    "none": "no BatchNorm",
}

# Smallest bias that str(JS0) shows, relative to the value, of which it shows four digits.
LEAST_BIAS = 1e-4

# Largest number of excluded blocks that str(JS0) names.
_MOST_EXCLUDED = 6

# The arrays of a chunk fit in the cache of a core.
CHUNK_ELEMENTS = 2**16


def js_matrix(nodes: Tensor, weights: Tensor, *, sigma: float, kind: str = "distance", base: float = 2.0) -> Tensor:
    """Return the Jensen-Shannon distances between the smoothed spectra of all pairs of L blocks.

    Args:
        nodes, weights: (L, K) float64, on one axis; the weights of a block are non-negative and sum to 1.
        sigma: standard deviation of the Gaussian, the same for all blocks, in units of the nodes.
        kind: one of KINDS.
        base: base of the logarithm, above 1; with base 2 all values are in [0, 1].

    Returns:
        (L, L) float64.

    Source: Lin 1991 (divergence); Endres and Schindelin 2003 (its square root is a metric).

    Example:
        >>> spikes = torch.tensor([[0.0], [0.0], [5.0]], dtype=torch.float64)
        >>> js_matrix(spikes, torch.ones_like(spikes), sigma=0.1).round(decimals=6).tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    choice("kind", kind, KINDS, op="js_matrix")
    base = _checks.real("js_matrix", "base", base)
    if not 1 < base < math.inf:
        raise ValueError(f"js_matrix: base must be finite and above 1, got {base!r}")
    sigma = check_sigma("js_matrix", sigma, nodes)

    total = sum_over_grid(nodes, weights, node_grid(nodes, sigma), sigma) * grid_spacing(sigma)
    matrix = total.clamp(max=math.log(2.0)) / math.log(base)
    return matrix.sqrt() if kind == "distance" else matrix


def largest_value(kind: str, base: float) -> float:
    """Return the upper bound, the value for spectra that do not overlap."""
    bound = math.log(2.0) / math.log(base)
    return math.sqrt(bound) if kind == "distance" else bound


def jensen_shannon_sums(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Return the (L, L) upper triangle of sum_g 1/2 p log(p / m) + 1/2 q log(q / m).

    With delta = (p - q) / (p + q) the summand is m/2 ((1 + delta) log(1 + delta) + (1 - delta) log(1 - delta)):
    no cancellation for close spectra, exactly 0 for equal ones, (p + q) / 2 log 2 where one of them is 0.
    """

    def log1p(x: Tensor) -> Tensor:
        return torch.log1p(x).clamp_(min=-100.0)  # finite at x = -1, for 0 log 0 = 0; other values are above -37

    p = smooth(nodes, weights, grid, sigma)
    mass = p.sum(1)
    sums = (mass[:, None] + mass[None, :]) * (0.5 * math.log(2.0))

    nonzero = p.amax(1).nonzero().squeeze(1)
    p = p[nonzero]
    for i in range(len(nonzero) - 1):
        both = p[i] + p[i + 1 :]
        delta = ((p[i] - p[i + 1 :]) / both).nan_to_num_(0.0)  # 0 / 0 where both are 0
        phi = log1p(delta).mul_(1 + delta)
        phi += log1p(delta.neg_()).mul_(1 + delta)
        sums[nonzero[i], nonzero[i + 1 :]] = 0.25 * (both * phi).sum(1)
    return sums


def sum_over_grid(
    nodes: Tensor,
    weights: Tensor,
    grid: Tensor,
    sigma: float,
    pair_sums: Callable[[Tensor, Tensor, Tensor, float], Tensor] = jensen_shannon_sums,
) -> Tensor:
    """Return the symmetric (L, L) sums of an integrand over all grid points.

    Args:
        pair_sums: maps nodes, weights, a chunk of the grid and sigma to the upper triangle of the sums.
    """
    n_blocks = nodes.shape[0]
    total = torch.zeros(n_blocks, n_blocks, dtype=torch.float64, device="cpu")
    for chunk in torch.split(grid, max(256, CHUNK_ELEMENTS // n_blocks)):
        total += pair_sums(nodes, weights, chunk, sigma)
    total = total.triu(1).clamp(min=0.0)
    return total + total.T


@dataclass(frozen=True)
class JS0:
    """The mean of js_matrix over all pairs of different blocks, with everything on which it depends.

    Attributes:
        value: the mean, also float(js0).
        kind, base: see js_matrix.
        axis, normalize, scale: see axes.Axis.
        sigma: standard deviation of the Gaussian, in units of the axis.
        blocks: names of the compared blocks.
        excluded: (name, reason) of the blocks that comparisons exclude by default.
        batchnorm: BatchNorm policy of the result, "" if not recorded.
        interval: (lower, upper, confidence) of JS0 of the exact spectra: probes and steps; None unless requested.
        probes_interval: the same of the limit of many probes at the same number of steps, about value - bias.
        bias, stderr: jackknife estimates, None unless requested.
        default_scale: whether scale is axes.default_scale.

    Source: Zhang et al. 2024, section 2.5 and Table 1.
    """

    value: float
    kind: str
    base: float
    axis: str
    sigma: float
    blocks: tuple[str, ...]
    excluded: tuple[tuple[str, str], ...] = ()
    batchnorm: str = ""
    normalize: str | int = "none"
    scale: float | None = None
    interval: tuple[float, float, float] | None = None
    probes_interval: tuple[float, float, float] | None = None
    bias: float | None = None
    stderr: float | None = None
    default_scale: bool = field(default=False, compare=False)

    @property
    def num_pairs(self) -> int:
        """Number of pairs in the mean."""
        return math.comb(len(self.blocks), 2)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        interval = ""
        if self.interval is not None and self.probes_interval is not None:
            lower, upper, confidence = self.interval
            fewer = f"{self.probes_interval[0]:.3g} ... {self.probes_interval[1]:.3g} at this number of steps"
            bias = 0.0 if self.bias is None else self.bias
            raised = f"; {bias:.2g} of it raised by few probes" if bias >= LEAST_BIAS * self.value else ""
            interval = f" ({lower:.3g} ... {upper:.3g} with {100 * confidence:g} %; {fewer}{raised})"
            if math.isnan(bias):
                interval = " (no interval: one probe)"
        rule = f", the scale being {SCALE_RULE}" if self.default_scale else ""
        pairs = f"{plural(self.num_pairs, 'pair')} of {len(self.blocks)} blocks"
        parts = [
            f"JS0 = {self.value:.4g}{interval}: {KINDS[self.kind]}, base {self.base:.6g}",
            f"sigma {self.sigma:.3g} on the {Axis(self.axis, self.normalize, self.scale)}{rule}",
            f"mean over {pairs}",
            BATCHNORM_POLICIES.get(self.batchnorm, "BatchNorm policy not recorded"),
        ]
        if self.excluded:
            shown, more = self.excluded[:_MOST_EXCLUDED], len(self.excluded) - _MOST_EXCLUDED
            names = ", ".join(f"{name} ({reason})" for name, reason in shown)
            parts.append(f"excluded: {names}" + (f" and {more} more" if more > 0 else ""))
        return printable("; ".join(parts))
