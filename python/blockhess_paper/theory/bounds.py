"""Bounds on the loss from one iteration to the next, and how often iterates violate them.

lower:  L(w^{t+1}) >= factor L(w^t)        upper:  L(w^{t+1}) <= factor L(w^t)        (L* = 0, since h = 0)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess_paper.theory.descent import Iterate

# Rounding of products with H is eps kappa relative to the loss of the flattest direction. A bound counts as violated
# beyond 64 times that.
TOLERANCE = 64 * torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Bound:
    """A factor for every trial and rate, (n_trials, n_rates) or broadcastable, and whether it bounds from below."""

    factor: Tensor
    lower: bool = False


@dataclass(frozen=True)
class Violations:
    """How often a bound was violated.

    Attributes:
        iterations: number of compared iterations, over all trials and rates.
        broken: number of iterations that violate the bound.
        trials: number of trials (and rates) with at least one violation.
        of: number of trials times rates.
    """

    iterations: int
    broken: int
    trials: int
    of: int

    def __str__(self) -> str:
        return f"{self.broken:,} of {self.iterations:,} iterations ({self.trials:,} of {self.of:,} trials)"


def count_violations(steps: Iterable[Iterate], kappa: Tensor, bounds: Mapping[str, Bound]) -> dict[str, Violations]:
    """Compare the loss of every iteration of every trial with the one before.

    Args:
        steps: iterates of descent.iterates.
        kappa: (n_trials,) condition numbers, to which the tolerance is proportional.
        bounds: name -> bound.

    Returns:
        Name -> violations. Iterations that start at a loss of zero are not compared.

    Example:
        >>> from blockhess_paper.theory.descent import iterates, optimal_rate
        >>> from blockhess_paper.theory.quadratics import case
        >>> problems = case(3)
        >>> one = Bound(torch.ones(1, 1))
        >>> count_violations(iterates(problems, optimal_rate(problems), 10), problems.kappa, {"it descends": one})
        {'it descends': Violations(iterations=10, broken=0, trials=0, of=1)}
    """
    slack = TOLERANCE * kappa[:, None]
    before = None
    compared = 0
    broken: dict[str, Tensor] = {}
    for step in steps:
        loss = step.log_loss()
        if before is not None:
            ratio = (loss - before).exp()
            known = ~ratio.isnan()
            compared += int(known.sum())
            for name, bound in bounds.items():
                low, high = (ratio, bound.factor) if bound.lower else (bound.factor, ratio)
                beyond = known & (high - low > slack)
                broken[name] = broken.get(name, torch.zeros_like(beyond, dtype=torch.int64)) + beyond
        before = loss
    return {
        name: Violations(compared, int(count.sum()), int((count > 0).sum()), count.numel())
        for name, count in broken.items()
    }
