"""Products with blocks of the generalized Gauss-Newton matrix.

    G_l v = J_l^T (d2 loss / dz2) J_l v,   z = model outputs, J_l = dz / dw_l

G is positive semidefinite if the loss is convex in z, as cross-entropy and squared error are (Schraudolph 2002). J v is
the derivative of the linear map s -> J^T s, whose graph is built once per batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess.hvp.autograd import AutogradEngine, Output, differentiable
from blockhess.problem.problem import Problem


class GaussNewtonEngine(AutogradEngine):
    """Gauss-Newton products by torch.autograd, one vector at a time.

    Args:
        problem: its loss is a criterion or that of a Transformers model.
        retain: as in `AutogradEngine`.

    Raises:
        TypeError: the loss is a closure, which does not expose the outputs.
    """

    name = "ggn"

    def __init__(self, problem: Problem, retain: bool = True) -> None:
        super().__init__(problem, retain)
        problem.outputs(0)  # raises for an unsuitable loss before any product

    @staticmethod
    def _graph(problem: Problem, index: int) -> tuple[dict[str, Output], tuple[Tensor, ...]]:
        """Return J^T s by parameter, and the outputs z, dloss/dz and the cotangent s."""
        outputs, loss = problem.outputs(index)
        with problem.explained(index):
            slope = problem.differentiate(loss, outputs, create_graph=True)[0]
            if slope is None:
                raise TypeError("spectrum: loss_fn must compute the loss from the model's logits for engine='ggn'")
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            pullback = problem.differentiate(outputs, list(problem.parameters.values()), cotangent, create_graph=True)
        found = {n: p for n, p in zip(problem.parameters, pullback) if p is not None}
        return differentiable(found), (outputs, slope, cotangent)

    def _differentiate(
        self, number: int, pullback: Sequence[Output], inputs: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        outputs, slope, cotangent = self._graphs.value[1]
        (jv,) = super()._differentiate(number, pullback, [cotangent], directions)
        (hjv,) = (None,) if jv is None else super()._differentiate(number, [slope], [outputs], [jv])
        return () if hjv is None else super()._differentiate(number, [outputs], inputs, [hjv])
