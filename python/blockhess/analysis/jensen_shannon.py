"""Jensen-Shannon matrices of smoothed spectra.

    p_l = density of block l, one sigma for all;  m = (p + q) / 2
    "divergence"    D = 1/2 int p log(p / m) + 1/2 int q log(q / m)
    "distance"      sqrt(D)

All matrices are symmetric, finite and non-negative, with an exactly zero diagonal, also where spectra do not overlap.
The integrals are sums over the lattice of density.node_grid, with errors near 1e-12. Memory is bounded: the grid is
processed in chunks of CHUNK_ELEMENTS / L points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess import _checks
from blockhess._text import printable
from blockhess.analysis.axes import Axis
from blockhess.analysis.density import check_sigma, grid_spacing, node_grid, smooth

# kind -> what it is, as printed with every value.
KINDS = {
    "distance": "Jensen-Shannon distance",
    "divergence": "Jensen-Shannon divergence",
}

# BatchNorm policy, as spectra record it -> as printed.
BATCHNORM_POLICIES = {
    "eval": "BatchNorm in eval mode",
    "batch": "BatchNorm with batch statistics",
    "frozen_batch_stats": "BatchNorm with frozen batch statistics",
    "none": "no BatchNorm",
}

# JS0 is printed with the names of this many excluded blocks.
_MOST_EXCLUDED = 6

# Few enough that what is made of a chunk, one array after the other, stays in a core's cache.
CHUNK_ELEMENTS = 2**16


def check_choice(op: str, argument: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a name that is not one of the choices.

    Raises:
        ValueError: value is unknown.
    """
    names = list(choices)
    if not isinstance(value, str) or value not in names:
        raise ValueError(f"{op}: {argument} must be one of {', '.join(names)}, got {value!r}")


def js_matrix(
    nodes: Tensor,
    weights: Tensor,
    *,
    sigma: float,
    kind: str = "distance",
    base: float = 2.0,
) -> Tensor:
    """Compare the smoothed spectra of L blocks pair by pair.

    Args:
        nodes, weights: (L, K) float64, on one axis; the weights of a block are non-negative and sum to 1.
        sigma: width of the Gaussian, the same for all blocks, in the unit of the nodes.
        kind: one of KINDS.
        base: base of the logarithm, above 1; with base 2 all values are in [0, 1].

    Returns:
        (L, L) float64.

    Raises:
        ValueError: kind, base or sigma is invalid.

    Source: Lin 1991 (divergence); Endres and Schindelin 2003 (its square root is a metric).

    Example:
        >>> spikes = torch.tensor([[0.0], [0.0], [5.0]], dtype=torch.float64)
        >>> js_matrix(spikes, torch.ones_like(spikes), sigma=0.1).round(decimals=6).tolist()
        [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0]]
    """
    check_choice("js_matrix", "kind", kind, KINDS)
    base = _checks.real("js_matrix", "base", base)
    if not 1 < base < math.inf:
        raise ValueError(f"js_matrix: base must be finite and above 1, got {base!r}")
    sigma = check_sigma("js_matrix", sigma, nodes)

    total = sum_over_grid(nodes, weights, node_grid(nodes, sigma), sigma) * grid_spacing(sigma)
    matrix = total.clamp(max=math.log(2.0)) / math.log(base)
    return matrix.sqrt() if kind == "distance" else matrix


def largest_value(kind: str, base: float) -> float:
    """Return the value of spectra that do not overlap."""
    bound = math.log(2.0) / math.log(base)
    return math.sqrt(bound) if kind == "distance" else bound


def jensen_shannon_sums(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: float) -> Tensor:
    """Return the (L, L) upper triangle of sum_g 1/2 p log(p / m) + 1/2 q log(q / m).

    With delta = (p - q) / (p + q) the summand is m/2 ((1 + delta) log(1 + delta) + (1 - delta) log(1 - delta)):
    no cancellation for close spectra, exactly 0 for equal ones, (p + q) / 2 log 2 where only one of them lives.
    """

    def log1p(x: Tensor) -> Tensor:
        return torch.log1p(x).clamp_(min=-100.0)  # finite where x = -1, for 0 log 0 = 0; every other is above -37

    p = smooth(nodes, weights, grid, sigma)
    mass = p.sum(1)
    sums = (mass[:, None] + mass[None, :]) * (0.5 * math.log(2.0))

    alive = p.amax(1).nonzero().squeeze(1)
    p = p[alive]
    for i in range(len(alive) - 1):
        both = p[i] + p[i + 1 :]
        delta = ((p[i] - p[i + 1 :]) / both).nan_to_num_(0.0)  # 0 / 0 where neither lives
        phi = log1p(delta).mul_(1 + delta)
        phi += log1p(delta.neg_()).mul_(1 + delta)
        sums[alive[i], alive[i + 1 :]] = 0.25 * (both * phi).sum(1)
    return sums


def sum_over_grid(
    nodes: Tensor,
    weights: Tensor,
    grid: Tensor,
    sigma: float,
    pair_sums: Callable[[Tensor, Tensor, Tensor, float], Tensor] = jensen_shannon_sums,
) -> Tensor:
    """Return the symmetric (L, L) sums of an integrand over all grid points, chunk by chunk.

    Args:
        pair_sums: maps nodes, weights, a chunk of the grid and sigma to the upper triangle of the sums.
    """
    n_blocks = nodes.shape[0]
    total = torch.zeros(n_blocks, n_blocks, dtype=torch.float64)
    for chunk in torch.split(grid, max(256, CHUNK_ELEMENTS // n_blocks)):
        total += pair_sums(nodes, weights, chunk, sigma)
    total = total.triu(1).clamp(min=0.0)
    return total + total.T


@dataclass(frozen=True)
class JS0:
    """The mean over all pairs of different blocks, with all that it depends on; print it whole.

    Attributes:
        value: the mean; float(js0) gives it too.
        kind, base: see js_matrix.
        axis, sigma: where the spectra were smoothed, and how wide, in the unit of the axis.
        blocks: names of the compared blocks.
        excluded: (name, reason) of blocks that were not compared.
        batchnorm: BatchNorm policy of the spectra, "" where none was recorded.
        normalize, scale: of the axis, see axes.Axis.
        interval: (lower, upper, confidence) for what many probes would give at the same number of steps, None where it
            was not asked for.
        bias, stderr: jackknife estimates, None where not asked for; the interval is about value - bias.

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
    bias: float | None = None
    stderr: float | None = None

    @property
    def num_pairs(self) -> int:
        """Number of pairs in the mean."""
        return math.comb(len(self.blocks), 2)

    def __float__(self) -> float:
        return self.value

    def _interval_text(self) -> str:
        if self.interval is None:
            return ""
        lower, upper, confidence = self.interval
        return f" ({lower:.3g} ... {upper:.3g} with {100 * confidence:g} %, {self.bias:.2g} of it raised by few probes)"

    def __str__(self) -> str:
        pairs = f"{self.num_pairs} pair{'s' if self.num_pairs > 1 else ''} of {len(self.blocks)} blocks"
        parts = [
            f"JS0 = {self.value:.4g}{self._interval_text()}: {KINDS[self.kind]}, base {self.base:.6g}",
            f"sigma {self.sigma:.3g} on the {Axis(self.axis, self.normalize, self.scale)}",
            f"mean over {pairs}",
            BATCHNORM_POLICIES.get(self.batchnorm, "BatchNorm policy not recorded"),
        ]
        if self.excluded:
            shown, more = self.excluded[:_MOST_EXCLUDED], len(self.excluded) - _MOST_EXCLUDED
            names = ", ".join(f"{name} ({reason})" for name, reason in shown)
            parts.append(f"excluded: {names}" + (f" and {more} more" if more > 0 else ""))
        return printable("; ".join(parts))
