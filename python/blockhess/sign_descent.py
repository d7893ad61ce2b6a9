"""One-step gain of sign descent over gradient descent.

    R = (|g|_1^2 / s'Hs) / (|g|_2^4 / g'Hg),   s = sign(g),   g, H = gradient and Hessian of the loss over all data

The best step along a direction d decreases a quadratic model of the loss by (g'd)^2 / (2 d'Hd), if d'Hd > 0. R is the
ratio of these decreases for d = s and d = g. It does not change when the loss is multiplied by a constant.

Source: Nocedal and Wright 2006, section 3.3 (the best step of a quadratic model along a line); Bernstein et al. 2018
(sign descent).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from blockhess.hvp import AutogradEngine, BlockOperator, accuracy
from blockhess.hvp.differences import GROWTH
from blockhess.problem.memory import shared_budget
from blockhess.problem.prepare import prepared_problem
from blockhess.run.distributed import Parallel, process_group


@dataclass(frozen=True)
class SignGain:
    """The one-step gain of sign descent over gradient descent, and the numbers that determine it.

    Attributes:
        l1_norm, l2_norm: of the gradient.
        nonzero: number of entries of the gradient that are not zero, the squared norm of its signs.
        sign_curvature: s'Hs / s's along the signs.
        gradient_curvature: g'Hg / g'g along the gradient.
        sign_error, gradient_error: errors of these curvatures by the rounding of Hessian-vector products.
    """

    l1_norm: float
    l2_norm: float
    nonzero: int
    sign_curvature: float
    gradient_curvature: float
    sign_error: float
    gradient_error: float

    @property
    def value(self) -> float:
        """R; NaN if it does not exist."""
        if self.missing:
            return math.nan
        return self._density * self.gradient_curvature / self.sign_curvature

    @property
    def error(self) -> float:
        """Error of R by the rounding of Hessian-vector products."""
        if self.missing:
            return math.nan
        return self.value * (self.sign_error / self.sign_curvature + self.gradient_error / self.gradient_curvature)

    @property
    def missing(self) -> str:
        """Why R does not exist, or ""."""
        if not 0 < self.l2_norm < math.inf:
            return f"the gradient is {'not finite' if self.l2_norm else 'zero within its rounding error'}"
        for along in ("gradient", "sign"):
            curvature, error = getattr(self, f"{along}_curvature"), getattr(self, f"{along}_error")
            if not curvature > error:
                named = "the gradient" if along == "gradient" else "its signs"
                return f"the curvature along {named} is not positive, {curvature:.3g} +- {error:.1g}"
        return ""

    @property
    def _density(self) -> float:
        """|g|_1^2 / (nonzero |g|_2^2), at most 1."""
        return (self.l1_norm / self.l2_norm) ** 2 / self.nonzero

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes, the value, its error and why it is missing as JSON values."""
        return {"value": self.value, "error": self.error, "missing": self.missing, **asdict(self)}

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        if self.missing:
            return f"No one-step gain of sign descent over gradient descent: {self.missing}"
        return (
            f"One-step gain of sign descent over gradient descent = {self.value:.3g} +- {self.error:.1g}: "
            f"density of the gradient {self._density:.3g}, curvature {self.gradient_curvature:.3g} along the gradient "
            f"and {self.sign_curvature:.3g} along its signs"
        )


def sign_gain(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    batchnorm: str = "eval",
    dtype: torch.dtype | None = None,
    matmul_precision: str = "highest",
    memory_budget: int | str | None = None,
    parallel: Parallel = None,
) -> SignGain:
    """Return the one-step gain of sign descent over gradient descent, for all trainable parameters together.

    It takes one gradient and two products with the full Hessian, beside the checks of products that `spectrum` makes.
    An entry of the gradient that is zero but for rounding has the sign of its rounding.

    Args:
        model, data, loss_fn, batchnorm, dtype, matmul_precision, memory_budget, parallel: as for `spectrum`.

    Returns:
        The gain; its value is NaN, and `missing` says why, if the gradient is zero or the curvature along it or its
        signs is not positive beyond its error: then the loss has no best step along that direction.

    Raises:
        ValueError, TypeError, NotImplementedError: as `spectrum`.

    Source: Nocedal and Wright 2006, section 3.3; Bernstein et al. 2018.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> batch = torch.randn(32, 4), torch.randint(3, (32,))
        >>> print(sign_gain(model, batch, torch.nn.CrossEntropyLoss()))
    """
    with process_group(parallel) as ranks:
        budget = shared_budget(memory_budget, model, ranks)
        settings = ("full", batchnorm, dtype, budget, matmul_precision)
        with prepared_problem(model, data, loss_fn, *settings, ranks, "autograd") as (problem, _, fingerprints):
            ranks.agree(
                {"fingerprints": fingerprints, "loss": problem.loss.name, "value of the loss": problem.loss_value}
            )
            engine = AutogradEngine(problem, retain=False)
            checked = ranks.gather(accuracy.measure(problem, engine))[0]
            gradient = accuracy.gradient(problem, checked)
            l1, l2 = (float(torch.linalg.vector_norm(gradient, p, dtype=torch.float64)) for p in (1, 2))
            nonzero = int(gradient.count_nonzero())
            directions = torch.stack([gradient.sign() / max(nonzero, 1) ** 0.5, gradient / (l2 or 1.0)])
            products = BlockOperator(problem, engine)(directions)
            curvatures = [float(torch.dot(d.double(), p.double())) for d, p in zip(directions, products)]
            rounding = GROWTH * torch.finfo(problem.dtype).eps * checked.norms[0]
            error = checked.errors.get(0, rounding) * (1 if problem.loss.averaged else problem.n_batches)
            sizes = [float(p.double().norm()) / (checked.norms[0] or math.inf) for p in products]
            errors = [error * max(size, 1.0) for size in sizes]
            found: list[SignGain] = ranks.gather(SignGain(l1, l2, nonzero, *curvatures, *errors))
    return found[0]
