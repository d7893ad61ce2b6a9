"""The calibration of JS0: does it predict how far SGD falls behind AdamW on measured architectures?

    gap  = (SGD's final loss - AdamW's) / (initial loss - AdamW's), both at their best rates
    rule = "SGD fine" below every JS0 at which Adam was needed, "Adam needed" above every JS0 at which SGD was fine

Between the two thresholds, and everywhere if the rule does not hold, the decision is "undecided". The rule holds if the
bootstrap interval of the rank correlation of JS0 and gap is above zero and if rules made without one family of
architectures decide, correctly, on enough members of that family. Fifteen points do not support a probability.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from importlib.resources import files
from typing import Any

import numpy as np

SGD_FINE, ADAM_NEEDED, UNDECIDED = "SGD fine", "Adam needed", "undecided"

# Adam counts as needed where the gap is larger than this.
NEEDED_GAP = 0.1

# The rule holds if it is wrong about at most this share of its decisions, and decides on at least this share.
MOST_WRONG, LEAST_DECIDED = 0.1, 0.3

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
class Subject:
    """A measured architecture: its mean gap over the seeds, and JS0 at initialization in the default definition."""

    name: str
    family: str
    gap: float
    js0: float

    @property
    def needs_adam(self) -> bool:
        """Whether the gap is above NEEDED_GAP."""
        return self.gap > NEEDED_GAP


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


def chance_of_best(
    predictors: Sequence[Sequence[float]], y: Sequence[float], *, shuffles: int = 10_000, seed: int = 0
) -> float:
    """Return the p-value of the largest rank correlation of y with any of the predictors, by permutation.

    It accounts for choosing the best of many predictors afterwards. Families are not kept together.

    Args:
        predictors: (n_predictors, n), none constant.
        y: (n,).
        shuffles: number of random permutations of y.
        seed: seed of the permutations.

    Source: Westfall and Young 1993.

    Example:
        >>> chance_of_best([[1, 2, 3, 4]], [1, 2, 3, 4]) < 0.1  # 1 of 24 orders
        True
    """

    def standard(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        ranks = np.apply_along_axis(_ranks, -1, values)
        ranks = ranks - ranks.mean(-1, keepdims=True)
        return np.asarray(ranks / np.linalg.norm(ranks, axis=-1, keepdims=True))

    x, target = standard(np.asarray(predictors, float)), standard(np.asarray(y, float))
    generator = np.random.default_rng(seed)
    shuffled = generator.permuted(np.tile(target, (shuffles, 1)), axis=1)
    reached = (shuffled @ x.T).max(1) >= (x @ target).max() - 1e-12
    return float((reached.sum() + 1) / (shuffles + 1))


@dataclass(frozen=True)
class Rule:
    """Thresholds on JS0; a rule made only from architectures that need Adam, or only from others, decides nothing."""

    fine_below: float
    needed_above: float

    @classmethod
    def of(cls, subjects: Sequence[Subject]) -> Rule:
        """Return the widest thresholds that no subject contradicts."""
        needing = [s.js0 for s in subjects if s.needs_adam]
        fine = [s.js0 for s in subjects if not s.needs_adam]
        if not needing or not fine:
            return cls(-math.inf, math.inf)
        return cls(min(needing), max(fine))

    def decide(self, js0: float) -> str:
        """Return SGD_FINE, ADAM_NEEDED or UNDECIDED."""
        below, above = js0 < self.fine_below, js0 > self.needed_above
        if below == above:  # between the thresholds, or on both sides where they overlap
            return UNDECIDED
        return SGD_FINE if below else ADAM_NEEDED


@dataclass(frozen=True)
class Calibration:
    """Measured architectures and the rule they give.

    Attributes:
        subjects: the architectures.
        made: how they were measured: settings and versions.
    """

    subjects: tuple[Subject, ...]
    made: Mapping[str, Any]

    @cached_property
    def rule(self) -> Rule:
        """The rule of all subjects."""
        return Rule.of(self.subjects)

    @cached_property
    def correlation(self) -> Correlation:
        """Rank correlation of JS0 and gap."""
        columns = zip(*((s.js0, s.gap, s.family) for s in self.subjects))
        return rank_correlation(*columns)

    @cached_property
    def leave_one_out(self) -> dict[str, tuple[str, bool]]:
        """Name -> decision of the rule made from all other families, and whether Adam is needed."""
        return {
            s.name: (Rule.of([o for o in self.subjects if o.family != s.family]).decide(s.js0), s.needs_adam)
            for s in self.subjects
        }

    @property
    def num_decided(self) -> int:
        """Number of subjects on which the rule of the other families decides."""
        return sum(said != UNDECIDED for said, _ in self.leave_one_out.values())

    @property
    def num_wrong(self) -> int:
        """Number of wrong ones among these decisions."""
        return sum(said == (SGD_FINE if needs else ADAM_NEEDED) for said, needs in self.leave_one_out.values())

    @property
    def failure(self) -> str:
        """Why JS0 allows no decision; "" if the rule holds."""
        if self.rule.needed_above == math.inf:
            every = "needs" if self.subjects[0].needs_adam else "does without"
            return f"every calibrated architecture {every} Adam, so nothing tells them apart"
        reasons = []
        if self.correlation.lower <= 0:
            reasons.append("the rank correlation of JS0 and gap may be zero or negative")
        if self.num_wrong > MOST_WRONG * self.num_decided:
            reasons.append("the rule is wrong too often about families it was not made from")
        if self.num_decided < LEAST_DECIDED * len(self.subjects):
            reasons.append("the rule rarely decides about families it was not made from")
        return ", and ".join(reasons)

    def __str__(self) -> str:
        families = len({s.family for s in self.subjects})
        try:
            correlation = str(self.correlation)
        except ValueError:
            correlation = "undefined"
        return (
            f"calibration: n = {len(self.subjects)} architectures of {families} families; rank correlation of JS0 and "
            f"gap {correlation}; leaving one family out, the rule decides on {self.num_decided} and is wrong about "
            f"{self.num_wrong} of them"
        )

    def to_json(self) -> str:
        """Return the text that from_json reads."""
        content = {"subjects": [asdict(s) for s in self.subjects], "made": dict(self.made)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Return the calibration of a text of to_json."""
        content = json.loads(text)
        return cls(tuple(Subject(**entry) for entry in content["subjects"]), content["made"])


@cache
def shipped_calibration() -> Calibration:
    """Return the calibration shipped with the package, a result of `blockhess paper calibrate`."""
    return Calibration.from_json((files("blockhess_paper") / "data" / "calibration.json").read_text())
