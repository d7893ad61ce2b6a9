"""One-step gain of sign descent: dense Hessians, line searches, scale of the loss, and directions without a gain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import blockhess
from tests.analysis.test_block_rate_gain import tanh_net
from tests.helpers.dense_hessian import dense_hessian


def dense_ratio(model: nn.Module, loss: Any) -> float:
    """The definition, by torch alone."""
    names = [name for name, _ in model.named_parameters()]
    hessian = dense_hessian(model, loss, names)
    g = torch.cat([part.flatten() for part in torch.autograd.grad(loss(model), list(model.parameters()))])
    s = g.sign()
    return float((g.abs().sum() ** 2 / (s @ hessian @ s)) / (g.norm() ** 4 / (g @ hessian @ g)))


@pytest.mark.parametrize("seed", range(3))
def test_equals_that_of_the_dense_hessian(seed: int) -> None:
    model, (x, y) = tanh_net(seed)
    expected = dense_ratio(model, lambda f: nn.functional.cross_entropy(f(x), y))
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]  # of unequal weight
    for data in ((x, y), batches):
        found = blockhess.sign_gain(model, data, nn.CrossEntropyLoss())
        assert found.value == float(found) == pytest.approx(expected, rel=1e-9)
        assert found.missing == "" and found.error < 1e-9 * expected
    assert all(parameter.grad is None for parameter in model.parameters())
    single = blockhess.sign_gain(model.float(), (x.float(), y), nn.CrossEntropyLoss())
    assert abs(single.value - expected) <= 10 * single.error + 1e-5 * expected  # rounding of the gradient beside H v
    assert str(found).startswith("One-step gain of sign descent over gradient descent = ")


def test_it_is_the_ratio_of_the_best_steps_of_a_quadratic_loss() -> None:
    torch.manual_seed(0)
    model = nn.Linear(5, 1).double()
    x = torch.randn(40, 5, dtype=torch.float64) * torch.tensor([10.0, 3, 1, 0.3, 0.1], dtype=torch.float64)
    y = torch.randn(40, 1, dtype=torch.float64)
    start = nn.functional.mse_loss(model(x), y)
    grads = torch.autograd.grad(start, list(model.parameters()))
    decreases = []
    for directions in ([g.sign() for g in grads], grads):

        def along(rate: float, directions: Any = directions) -> float:
            w, b = (p.detach() - rate * d for p, d in zip(model.parameters(), directions))
            return float(nn.functional.mse_loss(x @ w.T + b, y))

        low, high = 0.0, 10.0  # golden-section search of a convex function
        for _ in range(200):
            a, c = low + 0.382 * (high - low), low + 0.618 * (high - low)
            low, high = (low, c) if along(a) < along(c) else (a, high)
        decreases.append(start.item() - along(low))
    found = blockhess.sign_gain(model, (x, y), nn.MSELoss())
    assert found.value == pytest.approx(decreases[0] / decreases[1], rel=1e-6)


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_of_the_loss(factor: float) -> None:
    model, (x, y) = tanh_net()
    expected = blockhess.sign_gain(model, (x, y), nn.CrossEntropyLoss()).value
    found = blockhess.sign_gain(model, (x, y), lambda m, b: factor * nn.functional.cross_entropy(m(b[0]), b[1]))
    assert found.value == pytest.approx(expected, rel=1e-9)


class Point(nn.Module):
    """A loss of two numbers."""

    def __init__(self, a: float, b: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([a, b]))


def two(loss: Any, a: float, b: float) -> blockhess.SignGain:
    return blockhess.sign_gain(Point(a, b), torch.ones(1), lambda m, batch: loss(*m.w))


@pytest.mark.parametrize(
    ("loss", "at", "why"),
    [
        (lambda a, b: a**2 + b**2, (0.0, 0.0), "the gradient is zero within its rounding error"),
        (lambda a, b: -(a**2) - b**2, (1.0, 2.0), "the curvature along the gradient is not positive, -2"),
        (lambda a, b: 3 * a + b + 0 * a * b, (1.0, 2.0), "the curvature along the gradient is not positive, 0"),
        # H = diag(2, -8), g = (12, 4): positive along g, negative along (1, 1)
        (
            lambda a, b: a**2 - 4 * b**2 + 10 * a + 12 * b,
            (1.0, 1.0),
            "the curvature along its signs is not positive, -3",
        ),
    ],
)
def test_no_gain_exists(loss: Any, at: tuple[float, float], why: str) -> None:
    found = two(loss, *at)
    assert math.isnan(found.value) and math.isnan(found.error) and found.missing.startswith(why)
    assert str(found) == f"No one-step gain of sign descent over gradient descent: {found.missing}"


@pytest.mark.parametrize("measured", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_curvature_of_rounding_is_none(seed: int, measured: bool) -> None:
    """H = 2 u u' with u's = 0 but for rounding, where the loss can be computed in float64, and where it cannot."""

    class Valley(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(50))

    torch.manual_seed(seed)
    u, slope = torch.randn(50), torch.arange(1.0, 51.0)
    u -= u.mean()
    found = blockhess.sign_gain(
        Valley(), u, lambda m, u: (m.w * u).sum() ** 2 + m.w @ (slope.to(u.dtype) if measured else slope)
    )
    assert found.missing.startswith("the curvature along its signs is not positive")
    assert found.gradient_curvature > found.gradient_error > 0 and found.sign_error > 1e-8  # entries of H are about 1


def test_by_hand() -> None:
    """H = diag(2, 200), g = (2, 200): (202^2 / 202) / (40004^2 / 8000008)."""
    found = two(lambda a, b: a**2 + 100 * b**2, 1.0, 1.0)
    assert found.value == pytest.approx(202 / (40004**2 / 8000008), rel=1e-5)
    assert (found.nonzero, found.l1_norm) == (2, 202.0)


def test_half_precision_parameters() -> None:
    model, (x, y) = tanh_net()
    model = model.bfloat16()
    expected = dense_ratio(model.float(), lambda f: nn.functional.cross_entropy(f(x.float()), y))
    found = blockhess.sign_gain(model.bfloat16(), (x.bfloat16(), y), nn.CrossEntropyLoss())
    assert found.value == pytest.approx(expected, rel=0.02)  # the data are rounded to bfloat16
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
