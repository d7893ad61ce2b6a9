"""Hessian-vector products by differentiating the gradient (Pearlmutter 1994), with a retained graph.

    H_l v = d/dw_l <g_l(w), v>,   g_l = dL / dw_l

One backward pass builds the graph of g. The product of block l then traverses only the part between g_l and w_l.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess.hvp.operator import PerBatch
from blockhess.problem.problem import Problem


class AutogradEngine:
    """Products by torch.autograd, one vector at a time.

    Args:
        problem: model, loss, data, blocks.
        retain: keep the graphs of all batches; otherwise rebuild each when its batch is selected.
    """

    name = "autograd"
    rows = 1

    def __init__(self, problem: Problem, retain: bool = True) -> None:
        self._problem = problem
        self._gradients = PerBatch(lambda index: problem.gradients(index, create_graph=True), retain)

    def prepare(self, index: int) -> None:
        """See `Engine`."""
        self._gradients.select(index)

    def product(self, number: int, vectors: Tensor) -> Tensor | None:
        """See `Engine`."""
        block, parameters, gradients = self._problem.blocks[number], self._problem.parameters, self._gradients.value
        # The loss is linear in a parameter whose gradient requires no gradient.
        live = [name for name in block.parameters if name in gradients and gradients[name].requires_grad]
        if not live:
            return None
        outputs = [gradients[name] for name in live]
        inputs = [parameters[name] for name in block.parameters]
        result = torch.zeros_like(vectors)
        for vector, row in zip(vectors, result):
            tangents = block.spread(vector, parameters)
            products = second_derivative(self._problem, number, outputs, inputs, [tangents[name] for name in live])
            block.gather(dict(zip(block.parameters, products)), into=row)
        return result


def second_derivative(
    problem: Problem,
    number: int,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """Return the derivatives of sum_i <outputs_i, directions_i> by the inputs, for block `number`; retain the graph.

    Raises:
        NotImplementedError: an operation in the graph has no second derivative; names it and its module.
    """
    try:
        return problem.differentiate(outputs, inputs, directions, retain_graph=True)
    except RuntimeError as error:
        text = str(error).splitlines()[0]
        if "not implemented" in text or "double backward" in text:
            found = re.search(r"(?:aten::|')(\w+)", text)
            where, advice = problem.locate(found[1] if found else "")
            raise NotImplementedError(
                f"spectrum: block {problem.infos[number].name!r} needs a second derivative that an operation "
                f"{where}lacks ({text}); {advice}"
            ) from error
        raise
