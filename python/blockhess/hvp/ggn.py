"""Products with generalised Gauss-Newton blocks.

    G_l v = J_l^T (d2 loss / dz2) J_l v,   z = model outputs, J_l = dz / dw_l

Positive semidefinite where the loss is convex in z, as cross-entropy and squared error are (Schraudolph 2002). Nothing
larger than the outputs is formed: J v is the derivative of the linear map s -> J^T s, whose graph is built once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockhess.hvp.autograd import second_derivative
from blockhess.problem.problem import Problem


class GaussNewtonEngine:
    """Gauss-Newton products by torch.autograd, one vector at a time.

    Args:
        problem: its loss must be a criterion or that of a Transformers model.
        retain: as in `AutogradEngine`.

    Raises:
        TypeError: the loss is a closure, into which nobody can look.
    """

    name = "ggn"
    rows = 1

    def __init__(self, problem: Problem, retain: bool = True) -> None:
        self._problem, self._retain = problem, retain
        self._kept: dict[int, _Graph] = {}
        self._graph: _Graph | None = None
        problem.outputs(0)  # refuses what it cannot use before any work is done

    def prepare(self, index: int) -> None:
        """As in `Engine`."""
        if index not in self._kept:
            if not self._retain:
                self._kept.clear()
                self._graph = None
            self._kept[index] = _Graph(self._problem, index)
        self._graph = self._kept[index]

    def product(self, number: int, vectors: Tensor) -> Tensor | None:
        """As in `Engine`."""
        problem, graph, block = self._problem, self._graph, self._problem.blocks[number]
        assert graph is not None
        live = [name for name in block.parameters if name in graph.pulled]
        if not live:
            return None
        result = torch.zeros_like(vectors)
        for vector, row in zip(vectors, result):
            tangents = block.spread(vector, self._problem.parameters)
            (pushed,) = second_derivative(
                problem, number, [graph.pulled[name] for name in live], [graph.seed], [tangents[name] for name in live]
            )
            if pushed is None:
                continue
            (curved,) = second_derivative(problem, number, [graph.slope], [graph.outputs], [pushed])
            if curved is None:
                continue
            inputs = [self._problem.parameters[name] for name in live]
            products = second_derivative(problem, number, [graph.outputs], inputs, [curved])
            block.gather({n: p for n, p in zip(live, products) if p is not None}, into=row)
        return result


class _Graph:
    """Of one batch: outputs z, dloss/dz, and s -> J^T s at a seed s."""

    def __init__(self, problem: Problem, index: int) -> None:
        self.outputs, loss = problem.outputs(index)
        slope = problem.differentiate(loss, self.outputs, create_graph=True)[0]
        if slope is None:
            raise TypeError("spectrum: loss_fn must compute the loss from the model's logits for engine='ggn'")
        self.slope = slope
        self.seed = torch.zeros_like(self.outputs, requires_grad=True)
        pulled = problem.differentiate(self.outputs, list(problem.parameters.values()), self.seed, create_graph=True)
        self.pulled = {name: p for name, p in zip(problem.parameters, pulled) if p is not None}
