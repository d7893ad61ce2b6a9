"""Shapes, dtypes and layouts in memory that ordinary models rarely have, against autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockhess.hvp import AutogradEngine, BlockOperator, TracedEngine
from blockhess.hvp.traced.rows import Pool
from blockhess.problem.problem import Problem
from tests.helpers.dense_hessian import problem

pytestmark = pytest.mark.usefixtures("float64_models")


class TwoParameters(nn.Module):
    def __init__(self, a: tuple[int, ...], b: tuple[int, ...]) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(a)), nn.Parameter(torch.randn(b))


Function = Callable[[Tensor, Tensor], Tensor]


def problem_of(a: tuple[int, ...], b: tuple[int, ...], function: Function) -> Problem:
    return problem(TwoParameters(a, b), [torch.zeros(1)], lambda model, batch: function(model.a, model.b))


def relative_error(right: BlockOperator, traced: BlockOperator, vectors: Tensor) -> float:
    expected = right(vectors)
    return float((traced(vectors) - expected).norm() / expected.norm())


CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Function]] = {
    "sum to which another block broadcasts": ((4, 1), (4, 6), lambda a, b: ((a.tanh() + b.tanh()).sum(-1) ** 2).sum()),
    "its dimension kept": ((4, 1), (4, 6), lambda a, b: ((a + b).sum(-1, keepdim=True).exp() * b).sum()),
    "padding with a number": ((4, 3), (4, 5), lambda a, b: (F.pad(a, (1, 1), value=2.0).softmax(-1) * b.exp()).sum()),
    "sum over dim=None": ((4, 3), (3, 6), lambda a, b: (torch.sum((a @ b).tanh(), dim=None, keepdim=True) ** 2).sum()),
    "squeeze where it is broadcast": ((3, 1), (3, 3), lambda a, b: (a.exp().expand(3, 3).squeeze(1) * b).exp().sum()),
    "row of padding": (
        (4, 3), (3,), lambda a, b: (F.embedding(torch.tensor([1, 0, 3, 1]), a, 0).tanh().sum(0) * b).exp().sum()
    ),
    "nine dimensions": ((2,) * 8, (2,) * 8, lambda a, b: (a * b.tanh()).exp().sum()),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize(("a", "b", "function"), CASES.values(), ids=CASES)
def test_rare_shapes(a: tuple[int, ...], b: tuple[int, ...], function: Function, rows: int) -> None:
    prepared_problem = problem_of(a, b, function)
    engine = TracedEngine(prepared_problem, rows=rows)
    for numbers in ([0], [1], [0, 1]):
        right = BlockOperator(prepared_problem, AutogradEngine(prepared_problem), numbers)
        traced = BlockOperator(prepared_problem, engine, numbers)
        assert relative_error(right, traced, torch.randn(3, sum(right.dims))) < 1e-12


def test_bfloat16_inside_a_model() -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return ((a @ b).tanh().to(torch.bfloat16).exp().sum(-1) ** 2).double().sum()

    prepared_problem = problem_of((4, 3), (3, 6), function)
    right = BlockOperator(prepared_problem, AutogradEngine(prepared_problem))
    traced = BlockOperator(prepared_problem, TracedEngine(prepared_problem, rows=100))
    assert relative_error(right, traced, torch.randn(3, sum(right.dims))) < 0.05


def test_vectors_that_lie_elsewhere_in_memory_than_at_the_recording() -> None:
    prepared_problem = problem_of((4, 3), (3, 6), lambda a, b: ((a @ b).tanh() ** 2).sum())
    engine, reference = TracedEngine(prepared_problem, rows=100), AutogradEngine(prepared_problem)
    for numbers in ([0, 1], [0], [1, 0]):
        right, traced = (BlockOperator(prepared_problem, e, numbers) for e in (reference, engine))
        for finished in ([0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 1, 0]):  # two vectors, together or apart
            for operator in (right, traced):
                operator.mark_finished(torch.tensor(finished, dtype=torch.bool)[:, None].expand(3, len(numbers)))
            assert relative_error(right, traced, torch.randn(3, sum(right.dims))) < 1e-12


def test_small_buffers_are_used_again() -> None:
    pool = Pool()
    for nbytes in (0, 8, 100, 300, 512):
        pool.give(pool.take(nbytes, torch.device("cpu")))
    assert pool.nbytes == 512


def test_operations_without_a_rule_for_vmap_are_evaluated_row_by_row(capfd: pytest.CaptureFixture[str]) -> None:
    prepared_problem = problem_of((3, 4), (2, 4, 4), lambda a, b: F.bilinear(a.tanh(), a.exp(), b.sin()).exp().sum())
    right, traced = (
        BlockOperator(prepared_problem, engine)
        for engine in (AutogradEngine(prepared_problem), TracedEngine(prepared_problem, rows=100))
    )
    for _ in range(3):
        assert relative_error(right, traced, torch.randn(3, sum(right.dims))) < 1e-12
    assert "performance" not in capfd.readouterr().err
