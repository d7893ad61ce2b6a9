"""Products with blocks of the generalized Gauss-Newton matrix.

    G_l v = J_l^T (d2 loss / dz2) J_l v,   z = model outputs, J_l = dz / dw_l

G is positive semidefinite if the loss is convex in z, as cross-entropy and squared error are (Schraudolph 2002). J v is
the derivative of the linear map s -> J^T s, whose graph is built once per batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockhess.hvp.autograd import second_derivative
from blockhess.hvp.operator import PerBatch
from blockhess.problem.problem import Problem


class GaussNewtonEngine:
    """Gauss-Newton products by torch.autograd, one vector at a time.

    Args:
        problem: its loss is a criterion or that of a Transformers model.
        retain: as in `AutogradEngine`.

    Raises:
        TypeError: the loss is a closure, which does not expose the outputs.
    """

    name = "ggn"
    rows = 1

    def __init__(self, problem: Problem, retain: bool = True) -> None:
        self._problem = problem
        self._graphs = PerBatch(lambda index: _Graph(problem, index), retain)
        problem.outputs(0)  # raises for an unsuitable loss before any product

    def prepare(self, index: int) -> None:
        """See `Engine`."""
        self._graphs.select(index)

    def product(self, number: int, vectors: Tensor) -> Tensor | None:
        """See `Engine`."""
        problem, graph, block = self._problem, self._graphs.value, self._problem.blocks[number]
        live = [name for name in block.parameters if name in graph.pullback]
        if not live:
            return None
        pullback = [graph.pullback[name] for name in live]
        inputs = [problem.parameters[name] for name in live]
        result = torch.zeros_like(vectors)
        for vector, row in zip(vectors, result):
            tangents = block.spread(vector, problem.parameters)
            directions = [tangents[name] for name in live]
            (jv,) = second_derivative(problem, number, pullback, [graph.cotangent], directions)
            if jv is None:
                continue
            (hjv,) = second_derivative(problem, number, [graph.slope], [graph.outputs], [jv])
            if hjv is None:
                continue
            products = second_derivative(problem, number, [graph.outputs], inputs, [hjv])
            block.gather(dict(zip(live, products)), into=row)
        return result


class _Graph:
    """Outputs z of one batch, slope = dloss/dz, and pullback = J^T s as a function of the cotangent s."""

    def __init__(self, problem: Problem, index: int) -> None:
        self.outputs, loss = problem.outputs(index)
        slope = problem.differentiate(loss, self.outputs, create_graph=True)[0]
        if slope is None:
            raise TypeError("spectrum: loss_fn must compute the loss from the model's logits for engine='ggn'")
        self.slope = slope
        self.cotangent = torch.zeros_like(self.outputs, requires_grad=True)
        parameters = problem.parameters
        found = problem.differentiate(self.outputs, list(parameters.values()), self.cotangent, create_graph=True)
        self.pullback = {name: p for name, p in zip(parameters, found) if p is not None}
