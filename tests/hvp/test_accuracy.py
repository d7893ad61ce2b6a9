"""The measured error of Hessian-vector products, and the check of one engine against another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockhess
from blockhess.hvp import AutogradEngine, TracedEngine
from blockhess.hvp.accuracy import EngineMismatch, measure
from blockhess.hvp.operator import Column
from tests.helpers.dense_hessian import problem
from tests.helpers.tiny_models import SelfAttention, labeled, mlp


@pytest.mark.parametrize("engine", [AutogradEngine, TracedEngine])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_errors_are_of_the_order_of_rounding(engine: type, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp().to(dtype), labeled(7)
    prepared_problem = problem(model, (x.to(dtype), y), nn.CrossEntropyLoss())
    accuracy = measure(prepared_problem, engine(prepared_problem))
    assert accuracy is not None
    eps = torch.finfo(dtype).eps
    for norm, error in zip(accuracy.norms.values(), accuracy.errors.values()):
        assert 0 < error < 1e3 * eps * norm


def test_a_key_bias_is_zero_within_the_error() -> None:
    # Softmax does not see a shift of all scores of a query, so the loss does not depend on key biases at all.
    torch.manual_seed(0)
    model = SelfAttention().float()
    data = (torch.randn(2, 3, 4), torch.randint(2, (2,)))
    blocks = {
        name: blockhess.ParameterSlice("qkv.bias", 4 * i, 4 * i + 4) for i, name in enumerate(("query", "key", "value"))
    }
    spectra = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), blocks=blocks, num_probes=2, num_steps=3)
    notes = {block.name: block.note for block in spectra.blocks}
    assert notes == {"query": "", "key": "zero within HVP error", "value": ""}
    assert 0 < spectra.provenance["hvp_error"]["key"] < 1e-6
    assert spectra.zero_blocks == ("key",)
    assert "key" not in spectra.comparable_blocks() and ("key", "zero") in spectra.excluded


class Wrong(TracedEngine):
    def multiply(self, columns: Sequence[Column], share: float) -> Iterator[int]:
        for column in columns:
            yield from super().multiply([column], 1.05 * share if column.number == 2 else share)


def test_wrong_products_are_noticed() -> None:
    torch.manual_seed(0)
    prepared_problem = problem(mlp(), labeled(7), nn.CrossEntropyLoss())
    with pytest.raises(EngineMismatch, match=r"products of block '2.weight' differ from autograd's"):
        measure(prepared_problem, Wrong(prepared_problem))


class WrongAlone(TracedEngine):
    """Its products are wrong where those with one block only are made."""

    def multiply(self, columns: Sequence[Column], share: float) -> Iterator[int]:
        return super().multiply(columns, 1.05 * share if len(columns) == 1 else share)


def test_blocks_are_checked_alone_and_together() -> None:
    torch.manual_seed(0)
    prepared_problem = problem(mlp(), labeled(7), nn.CrossEntropyLoss())
    assert measure(prepared_problem, TracedEngine(prepared_problem, rows=4)) is not None
    with pytest.raises(EngineMismatch, match=r"products of block .* differ from autograd's"):
        measure(prepared_problem, WrongAlone(prepared_problem, rows=4))


class Doubled(torch.autograd.Function):
    """Twice x, with a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def test_what_cannot_be_traced_falls_back_to_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = mlp(), labeled(7)

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(Doubled.apply(m(batch[0])), batch[1])

    monkeypatch.setattr("blockhess.run.plan._tracing_pays", lambda *_: (True, "for the test"))
    spectra = blockhess.spectrum(model, data, loss_fn, num_probes=1, num_steps=3)
    assert spectra.provenance["engine"] == "autograd"
    assert spectra.provenance["plan"]["why"].startswith("no trace: ")
    with pytest.raises(NotImplementedError, match=r"engine='traced' cannot be had: .*autograd.Function"):
        blockhess.spectrum(model, data, loss_fn, num_probes=1, num_steps=3, engine="traced")


def test_a_model_of_one_precision_only() -> None:
    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch[0].float()), batch[1])

    torch.manual_seed(0)
    spectra = blockhess.spectrum(mlp(), labeled(7), loss_fn, num_probes=1, num_steps=3)
    assert spectra.provenance["hvp_error"] is None


def test_a_block_that_only_a_later_batch_uses_is_not_zero() -> None:
    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        expert = m[0] if batch[0][0, 0] > 0 else m[1]
        return (torch.tanh(expert(batch[0])) - batch[1]).square().mean() + m[2](batch[0]).mean()

    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(3, 2) for _ in range(3)).double()  # the loss is linear in the third
    x, y = torch.rand(5, 3, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    spectra = blockhess.spectrum(model, [(x, y), (-x, y)], loss_fn, num_probes=1, num_steps=3)
    assert spectra.zero_blocks == ("2.weight", "2.bias")


def test_flat_blocks_are_checked_after_the_run() -> None:
    """A bias before a BatchNorm of the batch's statistics has no effect: its eigenvalues are rounding."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)
    ).float()
    data = torch.randn(16, 3), torch.randint(3, (16,))
    options = {"batchnorm": "batch", "num_probes": 1, "num_steps": 2, "engine": "autograd", "dtype": torch.float32}
    spectra = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), **options)
    assert len(spectra.provenance["plan"]["checked"]) == 1
    assert spectra.zero_blocks == ("2.bias",) and "2.bias" in spectra.provenance["hvp_error"]
    assert blockhess.spectrum(model, data, nn.CrossEntropyLoss(), **options | {"engine": "traced"}).zero_blocks


def test_the_default_dtype_is_changed_only_where_the_model_needs_it() -> None:
    seen: set[torch.dtype] = set()

    def loss_fn(model: nn.Module, batch: Any, needs: bool = False) -> Tensor:
        seen.add(torch.get_default_dtype())
        mask = torch.ones(3, 3) if needs else torch.ones(3, 3, dtype=batch[0].dtype)
        return F.cross_entropy(model(batch[0] @ mask), batch[1])

    torch.manual_seed(0)
    for needs, dtypes in ((False, {torch.float32}), (True, {torch.float32, torch.float64})):
        seen.clear()
        run = partial(loss_fn, needs=needs)
        found = blockhess.spectrum(mlp(), labeled(7), lambda m, b, run=run: run(m, b), num_probes=1, num_steps=2)
        assert seen == dtypes and found.provenance["hvp_error"]


def scaled(model: nn.Module, batch: Any, scale: float) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1]) * scale


@pytest.mark.parametrize("engine", ["autograd", "traced", "difference", "exact"])
def test_a_scaled_loss_gives_a_scaled_spectrum_or_is_refused(engine: str) -> None:
    """In float32, squares of 1e-30 underflow and those of 1e30 overflow; products of 1e-39 lack digits or vanish."""
    model, batch, nodes = mlp(), labeled(16), {}
    for scale in (1.0, 1e-30, 1e30):
        spectra = blockhess.spectrum(
            model, batch, partial(scaled, scale=scale), engine=engine, num_probes=2, num_steps=4
        )
        nodes[scale] = spectra.quadrature.nodes / scale
    for other in (nodes[1e-30], nodes[1e30]):
        error = (other - nodes[1.0]).abs().amax((0, 2)) / nodes[1.0].abs().amax((0, 2))
        assert error.max() < (5e-3 if engine == "difference" else 1e-5)
    for scale in (1e-38, 1e-40, 1e-42, 1e-44):
        with pytest.raises(ValueError, match=r"^spectrum: products must have size .* in torch.float32, got"):
            blockhess.spectrum(model, batch, partial(scaled, scale=scale), engine=engine, num_probes=2, num_steps=4)


def test_zero_and_flat_blocks_are_not_too_small() -> None:
    """Only the largest block is judged."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return (model.weight**2).sum() + 1e-30 * (model.bias**2).sum()

    spectra = blockhess.spectrum(nn.Linear(3, 2), labeled(16), loss, num_probes=2, num_steps=2)
    torch.testing.assert_close(spectra.quadrature.nodes[0, :, 0].float(), torch.tensor([2.0, 2e-30]))
    linear = blockhess.spectrum(nn.Linear(3, 2), labeled(16), lambda m, b: m.weight.sum() + m.bias.sum(), num_steps=2)
    assert (linear.quadrature.nodes == 0).all()
