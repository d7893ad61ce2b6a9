"""Gradient descent, blockwise gradient descent and Adam on quadratics, all trials and learning rates at once.

    GD, BGD     w^{t+1} = w^t - eta_l g^t,  g^t = H w^t
    Adam (2)    w^{t+1} = w^t - eta g^t / |g^0|                        beta_1 = 0, beta_2 = 1
    Adam (3)    w^{t+1} = w^t - eta g^t / s^t                          beta_1 = 0, beta_2 < 1
                (s^t)^2 = (1 - beta_2) sum_{k=1..t} beta_2^{t-k} (g^k)^2 + beta_2^t (g^0)^2

(3) has no bias correction and epsilon = 0; its last term is printed with "beta^t".

Computed in float64 without underflow or overflow: iterates are stored as w = 2^e u with |u| near 1, so gradient norms
of 1e-1000 or, where a rate diverges, 1e+1000 have full relative accuracy, and so have the losses. s is updated by
hypot, which does not square. Norms and losses are returned as logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess_paper.theory.quadratics import Quadratics

LOG_2 = math.log(2.0)

# Steps between rescalings of u to size 1; u leaves the range of float64 only if it grows by 1e38 per step.
RESCALE_EVERY = 8


@dataclass(frozen=True)
class Iterate:
    """w^t = 2^exponent u and its gradient 2^exponent g, of every trial and learning rate.

    Attributes:
        u, g: (n_trials, L, d, n_rates).
        exponent: (n_trials, 1, 1, n_rates).
    """

    u: Tensor
    g: Tensor
    exponent: Tensor

    def log10_gradient_norm(self) -> Tensor:
        """Return log10 |g| (n_trials, n_rates), -inf where the gradient is zero."""
        squares = self.g.square().sum((1, 2))
        return (squares.log() / 2 + self.exponent[:, 0, 0] * LOG_2) / math.log(10)

    def log_loss(self) -> Tensor:
        """Return log (1/2 w' H w), natural, (n_trials, n_rates)."""
        return (0.5 * (self.u * self.g).sum((1, 2))).log() + self.exponent[:, 0, 0] * (2 * LOG_2)


def optimal_rate(problems: Quadratics) -> Tensor:
    """Return 2 / (mu + L) of every trial, GD's best rate, as (n_trials, 1) rates.

    Source: Nesterov 2013; the paper's section 3.2.
    """
    return (2 / (problems.smallest + problems.largest))[:, None]


def blockwise_rate(problems: Quadratics) -> Tensor:
    """Return 1 / lambda_max(H_l) of every trial and block, as (n_trials, L, 1) rates.

    Source: the proof of the paper's Theorem 1.
    """
    return 1 / problems.eigenvalues[..., -1:]


def iterates(problems: Quadratics, rates: Tensor, num_steps: int, *, beta2: float | None = None) -> Iterator[Iterate]:
    """Yield the iterates 0, 1, ..., num_steps.

    Args:
        problems: the trials.
        rates: learning rates, (n_trials or 1, n_rates), or (n_trials or 1, L, n_rates) for one a block.
        num_steps: number of updates.
        beta2: None for (blockwise) gradient descent, 1.0 for equation (2), below 1 for equation (3).

    Yields:
        num_steps + 1 Iterates. Their tensors are not modified afterwards.

    Raises:
        ValueError: rates or beta2 are invalid, or an entry of Adam's first gradient is zero.

    Example:
        >>> from blockhess_paper.theory.quadratics import case
        >>> problems = case(3, num_trials=2)
        >>> *_, last = iterates(problems, optimal_rate(problems), 100)
        >>> last.log10_gradient_norm().shape
        torch.Size([2, 1])
    """
    if rates.ndim not in (2, 3) or not bool(((rates > 0) & rates.isfinite()).all()):
        raise ValueError(
            "iterates: rates must have shape (n_trials, n_rates) or (n_trials, L, n_rates) and be positive, got shape "
            f"{tuple(rates.shape)} from {rates.min().item():g} to {rates.max().item():g}"
        )
    if beta2 is not None and not 0 < beta2 <= 1:
        raise ValueError(f"iterates: beta2 must be in (0, 1], got {beta2}")
    rate = rates.double()[:, None, None] if rates.ndim == 2 else rates.double()[:, :, None]
    start = problems.start[..., None]
    u = start.expand(*start.shape[:3], rates.shape[-1])
    exponent = torch.zeros(u.shape[0], 1, 1, u.shape[-1], dtype=torch.float64)
    g = problems.hessian @ u
    s = g.abs()
    if beta2 is not None and bool((s == 0).any()):
        raise ValueError("iterates: Adam with epsilon = 0 needs a first gradient without zeros (Assumption 1)")
    yield Iterate(u, g, exponent)

    for t in range(1, num_steps + 1):
        u = u - rate * (g if beta2 is None else g / s)
        if t % RESCALE_EVERY == 0:
            shift = _exponent_of(u.abs().amax((1, 2), keepdim=True))
            u = u * torch.exp2(-shift)
            exponent = exponent + shift
        g = problems.hessian @ u
        if beta2 is not None and beta2 < 1:
            s = torch.hypot(math.sqrt(beta2) * s, math.sqrt(1 - beta2) * (g * torch.exp2(exponent)))
        yield Iterate(u, g, exponent)


def _exponent_of(size: Tensor) -> Tensor:
    """Return floor(log2(size)), 0 where that is not finite."""
    return torch.nan_to_num(size.log2().floor(), nan=0.0, posinf=0.0, neginf=0.0)


@dataclass(frozen=True)
class RateSearch:
    """Results of a grid search over learning rates.

    Attributes:
        rates: (n_rates,) the grid.
        final: (n_trials, n_rates) log10 of the last gradient norm over the first.
        best: (n_trials, 1) rate with the smallest last gradient norm of every trial.
        converged: (n_trials,) bool, whether that norm is below the first.
        at_edge: (n_trials,) bool, whether the best rate is the first or last of the grid, so that a better one may lie
            outside.
    """

    rates: Tensor
    final: Tensor
    best: Tensor
    converged: Tensor
    at_edge: Tensor


def search_rate(problems: Quadratics, rates: Tensor, num_steps: int, *, beta2: float) -> RateSearch:
    """Run Adam with every rate of a grid and choose the best for every trial.

    Args:
        problems: the trials.
        rates: (n_rates,) ascending.
        num_steps: updates after which the gradient norms are compared.
        beta2: see iterates.

    Raises:
        ValueError: rates is not an ascending grid.

    Example:
        >>> from blockhess_paper.theory.quadratics import case
        >>> search_rate(case(3), torch.logspace(-3, 0, 10), 500, beta2=1.0).converged.tolist()
        [True]
    """
    if rates.ndim != 1 or len(rates) == 0 or not bool((rates.diff() > 0).all()):
        raise ValueError(f"search_rate: rates must have shape (n_rates,) and ascend, got {rates.tolist()}")
    rates = rates.double()
    first = last = None
    for last in iterates(problems, rates[None], num_steps, beta2=beta2):
        first = first or last
    assert first is not None and last is not None
    final = torch.nan_to_num(last.log10_gradient_norm() - first.log10_gradient_norm(), nan=math.inf)
    value, index = final.min(1)
    return RateSearch(rates, final, rates[index][:, None], value < 0, (index == 0) | (index == len(rates) - 1))
