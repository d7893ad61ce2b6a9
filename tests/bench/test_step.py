"""bench/ops/step.py: expected results of ops, without changing their inputs."""

from __future__ import annotations

import torch

from bench.ops.step import Projection, Step
from tests.bench.cases import TINY


def test_expected_does_not_change_the_inputs():
    step = Step.of(TINY, [3, 17], 2)
    before = step.v_prev.clone()
    expected = step.expected()
    assert torch.equal(step.v_prev, before) and step.error_from(expected) > 0.1
    step.run()
    assert step.error_from(expected) < 1e-5
    projection = Projection.of(TINY, [30, 50], 5, 2)
    expected = projection.expected()
    assert projection.error_from(expected) > 1e-3
    projection.run()
    assert projection.error_from(expected) < 1e-5
