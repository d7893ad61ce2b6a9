"""What is refused before any product, and that results do not depend on how the data is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import blockhess
from blockhess.problem.model_state import fixed_state
from tests.helpers.dense_hessian import operator, problem
from tests.helpers.tiny_models import SelfAttention, convolutional, labeled, mlp

OPTIONS: dict[str, Any] = {"num_probes": 2, "num_steps": 4, "engine": "autograd"}


pytestmark = pytest.mark.usefixtures("float64_models")


# Micro-batches


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


def split(loss_fn: Any, model: nn.Module, data: Any, **options: Any) -> tuple[blockhess.Spectra, blockhess.Spectra]:
    """Spectra with a large and with a small memory budget."""
    with fixed_state(model, options.get("batchnorm", "eval")):
        graph = problem(model, data, loss_fn).graph_bytes
    budgets = (None, int(0.6 * graph))  # four parts, each with what does not shrink with the batch
    found = [blockhess.spectrum(model, data, loss_fn, memory_budget=b, **OPTIONS, **options) for b in budgets]
    return found[0], found[1]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_result_does_not_depend_on_the_micro_batches(reduction: str) -> None:
    x, y = labeled(256)
    y[::3] = -100  # weights that are not the parts' sizes
    whole, parts = split(nn.CrossEntropyLoss(reduction=reduction), wide(), (x, y))
    assert whole.provenance["plan"]["batches"] == 1 < parts.provenance["plan"]["batches"]
    for name in whole.names:
        torch.testing.assert_close(parts[name].nodes, whole[name].nodes, rtol=1e-9, atol=1e-11)


def test_closures_are_never_split() -> None:
    with pytest.raises(ValueError, match=r"memory_budget must be at least .* for one probe of one batch's graph"):
        split(lambda m, b: F.cross_entropy(m(b[0]), b[1]), wide(), labeled(256))


class Contrastive(nn.Module):
    """Every sample against all others of its batch."""

    def forward(self, z: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(z @ z.T, torch.arange(len(z)))


class Flat(nn.CrossEntropyLoss):
    """Targets of another length than the inputs."""

    def forward(self, z: Tensor, targets: Tensor) -> Tensor:
        return super().forward(z, targets[: len(targets) // 2])


@pytest.mark.parametrize("loss_fn", [Contrastive(), Flat()])
def test_batches_are_split_only_where_the_loss_stays_the_same(loss_fn: nn.Module) -> None:
    x, y = labeled(256)
    y = torch.cat([y, y]) if isinstance(loss_fn, Flat) else y
    with pytest.raises(ValueError, match=r"memory_budget must be at least .* for one probe of one batch's graph"):
        split(loss_fn, wide(), (x, y))


def test_batch_statistics_are_never_split() -> None:
    data = torch.randn(256, 1, 4, 4), torch.randint(3, (256,))
    with pytest.raises(ValueError, match="memory_budget must be at least"):
        split(nn.CrossEntropyLoss(), convolutional(), data, batchnorm="batch")
    whole, parts = split(nn.CrossEntropyLoss(), convolutional(), data, batchnorm="eval")
    assert parts.provenance["plan"]["batches"] > 1
    torch.testing.assert_close(parts["0.weight"].nodes, whole["0.weight"].nodes, rtol=1e-9, atol=1e-11)


# Randomness


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), AlwaysDropout())

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class AlwaysDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x)


class NoisyGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * torch.rand(())


def test_what_draws_random_numbers_is_named() -> None:
    with pytest.raises(ValueError, match=r"same loss for the same batch.*bernoulli_? in inner\.1 \(AlwaysDropout\)"):
        problem(Noisy(), labeled(4), nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"same gradient for the same batch.* in '0.weight'.*rand in loss_fn"):
        problem(mlp(), labeled(4), lambda m, b: NoisyGradient.apply(m(b[0])).square().mean())
    calls = []

    def changing(m: nn.Module, b: Any) -> Tensor:
        calls.append(0)
        return len(calls) * m(b[0]).square().mean()

    with pytest.raises(ValueError, match="no random number is drawn by torch, so the model changes its own state"):
        problem(mlp(), labeled(4), changing)


# Bad batches


@pytest.mark.parametrize(("value", "text"), [(float("nan"), "nan"), (float("inf"), "inf")])
def test_a_loss_that_is_not_finite_names_its_batch(value: float, text: str) -> None:
    x, y = torch.randn(6, 3), torch.randn(6, 3)
    y[4] = value
    with pytest.raises(ValueError, match=f"finite loss, got {text} for batch 2"):
        problem(mlp(), list(zip(x.split(2), y.split(2))), nn.MSELoss())


def test_a_batch_on_another_device_is_named() -> None:
    x, y = labeled(4)
    with pytest.raises(ValueError, match="model's device cpu, got batch 1 on meta"):
        problem(mlp(), [(x, y), (x.to("meta"), y)], nn.CrossEntropyLoss())


# Derivatives that torch lacks or gets wrong


def flash(m: nn.Module, batch: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return m(batch).square().mean()


@pytest.mark.parametrize(
    ("make", "data", "loss_fn", "text"),
    [
        (
            lambda: nn.Sequential(SelfAttention()),
            lambda: torch.randn(2, 3, 4),
            flash,
            r"'0.qkv.weight' .* an operation in 0 \(SelfAttention\) lacks \(.*flash_attention.*\); .*SDPBackend.MATH",
        ),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.Hardsigmoid(), nn.Linear(3, 3)),
            lambda: labeled(4),
            nn.CrossEntropyLoss(),
            r"in 1 \(Hardsigmoid\) lacks \(.*hardsigmoid_backward.*\); use F.relu6",
        ),
        (
            mlp,
            lambda: labeled(4),
            lambda m, b: torch.cdist(m(b[0]), b[0]).mean(),
            r"in loss_fn lacks \(.*_cdist_backward.*\); use \(x\[:, None\] - y\).norm",
        ),
    ],
    ids=["flash attention", "hardsigmoid", "cdist"],
)
@pytest.mark.parametrize("engine", ["autograd", "ggn"])
def test_an_operation_without_second_derivative_is_named_with_its_module(
    make: Any, data: Any, loss_fn: Any, text: str, engine: str
) -> None:
    if engine == "ggn" and not isinstance(loss_fn, nn.Module):
        pytest.skip("closures have no Gauss-Newton matrix")
    hessian = operator(make(), data(), loss_fn, engine=engine)
    with pytest.raises(NotImplementedError, match=text):
        hessian(torch.randn(1, sum(hessian.dims)))


def slope(m: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(m(x).sum(), x, create_graph=True)
    return gradient.square().mean()


def test_third_derivatives_that_torch_gets_wrong_are_refused() -> None:
    def model(norm: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 1))

    x = torch.randn(5, 3)
    for norm in (nn.LayerNorm(4), nn.BatchNorm1d(4)):
        with pytest.raises(NotImplementedError, match=f"differentiates through {type(norm).__name__.rstrip('1d')}"):
            problem(model(norm), x, slope)
    for norm in (nn.GroupNorm(2, 4), nn.BatchNorm1d(4).eval()):
        prepared_problem = problem(model(norm), x, slope)
        weight, v, step = prepared_problem.parameters["0.weight"], torch.randn(1, 12), 1e-5
        gradients = []
        for sign in (1, -1):
            moved = {"0.weight": weight.detach() + sign * step * v.view(4, 3)}
            moved = {
                name: moved.get(name, p.detach()).requires_grad_() for name, p in prepared_problem.parameters.items()
            }
            gradients.append(prepared_problem.gradients_at(x, moved)["0.weight"])
        expected = (gradients[0] - gradients[1]).flatten() / (2 * step)
        hessian = operator(prepared_problem.model, x, slope)
        found = hessian(torch.cat([v, torch.zeros(1, sum(hessian.dims) - 12)], 1))[0, :12]
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_the_third_derivative_of_layer_norm_is_wrong_in_torch() -> None:
    """What the refusal above is for; if this fails, torch was mended and the refusal can go."""
    x = torch.randn(2, 4, requires_grad=True)

    def third(norm: Any) -> Tensor:
        (first,) = torch.autograd.grad(norm(x).pow(3).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), x, create_graph=True)
        return torch.autograd.grad(second.pow(2).sum(), x)[0]

    def written_out(x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    wrong, right = third(lambda x: F.layer_norm(x, (4,))), third(written_out)
    assert float((wrong - right).norm()) > 1e-3 * float(right.norm())


@pytest.mark.parametrize("engine", ["autograd", "traced", "ggn"])
def test_activation_checkpointing_in_another_precision(engine: str) -> None:
    class Checkpointed(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[1](checkpoint(lambda z: self[0](z).tanh(), x, use_reentrant=False))

    model = Checkpointed(nn.Linear(3, 4), nn.Linear(4, 3)).bfloat16()
    plain = nn.Sequential(model[0], nn.Tanh(), model[1])
    x, y = labeled(7)
    options = OPTIONS | {"engine": engine, "blocks": {"first": ["0.weight"]}}
    found, right = (blockhess.spectrum(m, (x, y), nn.CrossEntropyLoss(), **options) for m in (model, plain))
    assert found.provenance["hvp_error"] is not None
    torch.testing.assert_close(found["first"].nodes, right["first"].nodes, rtol=1e-4, atol=1e-6)


def test_a_restricted_problem_differentiates_with_respect_to_its_blocks_only() -> None:
    whole = problem(mlp(), labeled(5), nn.CrossEntropyLoss())
    part = whole.restricted([1, 2])
    assert list(part.gradients(0, create_graph=False)) == ["0.bias", "2.weight"]
    assert len(whole.gradients(0, create_graph=False)) == 4 and part.dims == whole.dims
