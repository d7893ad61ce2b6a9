"""linear_combination: hand numbers, equality with the reference, same bits for any threads and any other rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from blockhess_ext import ops, reference
from tests.helpers.combination_cases import random_combination

DTYPES = (torch.float32, torch.float64)
FUNCTIONS = (ops.linear_combination, ops.linear_combination_sum)


@pytest.mark.parametrize("backend", [reference, ops])
def test_hand_numbers(backend):
    bases = [torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])]
    terms = bases, [torch.tensor([[1.0, -1.0]]), None], [2.0, 0.5], [1, 1]
    out, total = torch.full((3, 2, 2), math.nan), torch.full((3, 2, 1), math.nan)
    backend.linear_combination(out, *terms)
    backend.linear_combination_sum(total, *terms)
    assert out.tolist() == [[[0, 0], [0, 0]], [[2.5, -3.5], [7.0, -7.0]], [[1.5, 1.5], [2.0, 2.0]]]
    assert total.tolist() == [[[0], [0]], [[-1], [0]], [[3], [4]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(0, 400, 100))
def test_equals_reference(first, dtype):
    for seed in range(first, first + 100):
        case = random_combination(seed, dtype)
        got, expected = case.after(ops), case.after(reference)
        assert ((got - expected).abs() <= case.rounding()).all(), seed


def large(rng: torch.Generator, rows: int = 3) -> tuple[list[Tensor], list[Tensor | None], list[float], list[int]]:
    """Return terms of shape (rows, 70, 1000): a full one, row statistics, a transposed one, a part of the rows."""
    statistics, transposed = torch.randn(rows, 70, 1, generator=rng), torch.randn(rows, 1000, 70, generator=rng).mT
    bases = [
        torch.randn(rows, 70, 1000, generator=rng),
        statistics,
        transposed,
        torch.randn(1, 70, 1000, generator=rng),
    ]
    coefficients = [torch.randn(70, 1000, generator=rng), torch.randn(1, 1000, generator=rng), None, None]
    return bases, coefficients, [1.0, -0.3, 2.0, 0.7], [0, 0, 0, rows - 1]


@pytest.mark.parametrize(("function", "last"), list(zip(FUNCTIONS, (1000, 1))))
def test_same_bits_for_one_and_two_threads(function, last, rng):
    terms, before, results = large(rng), torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(torch.empty(3, 70, last))
        function(results[-1], *terms)
    torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize(("function", "last"), list(zip(FUNCTIONS, (1000, 1))))
def test_a_row_has_the_same_bits_without_the_others(function, last, rng):
    bases, coefficients, scalars, _ = large(rng)
    out = torch.empty(3, 70, last)
    function(out, bases, coefficients, scalars, [0, 0, 0, 2])
    for row in range(3):
        alone = torch.empty(1, 70, last)
        function(alone, bases, coefficients, scalars, [-row, -row, -row, 2 - row])
        assert torch.equal(alone[0], out[row])


def test_out_may_be_a_base(rng):
    bases, coefficients, scalars, first_rows = large(rng)
    for k in (0, 2):  # in the order of out and transposed
        expected = torch.empty_like(bases[k])
        ops.linear_combination(expected, bases, coefficients, scalars, first_rows)
        mine = [x.clone() for x in bases]
        ops.linear_combination(mine[k], mine, coefficients, scalars, first_rows)
        assert torch.equal(mine[k], expected)


def test_terms_beyond_all_rows_are_no_terms():
    out = torch.full((2, 3), math.nan)
    for first in (2, -1, 2**63 - 1, -(2**63)):
        ops.linear_combination(out, [torch.ones(1, 3)], [None], [1.0], [first])
        assert not out.any()


def test_a_sum_of_many_elements_loses_little():
    n = 2**20
    out, base = torch.empty(1, 1), torch.full((1, n), 0.1)
    ops.linear_combination_sum(out, [base], [None], [1.0], [0])
    assert out.item() == pytest.approx(0.1 * n, rel=5e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bases": []}, r"bases must have 1 ... 16 tensors, got 0"),
        ({"scalars": [1.0]}, r"must have the length of bases = 2, got 2, 1 and 2"),
        ({"out": torch.ones(2, 3).expand(5, 2, 3)}, r"out must not be expanded, got stride 0 in dimension 0"),
        ({"out": torch.ones(2, *[1] * 8)}, r"out must have \d ... 8 dimensions, got 9"),
        ({"out": torch.ones(2, 3, 4).half()}, r"vectors must be float32 or float64, got Half"),
        ({"out": torch.ones(2, 3, 4).double()}, r"bases\[0\] must be Double, got Float"),
        ({"bases": [torch.ones(2, 3, 4), torch.ones(3, 4)]}, r"bases\[1\] must have 3 dimensions, got 2"),
        ({"bases": [torch.ones(2, 3, 4), torch.ones(2, 2, 4)]}, r"bases\[1\] must broadcast to rows of shape \(3, 4\)"),
        ({"coefficients": [None, torch.ones(3, 5)]}, r"\[\d\] must broadcast to (rows of )?.*\(3, \d\), got \("),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("function", "last"), list(zip(FUNCTIONS, (4, 1))))
def test_invalid_arguments(function, last, change, message):
    arguments = {
        "out": torch.ones(2, 3, last),
        "bases": [torch.ones(2, 3, 4)] * 2,
        "coefficients": [None] * 2,
        "scalars": [1.0] * 2,
        "first_rows": [0] * 2,
    }
    with pytest.raises(RuntimeError, match=rf"{function.__name__}: .*{message}"):
        function(**(arguments | change))


def test_a_sum_needs_a_last_size_of_1():
    with pytest.raises(RuntimeError, match="linear_combination_sum: out must have 1 as its last size, got 4"):
        ops.linear_combination_sum(torch.ones(2, 4), [torch.ones(2, 4)], [None], [1.0], [0])


@pytest.mark.parametrize("name", ["linear_combination", "linear_combination_sum"])
def test_opcheck(name):
    arguments = torch.ones(2, 1), [torch.ones(2, 1), torch.ones(1, 1)], [None, torch.ones(1)], [1.0, 2.0], [0, 1]
    torch.library.opcheck(getattr(torch.ops.blockhess_ext, name).default, arguments)
