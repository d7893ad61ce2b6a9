"""How exact the Hessian-vector products are: one random vector a block, compared with another precision.

float32 products are compared with a float64 repeat. float64 products are compared with a float32 repeat, and the
difference scaled by the ratio of the precisions. First batch only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess.engines.autograd import AutogradEngine
from blockhess.engines.ggn import GaussNewtonEngine
from blockhess.engines.operator import Engine
from blockhess.problem import Problem

# A product this far from autograd's, relative to the larger of its own length and 100 times autograd's error, is wrong.
LARGEST_DISAGREEMENT = 1e-2


@dataclass(frozen=True)
class Accuracy:
    """Of every block, for a random unit vector v.

    Attributes:
        norms: |H_l v| in the higher precision. errors: |difference| in the lower one.
    """

    norms: tuple[float, ...]
    errors: tuple[float, ...]

    def is_zero(self, number: int) -> bool:
        """Whether a block cannot be told from zero."""
        return self.norms[number] <= self.errors[number]


class Disagreement(ArithmeticError):
    """An engine's products are not those of autograd."""


def measure(problem: Problem, engine: Engine) -> Accuracy | None:
    """Compare an engine's products with a repeat in another precision.

    Returns:
        None where the model cannot be run in that precision.

    Raises:
        Disagreement: the products of some block are wrong, beyond what its precision explains.
    """
    lower = problem.dtype == torch.float64
    try:
        other = problem.in_dtype(torch.float32 if lower else torch.float64)
        reference: Engine = (GaussNewtonEngine if engine.name == "ggn" else AutogradEngine)(other)
        reference.prepare(0)
        pairs = [_pair(problem, other, engine, reference, number) for number in range(len(problem.blocks))]
    except (RuntimeError, ValueError, TypeError):  # a model that insists on its own precision
        return None
    scale = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if lower else 1.0
    errors = [float((a.double() - b.double()).norm()) * scale for a, b in pairs]
    norms = [float((a if lower else b).norm()) for a, b in pairs]
    if engine.name == "traced":
        _check(problem, engine, errors if not lower else [e / scale for e in errors], norms, pairs)
    if not all(map(_finite, errors)):
        return None
    return Accuracy(tuple(norms), tuple(errors))


def _finite(value: float) -> bool:
    return value - value == 0


def _vector(problem: Problem, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(number)
    v = torch.randn(1, problem.dims[number], dtype=torch.float64, generator=generator)
    unit: Tensor = v / v.norm()
    return unit


def _pair(problem: Problem, other: Problem, engine: Engine, reference: Engine, number: int) -> tuple[Tensor, Tensor]:
    v = _vector(problem, number)
    engine.prepare(0)
    results = []
    for posed, by in ((problem, engine), (other, reference)):
        rows = v.to(posed.dtype).to(posed.device)
        product = by.product(number, rows) if posed.is_used(number) else None
        results.append(torch.zeros_like(rows) if product is None else product)
    return results[0], results[1]


def _check(
    problem: Problem, engine: Engine, errors: list[float], norms: list[float], pairs: list[tuple[Tensor, Tensor]]
) -> None:
    suspects = [l for l, (e, n) in enumerate(zip(errors, norms)) if not e <= LARGEST_DISAGREEMENT * n]
    if not suspects:
        return
    autograd = AutogradEngine(problem)
    autograd.prepare(0)
    for l in suspects:
        rows = _vector(problem, l).to(problem.dtype).to(problem.device)
        own = autograd.product(l, rows)
        own = torch.zeros_like(rows) if own is None else own
        explained = float((own.double() - pairs[l][1].double()).norm())
        if not errors[l] <= max(LARGEST_DISAGREEMENT * norms[l], 100 * explained) and errors[l] > 0:
            raise Disagreement(
                f"products of block {problem.infos[l].name!r} differ from autograd's by {errors[l]:.3g} of {norms[l]:.3g}"
            )
