"""Hessian-vector products by walking the graph of the gradient (Pearlmutter 1994, with a retained graph).

    H_l v = d/dw_l <g_l(w), v>,   g_l = dL / dw_l

The graph of g is built by one backward pass; each block's product then walks only the part of it between g_l and w_l.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess.problem.problem import Problem


class AutogradEngine:
    """Products by torch.autograd, one vector at a time.

    Args:
        problem: model, loss, data, blocks.
        retain: whether the graphs of all batches are kept; otherwise each is rebuilt when it is needed.
    """

    name = "autograd"
    rows = 1

    def __init__(self, problem: Problem, retain: bool = True) -> None:
        self._problem, self._retain = problem, retain
        self._kept: dict[int, dict[str, Tensor]] = {}
        self._gradients: dict[str, Tensor] = {}

    def prepare(self, index: int) -> None:
        """As in `Engine`."""
        if index not in self._kept:
            # Rebuilding costs a forward and a backward pass, against one product for each of n_blocks x n_probes.
            if not self._retain:
                self._kept.clear()
            self._gradients = {}
            self._kept[index] = self._problem.gradients(index, create_graph=True)
        self._gradients = self._kept[index]

    def product(self, number: int, vectors: Tensor) -> Tensor | None:
        """As in `Engine`."""
        block = self._problem.blocks[number]
        # A gradient that requires none is constant: the loss is linear in this parameter.
        live = [name for name in block.parameters if _varies(self._gradients.get(name))]
        if not live:
            return None
        outputs = [self._gradients[name] for name in live]
        inputs = [self._problem.parameters[name] for name in block.parameters]
        result = torch.zeros_like(vectors)
        for vector, row in zip(vectors, result):
            tangents = block.spread(vector, self._problem.parameters)
            directions = [tangents[name] for name in live]
            products = second_derivative(self._problem, number, outputs, inputs, directions)
            block.gather({n: p for n, p in zip(block.parameters, products) if p is not None}, into=row)
        return result


def second_derivative(
    problem: Problem,
    number: int,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor],
) -> tuple[Tensor | None, ...]:
    """d/d inputs of sum_i <outputs_i, directions_i>, for block `number`, the graph retained.

    Raises:
        NotImplementedError: an operation on the way has no second derivative; names it and its module.
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


def _varies(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.requires_grad
