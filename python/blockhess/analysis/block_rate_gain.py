"""Gain of block rates: guaranteed decrease of the loss by one step of blockwise gradient descent, over one rate.

    gain = (sum_l |g_l|^2 / lambda_l) / (sum_l |g_l|^2 / max_k lambda_k)

with g_l the gradient and lambda_l = lambda_max(H_l) of block l. A step of rate r <= 1 / lambda_l in block l decreases a
quadratic model of the loss by at least r |g_l|^2 / 2. The gain is at least 1, and does not change when the loss is
multiplied by a constant. Curvature between blocks is neglected, as in the paper.

Source: Zhang et al. 2024, equation (13) in the proof of Theorem 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from blockhess._text import printable
from blockhess.analysis.errors.error_bars import eigenvalue_bounds
from blockhess.analysis.errors.intervals import check_confidence
from blockhess.analysis.learning_rates import rates
from blockhess.analysis.selection import weights_only
from blockhess.results.data import SpectraData

# Largest number of blocks left out that str() names.
_MOST_LEFT_OUT = 6


@dataclass(frozen=True)
class BlockRateGain:
    """The gain of block rates, with everything on which it depends.

    Attributes:
        value: the gain, at least 1; also float(gain).
        interval: (lower, upper, confidence); None if lambda_max of a block has no upper bound.
        sharpest: name of the block of the largest lambda_max, which limits the single rate.
        blocks: names of the blocks that count.
        left_out: (name, reason) of the others.
    """

    value: float
    interval: tuple[float, float, float] | None
    sharpest: str
    blocks: tuple[str, ...]
    left_out: tuple[tuple[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        return asdict(self)

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        interval = "no interval"
        if self.interval is not None:
            lower, upper, confidence = self.interval
            interval = f"{lower:.3g} ... {upper:.3g} with {100 * confidence:g} %"
        text = (
            f"Gain of block rates = {self.value:.3g} ({interval}): guaranteed decrease by steps of 1 / lambda_max of "
            f"each of {len(self.blocks)} blocks, over one rate for all of them, limited by {self.sharpest}"
        )
        if self.left_out:
            more = len(self.left_out) - _MOST_LEFT_OUT
            named = (f"{name} ({reason})" for name, reason in self.left_out[:_MOST_LEFT_OUT])
            text += f"; left out: {', '.join(named)}" + (f" and {more} more" if more > 0 else "")
        return printable(text)


def block_rate_gain(
    spectra: SpectraData, blocks: Sequence[str] | None = None, confidence: float = 0.95
) -> BlockRateGain:
    """Return what a learning rate per block, 1 / lambda_max, gains over one rate for all blocks in one step.

    Blocks without a rate are left out, and named: those without positive curvature, for which a quadratic model has no
    best step, and those that are zero within the error of Hessian-vector products. Parameters in no block do not count.

    Args:
        blocks: names of blocks that do not overlap; None means all.
        confidence: probability of the interval, in (0, 1). It contains the errors of lambda_max, by eigenvalue_bounds.

    Raises:
        ValueError: the result has no gradient norms, as those of blockhess 0.1, blocks overlap, the gradient is zero,
            or fewer than two blocks have a rate.

    Source: Zhang et al. 2024, equation (13) in the proof of Theorem 1.

    Example:
        >>> print(spectra.block_rate_gain())
    """
    confidence = check_confidence("block_rate_gain", confidence)
    given = [spectra.names[row] for row in spectra.rows(blocks)]
    rate_of, reasons = rates(spectra), dict(spectra.excluded)
    _refuse_overlap(spectra, given)
    names = tuple(name for name in given if rate_of[name] is not None and name not in reasons)
    left_out = tuple((name, reasons.get(name, "no positive curvature")) for name in given if name not in names)
    if len(names) < 2:
        raise ValueError(
            f"block_rate_gain: two blocks at least must have a positive eigenvalue, got {len(names)} of {len(given)}"
        )
    norms = gradient_norms(spectra, names)
    shares = torch.tensor([norms[name] for name in names], dtype=torch.float64, device="cpu")
    if not bool(shares.any()):
        raise ValueError("block_rate_gain: the gradient must not be zero in all blocks with a rate, as no step helps")
    shares = (shares / shares.max()).square()
    shares /= shares.sum()
    rows = spectra.rows(names)
    largest = 1 / torch.tensor([rate_of[name] for name in names], dtype=torch.float64, device="cpu")
    upper = eigenvalue_bounds(spectra, 1 - (1 - confidence) / len(rows))[1][rows]
    ends = _interval(shares, (largest - spectra.zero_tolerance[rows]).clamp(min=0.0), upper)
    return BlockRateGain(
        value=float((shares * (largest.max() / largest)).sum()),
        interval=(*ends, confidence) if math.isfinite(ends[1]) else None,
        sharpest=names[int(largest.argmax())],
        blocks=names,
        left_out=left_out,
    )


def gradient_spread(spectra: SpectraData) -> float:
    """Return the standard deviation over the weight blocks of log10 of the r.m.s. entry of their gradients, in decades.

    It measures the heterogeneity of the gradient without the curvature. Blocks whose gradient is zero are left out.

    Returns:
        std over l of log10(|g_l| / sqrt(dim_l)); NaN for fewer than two blocks.

    Raises:
        ValueError: the result has no gradient norms.

    Source: Tomihari and Sato 2025, arXiv 2502.00213 (gradient heterogeneity: unequal gradient norms of the blocks); the
    measure is that of curvature_spread.

    Example:
        >>> print(spectra.gradient_spread())
    """
    names = weights_only(spectra)
    norms, dims = gradient_norms(spectra, names), dict(zip(spectra.names, spectra.dims))
    sizes = torch.tensor(
        [norms[name] / math.sqrt(dims[name]) for name in names if norms[name]], dtype=torch.float64, device="cpu"
    )
    return float(sizes.log10().std()) if len(sizes) > 1 else math.nan


def gradient_norms(spectra: SpectraData, blocks: Sequence[str]) -> dict[str, float]:
    """Return block -> norm of its gradient, or raise ValueError where it is not known."""
    norms: dict[str, float] = spectra.provenance.get("gradient_norms") or {}
    missing = [name for name in blocks if name not in norms]
    if missing:
        raise ValueError(
            f"gradients: spectra must hold the norms of the gradient, got none of {missing[0]!r}; "
            "compute them again with this version of blockhess.spectrum"
        )
    return norms


def _interval(shares: Tensor, low: Tensor, high: Tensor) -> tuple[float, float]:
    """Return the least and the largest gain for lambda between low and high, (n,) each.

    The gain rises with the largest lambda and falls with all others.
    """
    most = low.max()
    least = float((shares * (most / high).clamp(min=1.0)).sum())
    largest = []
    for k in (high >= most).nonzero().flatten().tolist():
        terms = shares * high[k] / torch.minimum(low, high[k])
        terms[k] = shares[k]
        largest.append(float(terms[shares > 0].sum()))
    return least, max(largest, default=math.nan)


def _refuse_overlap(spectra: SpectraData, names: Sequence[str]) -> None:
    """Raise ValueError if two blocks hold the same entry of a parameter."""
    slices = spectra.provenance.get("slices") or {}
    held: dict[str, list[tuple[int, float, float, str]]] = {}  # parameter -> (dim, start, stop, block), -1 for all
    for row in spectra.rows(names):
        block = spectra.blocks[row]
        parts = [(name, dim, start, stop) for name, start, stop, dim in slices.get(block.name, ())]
        cut = {name for name, *_ in parts}
        for name, *part in [*parts, *((p, -1, 0, math.inf) for p in block.parameters if p not in cut)]:
            held.setdefault(name, []).append((*part, block.name))
    for parameter, parts in held.items():
        parts.sort()
        for (dim, _, stop, one), (other_dim, start, _, other) in itertools.pairwise(parts):
            if dim != other_dim or start < stop:
                raise ValueError(
                    f"block_rate_gain: blocks must not overlap, got {one!r} and {other!r}, which share entries of "
                    f"{parameter!r}; name others in blocks="
                )
