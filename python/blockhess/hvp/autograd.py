"""Hessian-vector products by differentiating the gradient (Pearlmutter 1994), with a retained graph.

    H_l v = d/dw_l <g_l(w), v>,   g_l = dL / dw_l

One backward pass builds the graph of g. The product of block l then traverses only the part between g_l and w_l.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TypeAlias

from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from blockhess.hvp.operator import Column, PerBatch
from blockhess.problem.batches import first_line
from blockhess.problem.problem import Problem

Output: TypeAlias = Tensor | GradientEdge


def differentiable(tensors: Mapping[str, Tensor]) -> dict[str, Output]:
    """Return the tensors that depend on the parameters, without their values, which no product needs.

    The loss is linear in a parameter whose gradient requires no gradient.
    """
    return {n: t if t.is_leaf else get_gradient_edge(t) for n, t in tensors.items() if t.requires_grad}


class AutogradEngine:
    """Products by torch.autograd, one vector at a time.

    Args:
        problem: model, loss, data, blocks.
        retain: keep the graphs of all batches; otherwise rebuild each when its batch is selected.
    """

    name = "autograd"
    capturable = False

    def __init__(self, problem: Problem, retain: bool = True) -> None:
        self._problem = problem
        self._graphs = PerBatch(partial(self._graph, problem), retain)  # no cycle: graphs are freed with the engine

    @staticmethod
    def _graph(problem: Problem, index: int) -> tuple[dict[str, Output], tuple[Tensor, ...]]:
        """Return the tensors in the graph of a batch that a product differentiates, one per parameter, and others."""
        return differentiable(problem.gradients(index, create_graph=True)), ()

    def prepare(self, index: int) -> None:
        self._graphs.select(index)

    def multiply(self, columns: Sequence[Column], share: float) -> Iterator[int]:
        graph, _ = self._graphs.value
        parameters = self._problem.parameters
        for column in columns:
            block = self._problem.blocks[column.number]
            live = [name for name in block.parameters if name in graph]
            if not live:
                continue
            outputs, inputs = [graph[name] for name in live], [parameters[name] for name in block.parameters]
            for vector, into in zip(column.vectors, column.products):
                tangents = block.spread(vector, parameters)
                products = self._differentiate(column.number, outputs, inputs, [tangents[name] for name in live])
                block.accumulate(dict(zip(block.parameters, products)), into, share)
                yield 1

    def _differentiate(
        self, number: int, outputs: Sequence[Output], inputs: Sequence[Tensor], directions: Sequence[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Return the derivatives of sum_i <outputs_i, directions_i> by the inputs, for block `number`.

        Raises:
            NotImplementedError: an operation in the graph has no second derivative; names it and its module.
        """
        problem, name = self._problem, self._problem.infos[number].name
        try:
            with problem.explained(self._graphs.index, f"have second derivatives in block {name!r}"):
                return problem.differentiate(outputs, inputs, directions, retain_graph=True)
        except (NotImplementedError, ValueError) as error:
            text = first_line(error.__cause__ or error)
            if "not implemented" not in text and "double backward" not in text:
                raise
            found = re.search(r"(?:aten::|')(\w+)", text)
            where, advice = problem.locate(found[1] if found else "")
            raise NotImplementedError(
                f"spectrum: block {name!r} needs a second derivative that an operation {where}lacks ({text}); {advice}"
                + ", or pass engine='difference'" * (self.name == "autograd")
            ) from error.__cause__
