"""Does heterogeneity predict how far SGD falls behind AdamW? Measured architectures, and what may be concluded.

    gap  = (SGD's final loss - AdamW's) / (initial loss - AdamW's), both at their best rates
    rule = "SGD fine" below every JS0 at which Adam was needed, "Adam needed" above every JS0 at which SGD was fine

Between the two, and everywhere if the rule does not hold, the answer is "undecided". It holds where the rank
correlation of JS0 and gap is above zero over the whole bootstrap interval, and the rule, made without a family, decides
and is right about that family's members often enough. No probability is made of fifteen points.
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

# Adam is needed where SGD gives away more than this share of what AdamW gains.
NEEDED_GAP = 0.1

# The rule holds if it is wrong about at most this share of the members it decides on, and decides on this share.
MOST_WRONG, LEAST_DECIDED = 0.1, 0.3

RESAMPLES, CONFIDENCE = 2000, 0.95


def gap(initial: float, sgd: float, adamw: float) -> float:
    """Return the share of AdamW's gain that SGD does not make; below 0 where SGD ends lower.

    Raises:
        ValueError: AdamW gained nothing, so there is no share of it.

    Example:
        >>> gap(initial=2.0, sgd=1.5, adamw=1.0)
        0.5
    """
    if not adamw < initial:
        raise ValueError(f"gap: AdamW's final loss must be below the initial {initial:.6g}, got {adamw:.6g}")
    return (sgd - adamw) / (initial - adamw)


@dataclass(frozen=True)
class Subject:
    """A measured architecture: its gap, averaged over seeds, and JS0 at initialisation in the default definition."""

    name: str
    family: str
    gap: float
    js0: float

    @property
    def needs_adam(self) -> bool:
        """Whether SGD gave away more than NEEDED_GAP."""
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
    """Correlate ranks, ties at their mean rank, and resample whole families with replacement.

    Members of a family are no independent observations, so a family is drawn or left out as one. Resamples in which
    all x or all y are equal have no correlation and are drawn again.

    Args:
        x, y: as many values each.
        families: what is drawn together, a name a value.

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
    """Pearson's correlation of the ranks."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Ranks from 1, ties at their mean rank: scipy.stats.rankdata, whose import takes a second."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray[Any, Any] = (counts.cumsum() - (counts - 1) / 2)[place]
    return ranks


def chance_of_best(
    predictors: Sequence[Sequence[float]], y: Sequence[float], *, shuffles: int = 10_000, seed: int = 0
) -> float:
    """Return how often shuffled y has as large a rank correlation with the best of the predictors as y itself.

    What a best chosen afterwards among many is worth: the p-value of the maximum, by permutation; members of a family
    are shuffled like any others.

    Args:
        predictors: (n_predictors, n), none constant.
        y: (n,).

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
    """Thresholds on JS0; a rule from architectures of one kind alone decides nothing."""

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
        if below == above:  # between them, or thresholds so far apart that both would hold
            return UNDECIDED
        return SGD_FINE if below else ADAM_NEEDED


@dataclass(frozen=True)
class Calibration:
    """Measured architectures and what follows from them.

    Attributes:
        subjects: the architectures.
        made: how: settings, versions.
    """

    subjects: tuple[Subject, ...]
    made: Mapping[str, Any]

    @cached_property
    def rule(self) -> Rule:
        """The rule of all subjects."""
        return Rule.of(self.subjects)

    @cached_property
    def correlation(self) -> Correlation:
        """Of JS0 and gap."""
        columns = zip(*((s.js0, s.gap, s.family) for s in self.subjects))
        return rank_correlation(*columns)

    @cached_property
    def left_out(self) -> dict[str, tuple[str, bool]]:
        """Name -> what the rule of all other families says of it, and whether it needs Adam."""
        return {
            s.name: (Rule.of([o for o in self.subjects if o.family != s.family]).decide(s.js0), s.needs_adam)
            for s in self.subjects
        }

    @property
    def num_decided(self) -> int:
        """How many subjects the rule without their family decides on."""
        return sum(said != UNDECIDED for said, _ in self.left_out.values())

    @property
    def num_wrong(self) -> int:
        """How many of those it is wrong about."""
        return sum(said == (SGD_FINE if needs else ADAM_NEEDED) for said, needs in self.left_out.values())

    @property
    def broken(self) -> str:
        """Why nothing may be concluded from JS0, or "" where the rule holds."""
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
        """The text `load_calibration` reads."""
        content = {"subjects": [asdict(s) for s in self.subjects], "made": dict(self.made)}
        return json.dumps(content, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what to_json wrote."""
        content = json.loads(text)
        return cls(tuple(Subject(**entry) for entry in content["subjects"]), content["made"])


@cache
def shipped_calibration() -> Calibration:
    """Return the calibration that ships with the package; `blockhess paper calibrate` made it."""
    return Calibration.from_json((files("blockhess_paper") / "data" / "calibration.json").read_text())
