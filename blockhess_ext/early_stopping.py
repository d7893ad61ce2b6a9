"""When a recurrence has made steps enough: its quadrature hardly changes any more.

    change = distance(T_m, T_m') / range of the nodes,   ended where change <= 4/3 tol at two looks in a row

The distance is Wasserstein-1, or that of the densities blurred by sigma, in L1. Where the spectrum is smooth, Gauss
rules of m and m' nodes are staircases that differ by range / 3m, and the truth lies range / 4m from the finer one: 3/4
of the change is an estimate of the error. Where eigenvalues are few, both vanish together.

Promises: no host waits for a device; a recurrence is ended on its own evidence alone, so its result does not depend on
what else is in the batch. An odd number of steps between two looks: symmetric spectra have a node at their centre in
every other rule only, and looks of one parity would not see it move.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from blockhess_ext import ops
from blockhess_ext.recurrences import FINISHED, RUNNING, Recurrences

Rule = tuple[Tensor, Tensor]  # nodes and weights, (n, m) float64 as of ops.tridiag_quadrature

CHANGE_PER_ERROR = 4 / 3

GRID_POINTS_PER_SIGMA = 4
GRID_MARGIN = 5  # sigma beyond the nodes


def steps_between(step: int) -> int:
    """How many steps after this one the next look is: 5, later an eighth of all, so that looking stays cheap."""
    return max(5, step // 8 | 1)


def looks(step: int) -> list[int]:
    """The steps up to this one after which one looks.

    Example:
        >>> looks(60)
        [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 57]
    """
    found = [steps_between(0)]
    while found[-1] <= step:
        found.append(found[-1] + steps_between(found[-1]))
    return found[:-1]


def wasserstein(a: Rule, b: Rule) -> Tensor:
    """Wasserstein-1 distance of two quadratures, row by row: the area between their distribution functions.

    Example:
        >>> at = lambda x: (torch.tensor([[x]]), torch.ones(1, 1))
        >>> wasserstein(at(1.0), at(3.0))
        tensor([2.])
    """
    nodes, order = torch.cat([a[0], b[0]], -1).sort(-1)
    difference = torch.cat([a[1], -b[1]], -1).gather(-1, order).cumsum(-1)
    return (difference[..., :-1].abs() * nodes.diff(dim=-1)).sum(-1)


def change(a: Rule, b: Rule, sigma: float | None = None) -> Tensor:
    """Distance of two quadratures, row by row, free of scale; 0 where all nodes are one.

    Args:
        a, b: nodes and weights, (n, m) each, m as it may be.
        sigma: None for the Wasserstein-1 distance as a share of the range; else the L1 distance of the densities
            blurred by a Gaussian of this share of the range.

    Returns:
        (n,) float64.
    """
    low = torch.minimum(a[0].amin(-1), b[0].amin(-1))
    spread = torch.maximum(a[0].amax(-1), b[0].amax(-1)) - low
    unit = [((x - low[:, None]) / torch.where(spread > 0, spread, 1.0)[:, None], w) for x, w in (a, b)]
    if sigma is None:
        return wasserstein(*unit)
    h, reach = sigma / GRID_POINTS_PER_SIGMA, GRID_MARGIN * sigma
    grid = torch.arange(-reach, 1 + reach + h, h, dtype=torch.float64, device=low.device)
    sigmas = torch.full_like(low, sigma)
    densities = [ops.gaussian_density(x.contiguous(), w.contiguous(), grid, sigmas) for x, w in unit]
    return (densities[0] - densities[1]).abs().sum(-1) * h


def _has_converged(a: Rule, b: Rule, tol: float, sigma: float | None) -> Tensor:
    return change(a, b, sigma) <= CHANGE_PER_ERROR * tol


def settled_at_end(alpha: Tensor, beta: Tensor, tol: float, sigma: float | None) -> Tensor:
    """Whether `Settled` would have ended recurrences after their last step, were they not at their limit.

    Args:
        alpha, beta: (n, m) float64, of recurrences that made all m steps.
        tol, sigma: as of `Settled`.

    Returns:
        (n,) bool; never true where there is no look after step m.
    """
    n, m = alpha.shape
    steps = looks(m)[-3:]
    if len(steps) < 3 or steps[-1] != m:
        return torch.zeros(n, dtype=torch.bool, device=alpha.device)

    def rule(k: int) -> Rule:
        counts = torch.full((n,), k, device=alpha.device)
        return ops.tridiag_quadrature(alpha[:, :k].contiguous(), beta[:, :k].contiguous(), counts)

    first, second, third = map(rule, steps)
    return _has_converged(first, second, tol, sigma) & _has_converged(second, third, tol, sigma)


class Convergence(Protocol):
    """What ends recurrences before their limit."""

    def look(self) -> None:
        """To be called after every step."""

    def tensors(self) -> dict[str, Tensor]:
        """What `look` remembers, by name, not copied."""


class NoEarlyStopping:
    """Lets every recurrence make all its steps."""

    def look(self) -> None:
        """As in `Convergence`."""

    def tensors(self) -> dict[str, Tensor]:
        """As in `Convergence`."""
        return {}


class EarlyStopping:
    """Ends the recurrences whose quadrature is within tol of its limit, as two changes in a row tell.

    Args:
        recurrences: whose status it sets.
        tol: the largest error.
        sigma: see `change`.
        step: steps made; what looks at them left is to be filled into `tensors`.
    """

    def __init__(self, recurrences: Recurrences, tol: float, sigma: float | None, step: int = 0) -> None:
        self._recurrences, self._tol, self._sigma = recurrences, tol, sigma
        self._calm = torch.zeros_like(recurrences.status, dtype=torch.bool)
        last = (looks(step) or [0])[-1]
        self._step, self._next = step, last + steps_between(last)
        empty = (recurrences.norm.new_zeros(recurrences.norm.numel(), last) for _ in range(2))
        self._before: Rule | None = (next(empty), next(empty)) if last else None

    def look(self) -> None:
        """As in `Convergence`."""
        self._step += 1
        if self._step < self._next:
            return
        self._next += steps_between(self._step)
        r = self._recurrences
        running = r.status == RUNNING
        alpha, beta = (table[: self._step].permute(1, 2, 0).flatten(0, 1).contiguous() for table in (r.alpha, r.beta))
        # The op itself, not the function, which waits for the device to say what failed; NaN never counts as calm.
        now: Rule = torch.ops.blockhess_ext.tridiag_quadrature(alpha, beta, torch.where(running, r.steps, 0).flatten())
        if self._before is not None:
            calm = _has_converged(self._before, now, self._tol, self._sigma).view_as(running)
            r.status.masked_fill_(running & calm & self._calm, FINISHED)
            self._calm = calm
        self._before = now

    def tensors(self) -> dict[str, Tensor]:
        """As in `Convergence`."""
        rule = {} if self._before is None else {"nodes_before": self._before[0], "weights_before": self._before[1]}
        return {"calm": self._calm, **rule}


def convergence(recurrences: Recurrences, tol: float | None, sigma: float | None, step: int = 0) -> Convergence:
    """What ends these recurrences; without tol nothing but themselves."""
    return NoEarlyStopping() if tol is None else EarlyStopping(recurrences, tol, sigma, step)
