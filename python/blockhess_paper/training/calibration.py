"""The gap between two optimizers, rank correlation with an interval over families, and the spread of gradient norms.

gap = (SGD's final loss - AdamW's) / (initial loss - AdamW's), both at their best rates
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# SGD counts as worse where the gap is larger than this.
NEEDED_GAP = 0.1

RESAMPLES, CONFIDENCE = 2000, 0.95


def gap(initial: float, sgd: float, adamw: float) -> float:
    """Return the share of AdamW's decrease of the loss that SGD does not reach; negative where SGD ends lower.

    Raises:
        ValueError: AdamW did not lower the loss.

    Example:
        >>> gap(initial=2.0, sgd=1.5, adamw=1.0)
        0.5
    """
    if not adamw < initial:
        raise ValueError(f"gap: AdamW's final loss must be below the initial {initial:.6g}, got {adamw:.6g}")
    return (sgd - adamw) / (initial - adamw)


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation with a percentile bootstrap interval over families."""

    value: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} ({self.lower:+.2f} ... {self.upper:+.2f})"


def rank_correlation(
    x: Sequence[float], y: Sequence[float], families: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Correlation:
    """Return Spearman's correlation, ties at their mean rank, with a bootstrap interval over families.

    Members of a family are not independent, so whole families are resampled. Resamples in which all x or all y are
    equal have no correlation and are drawn again.

    Args:
        x, y: values of the same length.
        families: the family of every value.
        resamples: number of bootstrap samples.
        seed: seed of the bootstrap.

    Raises:
        ValueError: fewer than two different x or y, or only one family.

    Source: Efron and Tibshirani 1993; Spearman 1904.

    Example:
        >>> rank_correlation([1, 2, 3], [1, 4, 9], ["a", "b", "c"]).value
        1.0
    """
    a, b, members = np.asarray(x, float), np.asarray(y, float), np.asarray(families)
    names = sorted(set(families))
    if not len(a) == len(b) == len(members) or len(set(a)) < 2 or len(set(b)) < 2 or len(names) < 2:
        raise ValueError(
            f"rank_correlation: x and y must have two different values each and two families, got {len(set(a))}, "
            f"{len(set(b))} and {len(names)}"
        )
    rows = [np.flatnonzero(members == name) for name in names]
    generator = np.random.default_rng(seed)
    found: list[float] = []
    while len(found) < resamples:
        chosen = np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])
        if len(set(a[chosen])) > 1 and len(set(b[chosen])) > 1:
            found.append(_spearman(a[chosen], b[chosen]))
    tail = (1 - CONFIDENCE) / 2
    lower, upper = np.quantile(found, [tail, 1 - tail])
    return Correlation(_spearman(a, b), float(lower), float(upper))


def _spearman(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    """Return Pearson's correlation of the ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return ranks from 1, ties at their mean rank: scipy.stats.rankdata without the second that its import takes."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray[Any, Any] = (counts.cumsum() - (counts - 1) / 2)[place]
    return ranks


def heterogeneity(norms: Sequence[float], dims: Sequence[int]) -> float:
    """Return the Gini coefficient of the norm of the gradient per root of the number of entries, over the blocks.

    It is 0 for equal blocks and 1 - 1 / n if all but one of n are zero.

    Args:
        norms: of the gradient of every block, not all zero.
        dims: number of entries of every block.

    Source: Tomihari and Sato 2025, arXiv 2502.00213 (gradient heterogeneity: unequal gradient norms of the blocks).

    Example:
        >>> heterogeneity([2.0, 2.0], [4, 4])
        0.0
    """
    scaled = np.sort(np.asarray(norms, float) / np.sqrt(dims))
    count = len(scaled)
    return float((2 * np.arange(1, count + 1) - count - 1) @ scaled / (count * scaled.sum()))
