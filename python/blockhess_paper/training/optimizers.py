"""The paper's Algorithms 1, 2 and 3 as torch optimizers.

    SGD     m^t = beta_1 m^{t-1} + g,  w -= eta m^t                                          Algorithm 1
    AdamW   w -= eta lambda w;  m, v averages of g, g^2 from 0;                              Algorithm 2
            w -= eta m^ / (sqrt(v^) + eps),  m^ = m / (1 - beta_1^t),  v^ = v / (1 - beta_2^t)
    Adam    m^0 = g^0, v^0 = (g^0)^2;  w -= eta m^t / (sqrt(v^t) + eps)                      Algorithm 3

The first two are torch.optim.SGD and torch.optim.AdamW. The last lines of Algorithms 2 and 3 are printed as
"w^{t+1} = w^{t+1} - ..."; in Algorithm 2 this is the decayed w, in Algorithm 3 a misprint of w^t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from blockhess_ext.arguments import choice

# "beta_1 = 0.9 for SGD"; PyTorch's defaults for Adam.
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


class AdamUncorrected(Optimizer):
    """Adam without bias correction, with averages initialized by the first gradient.

    Args:
        params: parameters or param groups.
        lr: eta.
        betas, eps: beta_1, beta_2, epsilon.

    Raises:
        ValueError: lr, a beta or eps is invalid.

    Source: Zhang et al. 2024, Algorithm 3.

    Example:
        >>> w = torch.tensor([1.0], requires_grad=True)
        >>> optimizer = AdamUncorrected([w], lr=0.1)
        >>> w.square().sum().backward()
        >>> optimizer.step()
        >>> w.item()  # the first step is eta times the sign
        0.899999...
    """

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (BETA1, BETA2), eps: float = EPSILON
    ) -> None:
        if not (0 < lr < math.inf and eps >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(
                f"AdamUncorrected: lr must be positive, eps not negative and betas in [0, 1), got {lr}, {eps}, {betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """Make one step; parameters without a gradient are not changed."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for w in group["params"]:
                if w.grad is None:
                    continue
                state = self.state[w]
                if not state:
                    state["m"], state["v"] = w.grad.clone(), w.grad.square()
                state["m"].lerp_(w.grad, 1 - beta1)
                state["v"].mul_(beta2).addcmul_(w.grad, w.grad, value=1 - beta2)
                w.addcdiv_(state["m"], state["v"].sqrt().add_(group["eps"]), value=-group["lr"])
        return loss


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda params, lr, weight_decay, beta2: torch.optim.SGD(params, lr=lr, momentum=BETA1),
    "AdamW": lambda params, lr, weight_decay, beta2: torch.optim.AdamW(
        params, lr=lr, betas=(BETA1, beta2), eps=EPSILON, weight_decay=weight_decay
    ),
    "Adam": lambda params, lr, weight_decay, beta2: AdamUncorrected(params, lr=lr, betas=(BETA1, beta2)),
}


def make_optimizer(
    name: str,
    params: Iterable[Tensor] | Iterable[dict[str, Any]],
    rate: float,
    weight_decay: float = 0.0,
    beta2: float = BETA2,
) -> Optimizer:
    """Return Algorithm 1 ("SGD"), 2 ("AdamW") or 3 ("Adam"); only AdamW decays weights, SGD has no beta2.

    Raises:
        ValueError: name is unknown, or rate is not positive.

    Example:
        >>> make_optimizer("SGD", torch.nn.Linear(2, 2).parameters(), 0.1).defaults["momentum"]
        0.9
    """
    choice("name", name, OPTIMIZERS, op="make_optimizer")
    if not 0 < rate < math.inf:
        raise ValueError(f"make_optimizer: rate must be positive, got {rate}")
    return OPTIMIZERS[name](params, lr=rate, weight_decay=weight_decay, beta2=beta2)
