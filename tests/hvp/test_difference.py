"""engine="difference": products by differences of gradients, compared with dense float64 Hessians."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import blockhess
from blockhess.hvp import ENGINES, BlockOperator, DifferenceEngine
from blockhess.hvp.differences import unit_vector
from blockhess.hvp.operator import product
from blockhess.problem.graph import OperationRecorder
from blockhess.problem.model_state import fixed_state
from tests.helpers.dense_hessian import operator_blocks, problem
from tests.helpers.tiny_models import CASES, SelfAttention, labeled, mlp

CROSS_ENTROPY = nn.CrossEntropyLoss()


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def double(batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in batch)


class FusedSquare(torch.autograd.Function):
    """x^2 / 2 + x, whose backward is no graph of operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x / 2 + x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] + 1)


class Activated(nn.Module):
    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.activation = nn.Linear(3, 4), nn.Linear(4, 3), activation

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.activation(self.first(x)))


def test_steps_do_not_depend_on_what_is_multiplied_first() -> None:
    model, data = mlp(), labeled(7)
    posed = problem(model, data, CROSS_ENTROPY)
    forward, backward = DifferenceEngine(posed), DifferenceEngine(posed)
    ours = [forward.step(l) for l in range(4)]
    operator_blocks(BlockOperator(posed, backward))
    assert [backward.step(l) for l in range(4)] == ours


@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_autograd_in_float64(name: str) -> None:
    make_model, make_data = CASES[name]
    model, data = make_model().double(), double(make_data())
    with fixed_state(model):
        posed = problem(model, [data, data], CROSS_ENTROPY)
        exact = operator_blocks(BlockOperator(posed, ENGINES["autograd"](posed)))
    with fixed_state(model, second_order=False):
        posed = problem(model, [data, data], CROSS_ENTROPY, second_order=False)
        found = operator_blocks(BlockOperator(posed, ENGINES["difference"](posed)))
    largest = max(float(block.abs().max()) for block in exact.values())
    for block, dense in exact.items():
        # Rounding and truncation are eps^(2/3) for the best step.
        assert float((found[block] - dense).abs().max()) < 1e3 * torch.finfo(torch.float64).eps ** (2 / 3) * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mlp", "attention", "tied embedding"])
def test_the_recorded_error_is_that_of_the_product(name: str, dtype: torch.dtype) -> None:
    make_model, make_data = CASES[name]
    model, data = make_model().double(), double(make_data())
    with fixed_state(model):
        exact = problem(model, data, CROSS_ENTROPY)
        posed = problem(model, data, CROSS_ENTROPY, dtype=dtype)
        products, differences = ENGINES["autograd"](exact), DifferenceEngine(posed)
        products.prepare(0)
        for number in range(len(posed.dims)):
            expected = product(products, number, unit_vector(exact, number))
            found = product(differences, number, unit_vector(posed, number)).double()
            step = differences.step(number)
            if float(expected.norm()) == 0:
                continue
            assert step.error < 1e-2 * float(expected.norm())
            assert float((found - expected).norm()) < 5 * step.error  # two errors of the same size, in few entries


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_a_vector_of_any_length(scale: float) -> None:
    posed = problem(mlp().double(), double(labeled(7)), CROSS_ENTROPY)
    v, engine = unit_vector(posed, 0), DifferenceEngine(posed)
    torch.testing.assert_close(product(engine, 0, scale * v), scale * product(engine, 0, v), rtol=1e-6, atol=0)
    assert not product(engine, 0, 0 * v).any()
    assert product(engine, 0, v / 0).isnan().all()


def test_auto_takes_differences_of_a_function_without_second_derivative() -> None:
    fused, plain = Activated(FusedSquare.apply).double(), Activated(lambda x: x * x / 2 + x).double()
    plain.load_state_dict(fused.state_dict())
    data = double(labeled(9))
    found = blockhess.spectrum(fused, data, CROSS_ENTROPY, num_probes=2, num_steps=30)
    expected = blockhess.spectrum(plain, data, CROSS_ENTROPY, num_probes=2, num_steps=30, engine="exact")
    assert found.provenance["engine"] == "difference" and expected.provenance["engine"] != "difference"
    assert "once_differentiable" in found.provenance["plan"]["why"]
    assert "relative errors of products are about 4e-11" in found.provenance["plan"]["why"]
    for name in expected:
        block = expected[name]
        assert found[name].lambda_max == pytest.approx(block.lambda_max, rel=1e-8)
        assert found[name].trace == pytest.approx(block.trace, rel=1e-8)
    with pytest.raises(NotImplementedError, match=r"once_differentiable.*engine='difference'"):
        blockhess.spectrum(fused, data, CROSS_ENTROPY, num_probes=2, num_steps=3, engine="autograd")


def ctc(log_probs: Tensor, targets: Tensor) -> Tensor:
    """The loss of Graves et al. (2006) for one sequence (T, C), by its recurrence in plain PyTorch; blank = 0."""
    labels = [0]
    for label in targets.tolist():
        labels += [label, 0]
    alpha = [log_probs[0, 0], log_probs[0, labels[1]]]
    alpha += [log_probs.new_tensor(-1e30)] * (len(labels) - 2)
    for t in range(1, len(log_probs)):
        before = alpha
        alpha = []
        for s, label in enumerate(labels):
            paths = [before[s], *before[max(0, s - 1) : s]]
            if s > 1 and label not in (0, labels[s - 2]):
                paths.append(before[s - 2])
            alpha.append(torch.logsumexp(torch.stack(paths), 0) + log_probs[t, label])
    return -torch.logsumexp(torch.stack(alpha[-2:]), 0)


def test_ctc_loss() -> None:
    model, x, targets = nn.Linear(3, 4).double(), torch.randn(6, 3).double(), torch.tensor([1, 3, 3])

    def by_torch(model: nn.Module, batch: Any) -> Tensor:
        return F.ctc_loss(model(batch[0]).log_softmax(-1), targets, [6], [3], reduction="sum")

    def by_hand(model: nn.Module, batch: Any) -> Tensor:
        return ctc(model(batch[0]).log_softmax(-1), targets)

    options: dict[str, Any] = {"num_probes": 3, "num_steps": 20}
    found = blockhess.spectrum(model, (x,), by_torch, **options)
    expected = blockhess.spectrum(model, (x,), by_hand, engine="exact", **options)
    assert found.provenance["engine"] == "difference"
    assert "ctc_loss" in found.provenance["plan"]["why"]
    assert found.provenance["loss_value"] == pytest.approx(expected.provenance["loss_value"], rel=1e-12)
    for name in expected:
        block = expected[name]
        assert found[name].lambda_max == pytest.approx(block.lambda_max, rel=1e-8)
        assert found[name].lambda_min == pytest.approx(block.lambda_min, rel=1e-8, abs=1e-8 * block.lambda_max)


class FlashAttention(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().forward(x)


def test_attention_is_that_of_training() -> None:
    model, data = SelfAttention(), (torch.randn(2, 3, 4), torch.randint(2, (2,)))
    flash = FlashAttention()
    flash.load_state_dict(model.state_dict())
    for second_order, kernel in ((False, "flash"), (True, "_scaled_dot_product_attention_math")):
        with fixed_state(model, second_order=second_order), OperationRecorder(model) as operations:
            model(data[0])
        assert any("flash" in place for place in operations.places) == (kernel == "flash"), operations.places
    found = blockhess.spectrum(flash, data, CROSS_ENTROPY, num_probes=2, num_steps=8, dtype=torch.float64)
    expected = blockhess.spectrum(model, data, CROSS_ENTROPY, num_probes=2, num_steps=8, dtype=torch.float64)
    assert found.provenance["engine"] == "difference"
    for name in expected:
        block = expected[name]
        assert found[name].lambda_max == pytest.approx(block.lambda_max, rel=1e-8, abs=1e-9)


def state(model: nn.Module) -> dict[str, Any]:
    """Everything that must not change: memory, bits and gradients, and the random number generator."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found: dict[str, Any] = {name: (t.data_ptr(), t.detach().clone(), t.grad) for name, t in tensors.items()}
    return found | {"rng": torch.get_rng_state(), "modes": [m.training for m in model.modules()]}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return all(
        torch.equal(before[n], after[n])
        if n == "rng"
        else before[n] == after[n]
        if n == "modes"
        else before[n][0] == after[n][0] and torch.equal(before[n][1], after[n][1]) and before[n][2] is after[n][2]
        for n in before
    )


@pytest.mark.parametrize("fails_at", [None, 5, 12])
@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_the_model_is_restored_to_the_bit(batchnorm: str, fails_at: int | None) -> None:
    make_model, make_data = CASES["convolution and BatchNorm"]
    model, data, calls = make_model().train(), make_data(), 0
    before = state(model)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            assert any(not torch.equal(p, before[n][1]) for n, p in model.named_parameters()) == (calls > 2)
            raise KeyError("boom")
        torch.rand(3)  # draws that do not change the loss
        return F.cross_entropy(model(batch[0]), batch[1])

    options: dict[str, Any] = {"engine": "difference", "num_probes": 1, "num_steps": 2, "batchnorm": batchnorm}
    if fails_at is None:
        blockhess.spectrum(model, data, loss_fn, **options)
    else:
        with pytest.raises(ValueError, match="boom"):
            blockhess.spectrum(model, data, loss_fn, **options)
    assert calls > 12 or fails_at
    assert same(before, state(model))


def test_blocks_below_the_error_are_called_zero() -> None:
    """The softmax does not depend on key biases, which rounding alone gives a Hessian."""
    model, data = SelfAttention(), (torch.randn(2, 3, 4), torch.randint(2, (2,)))
    blocks = {
        "query": blockhess.ParameterSlice("qkv.bias", 0, 4),
        "key": blockhess.ParameterSlice("qkv.bias", 4, 8),
        "out": "out.bias",
    }
    spectra = blockhess.spectrum(
        model, data, CROSS_ENTROPY, blocks=blocks, num_probes=2, num_steps=4, engine="difference"
    )
    assert list(spectra.zero_blocks) == ["key"]
    assert spectra.provenance["unchecked"] == []
    assert set(spectra.provenance["hvp_error"]) == set(blocks)
    assert spectra.provenance["hvps"] == 2 * 4 + 2 * 4 + 2 * 2


def test_errors_above_a_thousandth_are_warned_of() -> None:
    """The gradient of a loss with a large constant slope hides its curvature in float32."""
    model, x = nn.Linear(3, 1), torch.randn(5, 3)

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        out = model(batch[0])
        return (1e4 * out + torch.cos(out)).mean()

    options: dict[str, Any] = {"engine": "difference", "num_probes": 1, "num_steps": 3}
    with pytest.warns(UserWarning, match=r"relative errors above 0.001 in . of 2 blocks.*pass dtype=torch.float64"):
        blockhess.spectrum(model, (x,), loss_fn, **options)
    spectra = blockhess.spectrum(model, (x,), loss_fn, dtype=torch.float64, **options)
    assert spectra.zero_blocks == () or not spectra.zero_blocks


def test_half_precision() -> None:
    model, data = mlp().bfloat16(), labeled(7)
    spectra = blockhess.spectrum(model, data, CROSS_ENTROPY, engine="difference", num_probes=1, num_steps=2)
    assert spectra.provenance["dtype"] == "float32"  # a promoted copy
    with pytest.raises(ValueError, match=r"dtype must be torch.float32 or torch.float64 .* got torch.bfloat16"):
        blockhess.spectrum(
            model,
            (data[0].bfloat16(), data[1]),
            CROSS_ENTROPY,
            engine="difference",
            dtype=torch.bfloat16,
            num_probes=1,
            num_steps=2,
        )


def test_plan() -> None:
    model, data = Activated(FusedSquare.apply), labeled(9)
    plan = blockhess.plan(model, data, CROSS_ENTROPY, num_probes=2, num_steps=30)
    assert plan.engine == "difference" and plan.rows == 1 and not plan.retain and "once_differentiable" in plan.why
    assert plan.checked == (0, 1, 2, 3)
    assert "engine        difference (the model has" in str(plan) and "for less, pass dtype=torch.float64" in str(plan)
    asked = blockhess.plan(mlp(), data, CROSS_ENTROPY, num_probes=2, num_steps=30, engine="difference")
    assert asked.engine == "difference" and "as asked" in asked.why
    other = blockhess.plan(mlp(), data, CROSS_ENTROPY, num_probes=2, num_steps=30, engine="autograd")
    assert asked.flops > 2 * other.flops  # of the same products, each of two gradients


class StraightThrough(torch.autograd.Function):
    """Has the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x + 0.1 * x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_a_gradient_that_is_not_that_of_the_loss_is_refused() -> None:
    data = (torch.randn(9, 3), torch.randint(3, (9,)))
    right = blockhess.spectrum(Activated(FusedSquare.apply), data, CROSS_ENTROPY, num_steps=3, progress=False)
    assert right.provenance["engine"] == "difference" and not right.provenance["unchecked"]
    with pytest.raises(ValueError, match=r"the gradient of block 'first.weight' is not that of the loss"):
        blockhess.spectrum(Activated(StraightThrough.apply), data, CROSS_ENTROPY, num_steps=3, progress=False)
