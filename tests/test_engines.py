"""Every engine against dense float64 Hessians, for one tiny model of every kind that people use."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from blockhess.batches import as_batches
from blockhess.blocks import BlockSpec, partition
from blockhess.engines import AutogradEngine, BlockOperator, Engine, TracedEngine
from blockhess.losses import as_loss
from blockhess.model_state import fixed_state, freeze_batch_statistics
from blockhess.problem import Problem
from tests.dense_hessian import dense_hessian
from tests.model_zoo import ZOO, Checkpointed

SEVERAL_ROWS = ("mlp", "attention", "tied embedding", "GroupNorm", "ReLU and max-pooling", "mixture of experts")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@contextmanager
def posed(name: str, blocks: BlockSpec = "parameter") -> Iterator[Problem]:
    """A case of the zoo, parameters and data rounded to float32, so that both precisions have the same Hessian."""
    case = ZOO[name]
    if case.transformers:
        pytest.importorskip("transformers")
    model, data, loss_fn = case.make()
    loss = as_loss(loss_fn)
    model.float().double()
    batches = as_batches(data, pairs=loss.pairs)
    with fixed_state(model, case.batchnorm):
        if case.batchnorm == "frozen-batch-stats":
            freeze_batch_statistics(model, lambda batch: loss(model, batch), batches)
        yield Problem(model, loss, batches, partition(model, blocks).blocks)


def whole_hessian(problem: Problem) -> dict[tuple[str, str], Tensor]:
    """(name, name) -> that part of the dense Hessian of all parameters."""
    names = [name for name in problem.parameters if name in problem.used]

    def loss(call: Any) -> Tensor:
        values = (problem.loss(call, batch)[0] for batch in problem.batches)
        return sum(share * value for share, value in zip(problem.shares, values))  # type: ignore[return-value]

    for module in problem.model.modules():
        if isinstance(module, Checkpointed):  # autograd.functional would run it again with other parameters
            module.run = lambda body, x: body(x)
    dense = dense_hessian(problem.model, loss, names)
    sizes = [problem.parameters[name].numel() for name in names]
    rows = dict(zip(names, dense.split(sizes)))
    return {(a, b): part for a in names for b, part in zip(names, rows[a].split(sizes, dim=1))}


def products(problem: Problem, engine: Engine, vectors: Tensor) -> list[Tensor]:
    """H_l v of every block."""
    result = BlockOperator(problem, engine)(vectors.to(problem.dtype)).double()
    return list(result.split(problem.dims, dim=1))


def errors(problem: Problem, engine: Engine, vectors: Tensor, expected: list[Tensor]) -> list[float]:
    """Of every block, |error| relative to the larger of |H_l v| and the noise level of zero blocks.

    The noise is the rounding of what is added up to zero, which is as large as the products of other blocks.
    """
    dtype = problem.dtype
    largest = max(float(e.norm()) for e in expected)
    noise = 10 * torch.finfo(dtype).eps * largest / TOLERANCE[dtype]
    found = products(problem, engine, vectors)
    return [float((f - e).norm()) / max(float(e.norm()), noise) for f, e in zip(found, expected)]


@pytest.mark.parametrize("name", ZOO)
def test_products_are_those_of_the_dense_hessian(name: str) -> None:
    with posed(name) as problem:
        traced: Engine | None = None if name == "control flow on activations" else TracedEngine(problem)
        vectors = torch.randn(4, sum(problem.dims))
        found = {"autograd": AutogradEngine(problem)}
        several = len(problem.batches) > 1
        # A checkpointed module is run again with the parameters that it has then, not with the converted ones.
        single = None if several or "checkpointing" in name else problem.in_dtype(torch.float32)
        hessian = whole_hessian(problem)
        parts = zip(problem.parameters, vectors.split(problem.dims, dim=1))
        expected = [v @ hessian[n, n] if (n, n) in hessian else torch.zeros_like(v) for n, v in parts]
        # Transformers models compute their loss in float32 whatever their weights are.
        tolerance = TOLERANCE[torch.float32 if ZOO[name].transformers else torch.float64]
        assert max(errors(problem, found["autograd"], vectors, expected)) <= tolerance
        if traced is not None:
            assert max(errors(problem, traced, vectors, expected)) <= tolerance
            if name in SEVERAL_ROWS:
                traced.rows = 3  # four vectors: three, and one filled up
                assert max(errors(problem, traced, vectors, expected)) <= tolerance
        if single is not None:
            assert max(errors(single, AutogradEngine(single), vectors, expected)) <= TOLERANCE[torch.float32]
