"""bench/ops/torch_rivals.py: the implementations in plain PyTorch equal the ops."""

from __future__ import annotations

import pytest
import torch

from bench.ops.step import Step
from bench.ops.torch_rivals import STEPS, density_by_point, density_in_chunks
from tests.bench.cases import TINY


@pytest.mark.parametrize("name", STEPS)
def test_every_implementation_makes_the_step(name):
    step = Step.of(TINY, [3, 17, 16, 40], 3)
    make, join = STEPS[name]
    advance = make(step.w, step.v, step.v_prev.clone(), step.recurrences.beta[0].clone(), step.layout)
    step.run()
    for _ in range(2):
        torch.testing.assert_close(join(advance(), step.layout, 3), step.v_prev, rtol=1e-4, atol=1e-5)


def test_the_papers_density_loop_is_the_broadcast_formula():
    torch.manual_seed(0)
    nodes, weights = torch.rand(2, 12).double(), torch.rand(2, 12).double()
    arguments = nodes, weights, torch.linspace(0, 1, 7).double(), torch.tensor([0.1, 0.2]).double()
    torch.testing.assert_close(density_by_point(*arguments, 3), density_in_chunks(*arguments))
