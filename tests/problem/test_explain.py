"""Errors of models and losses: one line that names where they arose and what to do, with the original as cause."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import blockhess
from blockhess.problem.batches import first_line

X, Y = torch.arange(12.0).view(4, 3) / 10, torch.tensor([0, 1, 1, 0])


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Tanh(), nn.Linear(4, 2)))


def error_of(data: Any, loss_fn: Any, model: nn.Module | None = None, **options: Any) -> Exception:
    """The error of a call, whose text is one line that begins with the function's name."""
    with pytest.raises(Exception, match=r"\Aspectrum: .*\Z") as caught:
        blockhess.spectrum(model or network(), data, loss_fn, num_probes=1, num_steps=2, progress=False, **options)
    return caught.value


def fails(error: BaseException) -> Callable[..., Any]:
    def loss_fn(model: nn.Module, batch: Any) -> Any:
        model(batch[0])
        raise error

    return loss_fn


@pytest.mark.parametrize(
    ("data", "loss_fn", "kind", "text"),
    [
        ((X[:, :2], Y), nn.CrossEntropyLoss(), ValueError, "got RuntimeError in '0' (Linear) for batch 0: mat1 and"),
        ([(X, Y), (X[:, :2], Y)], nn.CrossEntropyLoss(), ValueError, "in '0' (Linear) for batch 1: mat1 and mat2"),
        ((X, Y + 9), nn.CrossEntropyLoss(), ValueError, "got IndexError in loss_fn (CrossEntropyLoss) for batch 0"),
        (((X, X), Y), nn.CrossEntropyLoss(), TypeError, "in '0' (Linear) for batch 0: linear(): argument 'input'"),
        (
            ((X, Y), (X, Y)),
            nn.CrossEntropyLoss(),
            TypeError,
            "not tuple; a tuple is one batch, several are a list; for",
        ),
        ({"x": X}, lambda m, b: m(b["z"]), ValueError, "got KeyError in loss_fn for batch 0: 'z'; try that call"),
        ((X, Y), lambda m: 0, TypeError, "takes 1 positional argument but 2 were given; try that call alone"),
        ({"x": X}, None, TypeError, "unexpected keyword argument 'x'; take out of the batch what the model"),
        ((X, Y), fails(RuntimeError("")), ValueError, "got RuntimeError in loss_fn for batch 0: no message"),
        ((X, Y), fails(ValueError("one\ntwo")), ValueError, "for batch 0: one; try"),
        ((X, Y), lambda m, b: m(b[0]).exp().mul_(2).sigmoid_().mul_(3).mean(), ValueError, "by an inplace operation"),
    ],
)
def test_where_an_error_arose(data: Any, loss_fn: Any, kind: type[Exception], text: str) -> None:
    error = error_of(data, loss_fn)
    assert type(error) is kind and text in str(error)
    assert error.__cause__ is not None and not str(error.__cause__).startswith("spectrum:")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError(), ValueError("spectrum: ours")])
def test_interruptions_and_our_own_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught:
        blockhess.spectrum(network(), (X, Y), fails(error))
    assert caught.value is error


def test_exhausted_memory_keeps_its_advice() -> None:
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
    for error in (torch.OutOfMemoryError("CUDA"), RuntimeError(text)):
        with pytest.raises(torch.OutOfMemoryError, match="spectrum: data must hold batches whose graph fits"):
            blockhess.spectrum(network(), (X, Y), fails(error))


def with_mask(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) @ torch.ones(2, 7, dtype=torch.float64)).square().mean()


def with_teacher(model: nn.Module, batch: Any) -> Tensor:
    with torch.no_grad():
        wanted = TEACHER(batch[0])
    return F.mse_loss(model(batch[0]), wanted)


TEACHER = nn.Linear(3, 2)


@pytest.mark.parametrize(
    ("data", "loss_fn", "dtype", "text"),
    [
        ((X.double(), Y), nn.CrossEntropyLoss(), None, "data must have the dtype of the parameters, torch.float32, got "
         "a tensor of shape (4, 3) in torch.float64 in batch 0, used by linear in '0' (Linear); convert it, or pass d"),
        ((X.half(), Y), nn.CrossEntropyLoss(), None, "got a tensor of shape (4, 3) in torch.float16 in batch 0"),
        ((X, Y), with_mask, None, "got one of shape (2, 7) in torch.float64, used by matmul in loss_fn for batch 0"),
        ((X, Y), with_teacher, torch.float64, "torch.float64, got one of shape (2, 3) in torch.float32, used by linear "
         "in a Linear that is no part of the model for batch 0; dtype= converts parameters, buffers and data"),
    ],
)  # fmt: skip
def test_a_tensor_of_another_dtype_is_named(data: Any, loss_fn: Any, dtype: torch.dtype | None, text: str) -> None:
    error = error_of(data, loss_fn, dtype=dtype)
    assert text in str(error) and isinstance(error.__cause__, RuntimeError)


def test_a_tensor_on_another_device_is_named() -> None:
    mask = torch.ones(4, 2, device="meta")
    error = error_of((X, Y), lambda model, batch: torch.cat([model(batch[0]), mask]).sum())
    assert "must be on the model's device cpu, got one of shape (4, 2) on meta, used by cat in loss_fn" in str(error)


def test_tensors_without_values() -> None:
    assert "data must hold values, got '0' on the meta device" in str(error_of((X.to("meta"), Y), nn.MSELoss()))
    model = network().to("meta")
    assert "model must hold values, got '0.weight' on the meta device" in str(error_of((X, Y), nn.MSELoss(), model))


def test_statistics_of_batches_are_explained_too() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    error = error_of([(X, Y), (X[:, :2], Y)], nn.CrossEntropyLoss(), model, batchnorm="frozen_batch_stats")
    assert "in '0' (Linear) for batch 1: mat1 and mat2" in str(error)


def test_a_product_that_torch_lacks() -> None:
    nested = torch.nested.nested_tensor([X, X[:2]], layout=torch.strided)
    loss_fn = lambda m, b: torch.nested.to_padded_tensor(m(b), 0.0).square().mean()  # noqa: E731
    error = error_of([nested], loss_fn, nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 1)), engine="autograd")
    assert "must have second derivatives in block '2.weight', got RuntimeError for" in str(error)
    assert str(error).endswith(
        "for batch 0: " + first_line(error.__cause__) + "; write the operations in plain PyTorch"
    )


class Late(torch.autograd.Function):
    """Fails in the backward of its backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return Later.apply(g)


class Later(Late):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        raise KeyError("lost")


def fails_at(n: int) -> Callable[..., Any]:
    """A loss whose n-th evaluation fails."""
    calls = iter(range(n - 1))

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        if next(calls, None) is None:
            raise KeyError("lost")
        return F.cross_entropy(model(batch[0]), batch[1])

    return loss_fn


@pytest.mark.parametrize("n", range(1, 7))
def test_errors_of_later_evaluations(n: int) -> None:
    """The data are evaluated once, batch 0 again, then for products and gradients of batches 0 and 1."""
    error = error_of([(X, Y), (X + 1, Y)], fails_at(n), engine="autograd")
    where = (0, 0, 1, 0, 0, 0)[n - 1]
    assert f"must run on the data, got KeyError in loss_fn for batch {where}: 'lost'; try that call" in str(error)
    assert isinstance(error.__cause__, KeyError)


@pytest.mark.parametrize("engine", ["autograd", "auto"])
def test_errors_of_products(engine: str) -> None:
    error = error_of((X, Y), lambda m, b: F.cross_entropy(Late.apply(m(b[0])), b[1]), engine=engine)
    assert (
        "must have second derivatives in block '1.1.weight', got KeyError in the torch.autograd.Function Late"
        in str(error)
    )
    assert isinstance(error.__cause__, KeyError)


class Prompt(nn.Module):
    """Stores a result with its graph."""

    def __init__(self) -> None:
        super().__init__()
        self.prompt, self.body = nn.Parameter(torch.ones(3)), network()
        self.stored = torch.tanh(self.prompt)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x + self.stored)
        return out


@pytest.mark.parametrize("engine", ["autograd", "auto", "ggn"])
@pytest.mark.parametrize("data", [(X, Y), [(X, Y), (X, Y)]], ids=["1", "2"])
def test_graphs_that_were_made_before(data: Any, engine: str) -> None:
    text = "must compute all of the loss in every call, got a part with a graph of its own for batch "
    model = network()
    penalty = sum(p.square().sum() for p in model.parameters())
    if engine != "ggn":
        penalized = lambda m, b: F.cross_entropy(m(b[0]), b[1]) + penalty  # noqa: E731
        assert text in str(error_of(data, penalized, model, engine=engine))
    assert text in str(error_of(data, nn.CrossEntropyLoss(), Prompt(), engine=engine))
