"""FLOPs of products in the plan are those that are counted in products, whatever the blocks span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockhess.hvp.operator import product
from blockhess.models import GPT, GPTConfig
from blockhess.problem.graph import FlopCounter
from blockhess.problem.model_state import fixed_state
from blockhess.run.costs import product_flops
from blockhess.run.plan import make_plan
from tests.helpers.dense_hessian import problem

Network = tuple[nn.Module, tuple[torch.Tensor, torch.Tensor]]


def perceptron() -> Network:
    layers = [layer for width in (16, 24, 24) for layer in (nn.Linear(width, 24), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(24, 8)), (torch.randn(32, 16), torch.randint(8, (32,)))


def convolutional() -> Network:
    layers = [layer for width in (1, 6, 6) for layer in (nn.Conv2d(width, 6, 3, padding=1), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 36, 5))
    return model, (torch.randn(3, 1, 6, 6), torch.randint(5, (3,)))


def language_model() -> Network:
    model = GPT(GPTConfig(vocab_size=24, context=8, num_layers=2, num_heads=2, width=16))
    tokens = torch.randint(24, (4, 8))
    return nn.Sequential(model, nn.Flatten(0, 1)), (tokens, tokens.flatten())


def blocks_of(model: nn.Module, kind: str) -> Any:
    if kind != "layer":
        return kind
    layers: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        layers.setdefault(".".join(name.split(".")[:-2] or name.split(".")[:1]), []).append(name)
    return layers


@pytest.mark.parametrize("engine", ["autograd", "traced", "ggn", "difference"])
@pytest.mark.parametrize("kind", ["parameter", "layer", "full"])
@pytest.mark.parametrize("make", [perceptron, convolutional, language_model])
def test_the_plan_has_the_flops_of_its_products(make: Callable[[], Network], kind: str, engine: str) -> None:
    torch.manual_seed(0)
    model, data = make()
    with fixed_state(model):
        posed = problem(model, data, nn.CrossEntropyLoss(), blocks_of(model, kind))
        plan, made = make_plan(
            posed, engine=engine, num_probes=2, num_steps=3, basis_dims=[0] * len(posed.dims), budget=2**30
        )
        made = made or plan.make(posed)
        made.prepare(0)
        counted = 0
        for number, dim in enumerate(posed.dims):
            product(made, number, torch.randn(1, dim))  # chooses the step of a difference
            with FlopCounterMode(display=False) as counter:
                product(made, number, torch.randn(1, dim))
            counted += 2 * min(3, dim) * counter.get_total_flops()
    # Biases of convolutions take products in a trace that are not counted.
    assert plan.flops == pytest.approx(counted, rel=0.2 if make is convolutional else 1e-9)


def test_the_flops_by_hand() -> None:
    posed = problem(*perceptron(), nn.CrossEntropyLoss(), "full")
    first, others = 2 * 32 * 16 * 24, 2 * 32 * (24 * 24 + 24 * 24 + 24 * 8)
    assert posed.forward_flops == first + others
    assert product_flops(posed, "traced", True) == [2 * first + 6 * others]
    assert product_flops(posed, "difference", False) == [2 * (first + others) + 2 * first + 4 * others]
    assert product_flops(problem(*perceptron(), nn.CrossEntropyLoss()), "autograd", False)[-2:] == [
        2 * 2 * 32 * 24 * 8,
        0,
    ]


def test_a_model_without_matrix_products_has_a_time_nevertheless() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.w * x

    posed = problem(Scale(), (torch.randn(4, 3), torch.randn(4, 3)), nn.MSELoss())
    plan, _ = make_plan(posed, engine="autograd", num_probes=2, num_steps=3, basis_dims=[0], budget=2**30)
    assert plan.flops == 0 and plan.seconds > 0


def test_dependence_follows_memory() -> None:
    w, x = torch.ones(2, 2), torch.ones(2, 2)
    with FlopCounter([w]) as counter:
        into = torch.zeros(2, 2)
        into[0].copy_(w.t()[0])  # through a view of w, into a view
        (into @ x) @ (x @ x)
        torch.addmm(w, x, x)  # the summand is no factor
        torch.zeros(2, 2) @ x  # memory that was freed and used again
    assert counter.by_factors == {(False, 1, 0): 32, (False, 0, 0): 48}
    assert counter.total == 80
