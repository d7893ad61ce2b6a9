"""A product costs little more than twice the forward pass downstream of its block.

    floor = 2 x the forward FLOPs downstream of the block: tangents forward to the loss, adjoints back to the block

A product with a weight below the block has a tangent and an adjoint: 2 of its forward products. A product of two
activations that both move (attention's q k^T and p v) is bilinear: 2 for the tangent, and for its two adjoints 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from blockhess.hvp import AutogradEngine, Engine, TracedEngine
from blockhess.hvp.operator import product
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig
from blockhess.problem.model_state import fixed_state
from blockhess.problem.problem import Problem
from tests.helpers.dense_hessian import problem


class Moving(TorchDispatchMode):
    """Counts the products, of matrices and convolutions, that read something which depends on a block.

    Attributes:
        one, both: forward FLOPs of those that read one such operand, and two.
    """

    def __init__(self, block: Tensor) -> None:
        super().__init__()
        self.one = self.both = 0
        self._moving = {id(block): block}  # kept, so that no id comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves, _ = torch.utils._pytree.tree_flatten((args, kwargs or {}))
        moving = sum(id(leaf) in self._moving for leaf in leaves)
        if moving:
            for result in torch.utils._pytree.tree_flatten(out)[0]:
                if isinstance(result, Tensor):
                    self._moving[id(result)] = result
            if func._overloadpacket in flop_registry:
                flops = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
                if moving == 1:
                    self.one += flops
                else:
                    self.both += flops
        return out


def perceptron() -> Problem:
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8))
    return problem(model, (torch.randn(32, 16), torch.randint(8, (32,))), nn.CrossEntropyLoss())


def residual() -> Problem:
    model = ResNet(ResNetConfig(2, blocks_per_stage=(1, 1), num_classes=4, in_channels=1, stem="small")).eval()
    return problem(model, (torch.randn(2, 1, 8, 8), torch.randint(4, (2,))), nn.CrossEntropyLoss())


def language_model() -> Problem:
    model = GPT(GPTConfig(vocab_size=24, context=8, num_layers=2, num_heads=2, width=16))
    tokens = torch.randint(24, (4, 8))
    return problem(model, (tokens, tokens), lambda m, b: F.cross_entropy(m(b[0]).flatten(0, 1), b[1].flatten()))


def measured(prepared_problem: Problem, engine: Engine, number: int) -> int:
    engine.prepare(0)
    with FlopCounterMode(display=False) as counter:
        product(engine, number, torch.randn(1, prepared_problem.dims[number]))
    return counter.get_total_flops()


def floors(prepared_problem: Problem, number: int) -> tuple[int, int]:
    """The floor, and the floor with bilinear products counted three times."""
    (name,) = prepared_problem.blocks[number].parameters
    with Moving(prepared_problem.parameters[name]) as moving:
        prepared_problem.evaluate(prepared_problem.batches[0])
    return 2 * (moving.one + moving.both), 2 * moving.one + 6 * moving.both


@pytest.mark.parametrize(
    ("make", "autograd"),
    [
        (perceptron, 1.4),
        # torch's second derivative of a convolution computes the weight's adjoint whether or not it is asked for:
        # 1.5 for a whole ResNet18.
        pytest.param(residual, 1.7, marks=pytest.mark.slow),
        pytest.param(language_model, 1.4, marks=pytest.mark.slow),
    ],
)
def test_flops_of_a_product(make: Callable[[], Problem], autograd: float) -> None:
    torch.manual_seed(0)
    prepared_problem = make()
    with fixed_state(prepared_problem.model):
        engines: list[tuple[Engine, float]] = [
            (AutogradEngine(prepared_problem), autograd),
            (TracedEngine(prepared_problem), 1.15),
        ]
        for number, info in enumerate(prepared_problem.infos):
            literal, floor = floors(prepared_problem, number)
            assert literal <= floor <= 1.3 * literal
            assert floor == literal or make is language_model
            for engine, limit in engines:
                assert measured(prepared_problem, engine, number) <= limit * floor, (engine.name, info.name)
        # A late layer is cheap, the first is not, and neither is an embedding that is also the head.
        costs = [measured(prepared_problem, engines[1][0], number) for number in range(len(prepared_problem.blocks))]
        assert min(costs) < costs[0] / 10 and costs[0] == max(costs)


def test_the_floor_by_hand() -> None:
    prepared_problem = perceptron()  # 32 samples, 16 -> 24 -> 24 -> 8
    assert floors(prepared_problem, 0)[0] == 2 * 2 * 32 * (16 * 24 + 24 * 24 + 24 * 8)
    assert floors(prepared_problem, 4)[0] == 2 * 2 * 32 * 24 * 8
