"""linear_combination: hand numbers, equality with the reference, same bits for any threads and any other rows."""

from __future__ import annotations

import pytest
import torch

from blockhess_ext import ops, reference
from tests.helpers.combination_cases import random_combination

DTYPES = (torch.float32, torch.float64)


@pytest.mark.parametrize("backend", [reference, ops])
def test_hand_numbers(backend):
    out = torch.full((3, 2, 2), 7.0)
    bases = [torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]])]
    coefficients = [torch.tensor([[1.0, -1.0]]), None]
    backend.linear_combination(out, bases, coefficients, [2.0, 0.5], [1, 1])
    assert out.tolist() == [[[0, 0], [0, 0]], [[2.5, -3.5], [7.0, -7.0]], [[1.5, 1.5], [2.0, 2.0]]]
    total = torch.full((3, 2, 1), 7.0)
    backend.linear_combination_sum(total, bases, coefficients, [2.0, 0.5], [1, 1])
    assert total.tolist() == [[[0], [0]], [[-1.0], [0.0]], [[3.0], [4.0]]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", range(0, 600, 100))
def test_equals_reference(first, dtype):
    for seed in range(first, first + 100):
        case = random_combination(seed, dtype)
        got, expected = case.after(ops), case.after(reference)
        assert ((got - expected).abs() <= case.rounding()).all(), seed
