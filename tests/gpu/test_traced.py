"""Products of the traced engine on the GPU equal those on the CPU, also replayed from CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from blockhess.hvp import BlockOperator, TracedEngine
from blockhess.problem.batches import map_tensors
from blockhess.problem.model_state import fixed_state, float32_precision
from blockhess_ext import batched_slq
from tests.gpu import device
from tests.gpu.device import DEVICE, assert_near
from tests.helpers.call_recorder import CallRecorder
from tests.helpers.dense_hessian import problem
from tests.helpers.model_zoo import ZOO
from tests.helpers.tiny_models import labeled

device.require(cuda=False)

NAMES = ("encoder layer", "tied embedding", "BatchNorm residual, batch", "ConvNeXt-like", "mixture of experts")
STEPS = 48
GROWTH = 2**13


class Counting(BlockOperator):
    """Counts its calls."""

    calls = 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        return super().__call__(v)


def operator(made: tuple[nn.Module, Any, Any], where: str, rows: int) -> Counting:
    model, data, loss_fn = made
    batches = data if isinstance(data, list) else [data]
    moved = [map_tensors(lambda t: t.to(where), batch) for batch in batches]
    posed = problem(copy.deepcopy(model).to(where), moved, loss_fn)
    return Counting(posed, TracedEngine(posed, rows=rows))


@pytest.fixture
def default_dtype(dtype):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    yield dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("name", NAMES)
def test_products(name, default_dtype):
    made = ZOO[name].make()
    tolerance = 1e-10 if default_dtype is torch.float64 else GROWTH * torch.finfo(torch.float32).eps
    with fixed_state(made[0], ZOO[name].batchnorm), float32_precision("highest"):
        there, here = operator(made, DEVICE, rows=5), operator(made, "cpu", rows=2)
        v = torch.randn(3, sum(here.dims))
        expected = here(v)
        for _ in range(2):  # the second call repeats the kernels of the first
            got = there(v.to(DEVICE))
            assert got.device.type == DEVICE
            assert_near([got / expected.abs().max().to(DEVICE)], [expected / expected.abs().max()], tolerance)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("batches", [1, 2])
def test_recurrences(graph, batches, monkeypatch):
    torch.manual_seed(0)
    if DEVICE == "cpu":
        monkeypatch.setattr("blockhess_ext.slq.recorder_of", lambda device: CallRecorder())
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    data = [(x.double(), y) for x, y in (labeled(7) for _ in range(batches))]
    made, found = (model, data, nn.CrossEntropyLoss()), []
    for where, replayed in ((DEVICE, graph), ("cpu", False)):
        hvp = operator(made, where, rows=5)
        q = batched_slq(hvp, hvp.dims, num_probes=3, num_steps=STEPS, dtype=torch.float64, device=where,
                        cuda_graph=replayed)  # fmt: skip
        # On a GPU it is known only later that a recurrence has ended.
        assert hvp.hvps >= batches * int(q.steps.sum())
        assert (hvp.calls < int(q.steps.max())) is replayed
        # Moments, since rounding determines the last step of a Krylov space that is nearly exhausted.
        found.append([(q.weights * q.nodes**power).sum(-1) for power in range(4)])
    assert_near(*found, GROWTH * torch.finfo(torch.float64).eps)
