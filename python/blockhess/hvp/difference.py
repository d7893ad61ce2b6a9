"""Hessian-vector products by central differences of the gradient, which need no second derivative.

    H_l v = (g_l(w + e v) - g_l(w - e v)) / 2e + O(e^2),   g_l = dL / dw_l

Small steps e have large rounding errors, large ones large truncation errors. For every block, a few steps are compared
along a random vector, and the one with the smallest error is used. Parameters are replaced, never written to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess.hvp.differences import block_norm, flattened, moved, rms, unit_vector
from blockhess.hvp.operator import Column, norm
from blockhess.problem.problem import Problem

# Steps relative to the parameters, as powers of the machine epsilon, in increasing order. Without further knowledge,
# 1/3 has the smallest error, eps^(2/3) relative to the product.
POWERS = (6 / 12, 5 / 12, 4 / 12, 3 / 12)
USUAL = 2
# Parameters that are nearly zero, such as new biases, move relative to this share of the usual ones.
FLOOR = 0.1


@dataclass(frozen=True)
class Step:
    """The step of a block, and the product with the random unit vector v along which it was chosen.

    Attributes:
        size: of a step along v.
        norm: |H_l v|, for the next larger step.
        error: norm of the difference between the products of these two steps.
        gradient_error: norm of the rounding error of the gradient.
    """

    size: float
    norm: float
    error: float
    gradient_error: float


class DifferenceEngine:
    """Products by differences of gradients, one vector at a time; each takes two gradients.

    Args:
        problem: model, loss, data, blocks.
        retain: not used; no graph is kept.

    Raises:
        ValueError: a parameter is float16 or bfloat16, whose rounding hides the steps.
    """

    name = "difference"
    capturable = False

    def __init__(self, problem: Problem, retain: bool = False) -> None:
        for name, parameter in problem.parameters.items():
            if parameter.dtype.itemsize < 4:
                raise ValueError(
                    "spectrum: dtype must be torch.float32 or torch.float64 for engine='difference', got "
                    f"{parameter.dtype} of {name!r}, whose rounding hides the steps"
                )
        self._problem, self._index, self._rms = problem, 0, rms(problem)
        self._steps: dict[int, Step] = {}

    def prepare(self, index: int) -> None:
        self._index = index

    def multiply(self, columns: Sequence[Column], share: float) -> Iterator[int]:
        for column in columns:
            size = self.step(column.number).size
            for vector, into in zip(column.vectors, column.products):
                length = norm(vector)
                if not math.isfinite(length):
                    into.fill_(math.nan)
                elif length:
                    step = size * _spread(vector, length) / length
                    into.add_(self._difference(self._index, column.number, vector, step), alpha=share / (2 * step))
                yield 1

    def step(self, number: int) -> Step:
        """Return the step of block `number`, which does not depend on the vectors to be multiplied."""
        if number not in self._steps:
            self._steps[number] = self._chosen(number)
        return self._steps[number]

    def _chosen(self, number: int) -> Step:
        problem, v = self._problem, unit_vector(self._problem, number)[0]
        sizes = [problem.eps**power * block_norm(problem, number, self._rms, FLOOR) for power in POWERS]
        found: list[Step] = []
        product, changes = v, [0.0]
        for i, size in enumerate(sizes):
            before = product  # of the last step; that of the step before is freed
            product = self._difference(0, number, v, size).div_(2 * size)
            if i == 0:
                continue
            changes.append(norm(before.sub_(product)))
            # Rounding errors fall with the step. Those of two steps may cancel, in small blocks at least.
            error = max(changes[-1], changes[-2] * sizes[i - 2] / sizes[i - 1] if i > 1 else 0.0)
            found.append(
                Step(sizes[i - 1], norm(product), error if math.isfinite(error) else math.inf, changes[1] * sizes[0])
            )
            if error > 2 * min(step.error for step in found):
                break
        return min(found, key=lambda step: (step.error, abs(found.index(step) - USUAL)))

    def _difference(self, index: int, number: int, v: Tensor, step: float) -> Tensor:
        """Return g_l(w + step * v) - g_l(w - step * v) of a batch, (dim,); shards are subtracted before they meet."""
        found = self._gradient(index, number, v, step)
        for name, g in self._gradient(index, number, v, -step).items():
            found[name] = found[name] - g if name in found else -g
        return flattened(self._problem, number, found)

    def _gradient(self, index: int, number: int, v: Tensor, step: float) -> dict[str, Tensor]:
        problem, block = self._problem, self._problem.blocks[number]
        with moved(problem, block.spread(v, problem.parameters), step):
            loss = problem.evaluate(problem.batches[index])
            inputs = [problem.parameters[name] for name in block.parameters]
            with problem.explained(index):
                found = problem.differentiate(loss, inputs)
        return {name: g.detach() for name, g in zip(block.parameters, found) if g is not None}


def expected_error(problem: Problem) -> str:
    """Return the usual relative error of a product, as text."""
    return f"relative errors of products are about {problem.eps ** (2 / 3):.0e}" + less_error(problem)


def less_error(problem: Problem) -> str:
    """Return what to do for smaller errors."""
    if problem.eps <= torch.finfo(torch.float64).eps:
        return ""
    return "; for less, " + ("convert the model to float64" if problem.is_sharded else "pass dtype=torch.float64")


def _spread(vector: Tensor, length: float) -> float:
    """Return the root of the share of the entries that a vector moves: about 1 if its entries are random.

    Some vectors, such as eigenvectors of an embedding, have a few large entries. Relative to the parameters in these
    places, the step would be large.
    """
    fourth = float(torch.linalg.vector_norm(vector, 4, dtype=torch.float64)) / length
    return min(1.0, math.sqrt(3 / (len(vector) * fourth**4)))
