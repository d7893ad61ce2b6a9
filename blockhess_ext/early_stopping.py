"""Early stopping of recurrences whose quadrature and extreme nodes have converged.

    change(m, m') = distance(T_m, T_m') / range of the nodes,    stop when change <= 4/3 tol at two checkpoints in a row
    and |beta_m s_mi| <= tol max |node| for the first and the last node i, s_i the i-th eigenvector of T_m

The distance is Wasserstein-1, or the L1 distance of the densities smoothed with width sigma. For a smooth spectrum the
Gauss rules of m and m' nodes are staircases that differ by range / 3m, and the exact measure is range / 4m from
the finer one: the error is about 3/4 of the change. For a few isolated eigenvalues both vanish together.
Within the residual bound |beta_m s_mi| of node i there is an eigenvalue. With sigma the bounds are not required.

Guarantees: the host never waits for the device; the decision about a recurrence depends on that recurrence alone, not
on the rest of the batch. The interval between two checkpoints is odd: the Gauss rules of a symmetric spectrum have a
node at its center for odd m only, and checkpoints of one parity would miss that difference.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor

from blockhess_ext import ops
from blockhess_ext.recurrences import FINISHED, RUNNING, Recurrences

Rule = tuple[Tensor, Tensor]  # nodes and weights, (n, m) float64 as of ops.tridiag_quadrature

CHANGE_PER_ERROR = 4 / 3

GRID_POINTS_PER_SIGMA = 4
GRID_MARGIN = 5  # in units of sigma, beyond the outer nodes
# Densities are compared at this many grid points of this many recurrences at a time, 32 MiB of a density. The pieces
# of the grid depend on sigma alone, so the decision about a recurrence does not depend on the others.
GRID_PIECE, ROWS_PIECE = 2**14, 2**8


def checkpoint_interval(step: int) -> int:
    """Return the number of steps from one checkpoint to the next: 5, later about an eighth of the steps made."""
    return max(5, step // 8 | 1)


def checkpoints(step: int) -> list[int]:
    """Return the steps up to this one at which convergence is tested.

    Example:
        >>> checkpoints(60)
        [5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 57]
    """
    found = [checkpoint_interval(0)]
    while found[-1] <= step:
        found.append(found[-1] + checkpoint_interval(found[-1]))
    return found[:-1]


def cumulative(x: Tensor) -> Tensor:
    """Return the cumulative sums over the last dimension, by pairwise doubling.

    Unlike `Tensor.cumsum`, this is deterministic on CUDA.

    Example:
        >>> cumulative(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 3., 6.])
    """
    distance = 1
    while distance < x.shape[-1]:
        x = torch.cat([x[..., :distance], x[..., distance:] + x[..., :-distance]], -1)
        distance *= 2
    return x


def wasserstein(a: Rule, b: Rule) -> Tensor:
    """Return the Wasserstein-1 distance of two quadratures, row by row: the area between their distribution functions.

    Example:
        >>> at = lambda x: (torch.tensor([[x]]), torch.ones(1, 1))
        >>> wasserstein(at(1.0), at(3.0))
        tensor([2.])
    """
    nodes, order = torch.cat([a[0], b[0]], -1).sort(-1)
    difference = cumulative(torch.cat([a[1], -b[1]], -1).gather(-1, order))
    return (difference[..., :-1].abs() * nodes.diff(dim=-1)).sum(-1)


def change(a: Rule, b: Rule, sigma: float | None = None) -> Tensor:
    """Return the scale-free distance of two quadratures, row by row; 0 where all nodes coincide.

    Args:
        a, b: nodes and weights, (n, m) each; m may differ.
        sigma: None for the Wasserstein-1 distance as a fraction of the range; else the width of the Gaussian, as a
            fraction of the range, that smooths the densities before their L1 distance is taken.

    Returns:
        (n,) float64.
    """
    low = torch.minimum(a[0].amin(-1), b[0].amin(-1))
    spread = torch.maximum(a[0].amax(-1), b[0].amax(-1)) - low
    unit = [((x - low[:, None]) / torch.where(spread > 0, spread, 1.0)[:, None], w) for x, w in (a, b)]
    if sigma is None:
        return wasserstein(*unit)
    h, reach = sigma / GRID_POINTS_PER_SIGMA, GRID_MARGIN * sigma
    total = torch.zeros_like(low)
    n_points = math.ceil((1 + 2 * reach) / h) + 1
    for first in range(0, n_points, GRID_PIECE):
        points = torch.arange(first, min(first + GRID_PIECE, n_points), dtype=torch.float64, device=low.device)
        for row in range(0, len(low), ROWS_PIECE):
            part = slice(row, row + ROWS_PIECE)
            sigmas = torch.full_like(low[part], sigma)
            densities = [
                ops.gaussian_density(x[part].contiguous(), w[part].contiguous(), points * h - reach, sigmas)
                for x, w in unit
            ]
            total[part] += (densities[0] - densities[1]).abs().sum(-1)
    return total * h


def ends_converged(alpha: Tensor, beta: Tensor, tol: float, rows: Tensor) -> Tensor:
    """Return whether the residual bounds of the first and the last node are at most tol times the largest |node|.

    Args:
        alpha, beta: (n, m) float64.
        tol: see `EarlyStopping`.
        rows: (n,) bool, the recurrences to test, which made all m steps.

    Returns:
        (n,) bool; False for the other recurrences.
    """
    m = alpha.shape[1]
    # Weights are squares of the first components; the last components are the first ones of the reversed matrix.
    couplings = torch.cat([beta[:, : m - 1].flip(-1), torch.zeros_like(beta[:, :1])], -1)
    # The op itself: the function in `ops` waits for the device to check for failures. NaN never passes a test.
    nodes, squares = torch.ops.blockhess_ext.tridiag_quadrature(
        alpha.flip(-1).contiguous(), couplings, torch.where(rows, m, 0)
    )
    bounds = beta[:, m - 1] * torch.maximum(squares[:, 0], squares[:, -1]).sqrt()
    converged: Tensor = rows & (bounds <= tol * nodes.abs().amax(-1))
    return converged


def _has_converged(a: Rule, b: Rule, tol: float, sigma: float | None) -> Tensor:
    return change(a, b, sigma) <= CHANGE_PER_ERROR * tol


def converged_at_end(alpha: Tensor, beta: Tensor, tol: float, sigma: float | None) -> Tensor:
    """Return whether `EarlyStopping` would have stopped recurrences after their last step.

    Args:
        alpha, beta: (n, m) float64, of recurrences that made all m steps.
        tol, sigma: see `EarlyStopping`.

    Returns:
        (n,) bool; False where step m is not a checkpoint.
    """
    n, m = alpha.shape
    steps = checkpoints(m)[-3:]
    if len(steps) < 3 or steps[-1] != m:
        return torch.zeros(n, dtype=torch.bool, device=alpha.device)

    def rule(k: int) -> Rule:
        counts = torch.full((n,), k, device=alpha.device)
        return ops.tridiag_quadrature(alpha[:, :k].contiguous(), beta[:, :k].contiguous(), counts)

    first, second, third = map(rule, steps)
    converged = _has_converged(first, second, tol, sigma) & _has_converged(second, third, tol, sigma)
    return converged if sigma is not None else ends_converged(alpha, beta, tol, converged)


class StoppingRule(Protocol):
    """A rule that ends recurrences before their step limit."""

    def update(self) -> None:
        """Apply the rule; call it once after every step."""

    def tensors(self) -> dict[str, Tensor]:
        """Return the state of the rule by name, without copying."""


class NoEarlyStopping:
    """Let every recurrence make all its steps."""

    def update(self) -> None:
        """See `StoppingRule`."""

    def tensors(self) -> dict[str, Tensor]:
        """See `StoppingRule`."""
        return {}


class EarlyStopping:
    """End the recurrences whose quadrature is within tol of its limit, by two small changes in a row.

    Without sigma, the residual bounds of the extreme nodes must be small too, see `ends_converged`.

    Args:
        recurrences: the recurrences, whose status is updated.
        tol: largest estimated error.
        sigma: see `change`.
        step: steps made so far; the caller then restores `tensors`.
    """

    def __init__(self, recurrences: Recurrences, tol: float, sigma: float | None, step: int = 0) -> None:
        self._recurrences, self._tol, self._sigma = recurrences, tol, sigma
        self._converged = torch.zeros_like(recurrences.status, dtype=torch.bool)
        last = (checkpoints(step) or [0])[-1]
        self._step, self._next = step, last + checkpoint_interval(last)
        empty = (recurrences.norm.new_zeros(recurrences.norm.numel(), last) for _ in range(2))
        self._before: Rule | None = (next(empty), next(empty)) if last else None
        self._tested: Tensor | None = None  # indices of the recurrences in `_before`; None for all

    def update(self) -> None:
        """See `StoppingRule`."""
        self._step += 1
        if self._step < self._next:
            return
        self._next += checkpoint_interval(self._step)
        r = self._recurrences
        running = (r.status == RUNNING).flatten()
        tested = r.running()
        alpha, beta = (table[: self._step].flatten(1) for table in (r.alpha, r.beta))
        steps = torch.where(running, r.steps.flatten(), 0)
        if tested is not None:  # of the others, nothing is read
            alpha, beta, steps = alpha[:, tested], beta[:, tested], steps[tested]
        alpha, beta = alpha.T.contiguous(), beta.T.contiguous()
        # The op itself, as above.
        now: Rule = torch.ops.blockhess_ext.tridiag_quadrature(alpha, beta, steps)
        if self._before is not None:
            converged, before = self._converged.flatten(), self._before
            if tested is not None:
                places = tested if self._tested is None else torch.searchsorted(self._tested, tested)
                before, converged = (before[0][places], before[1][places]), converged[tested]
            found = _has_converged(before, now, self._tol, self._sigma)
            ended = found & converged & (running if tested is None else True)
            if self._sigma is None:
                ended = ends_converged(alpha, beta, self._tol, ended)
            self._converged = self._of_all(found, tested).view_as(self._converged)
            r.status.masked_fill_(self._of_all(ended, tested).view_as(r.status), FINISHED)
        self._before, self._tested = now, tested

    def _of_all(self, x: Tensor, tested: Tensor | None) -> Tensor:
        """Return a tensor of the tested recurrences as one of all, with zeros for the others."""
        if tested is None:
            return x
        return x.new_zeros(self._recurrences.status.numel(), *x.shape[1:]).index_copy_(0, tested, x)

    def tensors(self) -> dict[str, Tensor]:
        """See `StoppingRule`."""
        names = ("nodes_before", "weights_before")
        rule = {name: self._of_all(x, self._tested) for name, x in zip(names, self._before or ())}
        return {"converged": self._converged, **rule}


def stopping_rule(recurrences: Recurrences, tol: float | None, sigma: float | None, step: int = 0) -> StoppingRule:
    """Return the stopping rule for tol; None means no early stopping."""
    return NoEarlyStopping() if tol is None else EarlyStopping(recurrences, tol, sigma, step)
