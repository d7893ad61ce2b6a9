"""Rounding error of Hessian-vector products, estimated from one random vector per block and the first batch.

float32 products are compared with float64 products. For float64, the difference to float32 products is scaled by the
ratio of the machine epsilons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.ggn import GaussNewtonEngine
from blockhess.hvp.operator import Column, Engine
from blockhess.hvp.traced.engine import TracedEngine
from blockhess.hvp.traced.operations import NotTraceable
from blockhess.problem.problem import Problem


@dataclass(frozen=True)
class Accuracy:
    """Error of the product with a random unit vector v, by index of the block.

    Attributes:
        norms: |H_l v|, computed in float64.
        errors: norm of the error of H_l v.
    """

    norms: Mapping[int, float]
    errors: Mapping[int, float]

    def is_zero(self, number: int) -> bool:
        """Return whether a block is zero within the error."""
        return self.norms[number] <= self.errors[number]


class EngineMismatch(ArithmeticError):
    """The products of an engine differ from those of autograd."""


def measure(problem: Problem, engine: Engine, numbers: Sequence[int] | None = None) -> Accuracy | None:
    """Estimate the error of products with some blocks, by default all. Traced products are also compared with autograd.

    Traced products are made for every block alone, and for all of them together, as in a run.

    Returns:
        None if the model does not run in the other precision.

    Raises:
        EngineMismatch: traced products differ from those of autograd by more than rounding.
        NotTraceable: a traced program does not run.
    """
    numbers = range(len(problem.dims)) if numbers is None else numbers
    try:
        own = _products(problem, engine, numbers)
        alone = {}
        if isinstance(engine, TracedEngine) and engine.rows > 1:
            alone = {l: _products(problem, engine, [l])[l] for l in numbers}
    except RuntimeError as error:
        if not isinstance(engine, TracedEngine) or isinstance(error, NotImplementedError):
            raise
        raise NotTraceable(f"a program fails: {str(error).splitlines()[0]}") from error
    by_autograd = GaussNewtonEngine if engine.name == "ggn" else AutogradEngine
    lower = problem.dtype == torch.float64
    try:
        other = problem.in_dtype(torch.float32 if lower else torch.float64).restricted(numbers)
        repeat = _products(other, by_autograd(other), numbers)
    except (RuntimeError, ValueError, TypeError):  # a model that runs in one precision only
        repeat = None
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if lower else 1.0
    if isinstance(engine, TracedEngine):
        expected = _products(problem, by_autograd(problem.restricted(numbers)), numbers)
        for traced in filter(None, (own, alone)):
            _check(problem, traced, expected, repeat)
    if repeat is None:
        return None
    errors = {l: scale * _distance(own[l], repeat[l]) for l in numbers}
    norms = {l: float((own if lower else repeat)[l].norm()) for l in numbers}
    return Accuracy(norms, errors) if all(map(math.isfinite, errors.values())) else None


def _products(problem: Problem, engine: Engine, numbers: Sequence[int]) -> dict[int, Tensor]:
    """Return H_l v of some blocks, with the same v in every precision."""
    engine.prepare(0)
    columns = []
    for number in numbers:
        v = torch.randn(1, problem.dims[number], dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        vectors = (v / v.norm()).to(problem.device, problem.dtype)
        columns.append(Column(number, vectors, torch.zeros_like(vectors)))
    for _ in engine.multiply([column for column in columns if problem.is_used(column.number)], 1.0):
        pass
    return {column.number: column.products for column in columns}


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm())


def _check(
    problem: Problem, traced: dict[int, Tensor], expected: dict[int, Tensor], repeat: dict[int, Tensor] | None
) -> None:
    # Some models compute part of their loss in float32, whatever the dtype of their parameters.
    eps = torch.finfo(torch.float32).eps
    largest = max(float(e.norm()) for e in expected.values())
    for number, right in expected.items():
        noise = max(eps * largest, 0.0 if repeat is None else _distance(right, repeat[number]))
        error, size = _distance(traced[number], right), float(right.norm())
        if error > eps**0.5 * size + 100 * noise:
            raise EngineMismatch(
                f"products of block {problem.infos[number].name!r} differ from autograd's by {error:.3g}, of {size:.3g}"
            )
