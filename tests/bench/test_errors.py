"""bench/accuracy/errors.py: errors of quadratures."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy.errors import errors


def test_errors_of_the_exact_quadrature_are_zero():
    alpha, beta = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[2.0, 0.0]]).double()  # eigenvalues -1, 3
    l1, w1 = errors(alpha, beta, torch.tensor([-1.0, 3.0]).double())
    assert l1 < 1e-9 and w1 < 1e-12
    l1, w1 = errors(alpha, beta, torch.tensor([-1.0, 4.0]).double())
    assert l1 == pytest.approx(1.0, abs=1e-3) and w1 == pytest.approx(0.5 / 5)
    assert errors(alpha * float("nan"), beta, alpha[0]) == (float("inf"), float("inf"))
