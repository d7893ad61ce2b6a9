"""Block Hessian-vector products against dense float64 Hessians of tiny models."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import blockhess
from blockhess.problem.blocks import ParameterSlice
from blockhess.problem.model_state import fixed_state
from tests.helpers.dense_hessian import assert_close, dense_hessian, operator, operator_blocks
from tests.helpers.tiny_models import CASES, SelfAttention, convolutional, labeled, mlp

pytestmark = pytest.mark.usefixtures("float64_models")


@pytest.mark.parametrize(
    ("case", "batchnorm"), [(case, "eval") for case in CASES] + [("convolution and BatchNorm", "batch")]
)
def test_every_block_is_the_dense_hessian(case: str, batchnorm: str) -> None:
    make_model, make_data = CASES[case]
    model, (x, y) = make_model(), make_data()
    with fixed_state(model, batchnorm):
        blocks = operator_blocks(operator(model, (x, y), nn.CrossEntropyLoss()))
        assert list(blocks) == [name for name, _ in model.named_parameters()]
        for name, block in blocks.items():
            assert_close(block, dense_hessian(model, lambda call: F.cross_entropy(call(x), y), [name]))


def test_batchnorm_policies_differ() -> None:
    model, data = convolutional(), (torch.randn(6, 1, 4, 4), torch.randint(3, (6,)))
    blocks = {}
    for batchnorm in ("eval", "batch"):
        with fixed_state(model, batchnorm):
            blocks[batchnorm] = operator_blocks(operator(model, data, nn.CrossEntropyLoss()))["0.weight"]
    assert (blocks["eval"] - blocks["batch"]).abs().max() > 1e-3


def test_hand_numbers() -> None:
    # loss = mean (x . w + b - y)^2, so H_w = 2 X^T X / n and H_b = 2.
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    blocks = operator_blocks(operator(nn.Linear(2, 1), (x, torch.zeros(2, 1)), nn.MSELoss()))
    torch.testing.assert_close(blocks["weight"], torch.tensor([[10.0, 14.0], [14.0, 20.0]]))
    torch.testing.assert_close(blocks["bias"], torch.tensor([[2.0]]))


@pytest.mark.parametrize("engine", ["autograd", "traced"])
def test_a_parameter_without_dimensions(engine: str) -> None:
    model = nn.Linear(2, 1, bias=False)
    model.scale = nn.Parameter(torch.tensor(3.0))
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    hessian = operator(model, x, lambda m, batch: (m.scale * batch).square().mean() * m.weight[0, 0], engine=engine)
    assert_close(operator_blocks(hessian)["scale"], 2 * x.square().mean().view(1, 1) * model.weight[0, 0].detach())


def test_full_and_groups_and_parts_are_submatrices_of_the_hessian() -> None:
    model, (x, y) = mlp(), labeled(7)
    names = [name for name, _ in model.named_parameters()]
    full = dense_hessian(model, lambda call: F.cross_entropy(call(x), y), names)  # 12 + 4 + 12 + 3

    (block,) = operator_blocks(operator(model, (x, y), nn.CrossEntropyLoss(), "full")).values()
    assert_close(block, full)

    blocks = operator_blocks(operator(model, (x, y), nn.CrossEntropyLoss(), [(r"^(\d)\.", r"layer \1")]))
    assert_close(blocks["layer 0"], full[:16, :16])
    assert_close(blocks["layer 2"], full[16:, 16:])

    # 0.weight is (4, 3): rows 1:3 are the entries 3..8; column 2 the entries 2, 5, 8, 11. 2.weight is (3, 4).
    parts = {
        "rows": ParameterSlice("0.weight", 1, 3),
        "column": ParameterSlice("0.weight", 2, 3, dim=1),
        "mixed": [
            "2.bias",
            ParameterSlice("0.weight", 2, 4),
            ParameterSlice("0.weight", 0, 1),
            ParameterSlice("2.weight", 1, 2, dim=1),
        ],
    }
    blocks = operator_blocks(operator(model, (x, y), nn.CrossEntropyLoss(), parts))
    rows, column = torch.arange(3, 9), torch.arange(2, 12, 3)
    mixed = torch.tensor([28, 29, 30, 6, 7, 8, 9, 10, 11, 0, 1, 2, 17, 21, 25])
    for name, entries in (("rows", rows), ("column", column), ("mixed", mixed)):
        assert_close(blocks[name], full[entries][:, entries])


def test_a_block_depends_on_its_own_input_only() -> None:
    hessian = operator(mlp(), labeled(7), nn.CrossEntropyLoss())
    v = torch.randn(2, sum(hessian.dims))
    other = torch.randn_like(v)
    other[:, 12:16] = v[:, 12:16]
    result, changed = hessian(v), hessian(other)
    assert torch.equal(result[:, 12:16], changed[:, 12:16])
    assert not torch.isclose(result[:, :12], changed[:, :12]).any()


def test_the_input_is_left_alone_and_the_result_is_new() -> None:
    hessian = operator(nn.Linear(3, 2, bias=False), labeled(7), lambda m, batch: (m.weight**2).sum() / 2)
    v = torch.randn(2, 6)
    kept = v.clone()
    first = hessian(v)  # the Hessian is the identity, whose product autograd may return as the input itself
    assert torch.equal(v, kept) and torch.equal(first, v)
    assert hessian(v).data_ptr() != first.data_ptr() != v.data_ptr()


@pytest.mark.parametrize("sizes", [[7], [3, 3, 1], [1, 6]])
def test_batches_of_unequal_size_equal_the_whole_batch(sizes: list[int]) -> None:
    model, (x, y) = mlp(), labeled(7)
    y[[0, 4]] = -100  # ignored targets: weights 5; 2, 2, 1; and 0, 5
    hessian = operator(model, list(zip(x.split(sizes), y.split(sizes))), nn.CrossEntropyLoss())
    whole = F.cross_entropy(model(x), y)
    assert hessian.problem.weight == 5
    torch.testing.assert_close(hessian.problem.loss_value, whole.item(), rtol=1e-14, atol=0)
    for name, block in operator_blocks(hessian).items():
        assert_close(block, dense_hessian(model, lambda call: F.cross_entropy(call(x), y), [name]))


def test_reduction_sum_adds_batches() -> None:
    model, (x, y) = mlp(), labeled(7)
    hessian = operator(model, list(zip(x.split(4), y.split(4))), nn.CrossEntropyLoss(reduction="sum"))
    for name, block in operator_blocks(hessian).items():
        assert_close(block, dense_hessian(model, lambda call: F.cross_entropy(call(x), y, reduction="sum"), [name]))


def test_weights_that_a_loss_function_returns() -> None:
    model, (x, y) = mlp(), labeled(7)

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor, float]) -> tuple[Tensor, float]:
        return F.cross_entropy(m(batch[0]), batch[1]), batch[2]

    hessian = operator(model, [(x[:3], y[:3], 9.0), (x[3:], y[3:], 1.0)], loss_fn)

    def weighted(call: object) -> Tensor:
        return 0.9 * F.cross_entropy(call(x[:3]), y[:3]) + 0.1 * F.cross_entropy(call(x[3:]), y[3:])

    for name, block in operator_blocks(hessian).items():
        assert_close(block, dense_hessian(model, weighted, [name]))


def test_finished_recurrences_are_skipped() -> None:
    hessian = operator(mlp(), labeled(7), nn.CrossEntropyLoss())
    v = torch.randn(2, sum(hessian.dims))
    whole = hessian(v)
    assert hessian.hvps == 8
    finished = torch.zeros(2, 4, dtype=torch.bool)
    finished[0, 0] = finished[1, 2] = True
    hessian.mark_finished(finished)
    result = hessian(v)
    assert hessian.hvps == 8 + 6
    assert not result[0, :12].any() and not result[1, 16:28].any()
    assert torch.equal(result[1, :16], whole[1, :16]) and torch.equal(result[0, 12:], whole[0, 12:])


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.linear = nn.Parameter(torch.ones(3))  # the loss below is linear in it

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def test_unused_and_linear_parameters_have_zero_blocks() -> None:
    model, data = PartlyUsed(), labeled(7)

    def loss_fn(m: PartlyUsed, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(batch[0]), batch[1]) + m.linear.sum()

    hessian = operator(model, data, loss_fn)
    assert hessian.problem.unused == ("unused.weight", "unused.bias")
    notes = {info.name: info.note for info in hessian.problem.infos if info.note}
    assert notes == dict.fromkeys(hessian.problem.unused, "unused")
    blocks = operator_blocks(hessian)
    assert not blocks["linear"].any() and not blocks["unused.weight"].any()
    assert blocks["used.weight"].any()
    before = hessian.hvps
    hessian(torch.randn(2, sum(hessian.dims)))
    assert hessian.hvps == before + 2 * 2  # used.weight and used.bias

    # A group of used, unused and linear parameters has zero rows and columns where they are.
    (block,) = operator_blocks(operator(model, data, loss_fn, {"all": ["unused.bias", "used.bias", "linear"]})).values()
    expected = torch.zeros(9, 9)
    expected[3:6, 3:6] = blocks["used.bias"]
    assert_close(block, expected)


def test_a_parameter_used_in_one_batch_only_is_used() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    x, y = labeled(4)
    hessian = operator(model, ["a", "b"], lambda m, key: (F.cross_entropy(m[key](x), y), 1))
    assert hessian.problem.unused == ()
    assert_close(
        operator_blocks(hessian)["a.weight"],
        0.5 * dense_hessian(model["a"], lambda call: F.cross_entropy(call(x), y), ["weight"]),
    )


def test_vectors_have_the_widest_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).float()
    model.append(nn.Linear(4, 3))
    x, y = labeled(5)
    data = (x.float(), y)

    def loss_fn(m: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m[2](m[:2](batch[0]).double()), batch[1])

    hessian = operator(model, data, loss_fn)
    assert hessian.problem.dtype == torch.float64
    v = torch.randn(1, sum(hessian.dims))
    result = hessian(v)
    expected = operator(model.double(), (data[0].double(), y), loss_fn)(v)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(result, expected)


def test_a_loss_that_differentiates_inside() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))
    x = torch.randn(5, 1, requires_grad=True)

    def residual(call: object) -> Tensor:
        (slope,) = torch.autograd.grad(call(x).sum(), x, create_graph=True)
        return (slope - x).square().mean()

    blocks = operator_blocks(operator(model, x, lambda m, batch: residual(m)))
    for name in ("0.weight", "0.bias", "2.weight"):
        assert_close(blocks[name], dense_hessian(model, residual, [name]))


class BigTensors(TorchDispatchMode):
    """Keeps every storage of at least `nbytes` that an operation returns."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self.storages: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= self.nbytes:
                self.storages[tensor.untyped_storage().data_ptr()] = tensor
        return result


@pytest.mark.parametrize("blocks", ["parameter", {"rows": ParameterSlice("0.weight", 1, 3), "rest": "2.weight"}])
def test_the_result_is_the_only_new_tensor_of_its_size(blocks: Any) -> None:
    x, y = labeled(7)
    hessian = operator(mlp(), [(x[:4], y[:4]), (x[4:], y[4:])], nn.CrossEntropyLoss(), blocks)
    v = torch.randn(10, sum(hessian.dims))
    with BigTensors(v.untyped_storage().nbytes()) as big:
        result = hessian(v)
    assert set(big.storages) - {v.data_ptr()} == {result.data_ptr()}


class Marked(torch.autograd.Function):
    """The identity, with a token that lives as long as the graph."""

    class Token:
        pass

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.token = Marked.Token()
        Marked.latest = weakref.ref(ctx.token)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.clone()


def test_only_one_batchs_graph_is_alive() -> None:
    model, (x, y) = mlp(), labeled(8)
    alive = []
    Marked.latest = lambda: None

    def loss_fn(m: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
        alive.append(Marked.latest() is not None)
        return F.cross_entropy(m[2](Marked.apply(m[1](m[0](batch[0])))), batch[1])

    hessian = operator(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss_fn, retain=False)
    hessian(torch.randn(1, sum(hessian.dims)))
    assert alive == [False] * 5  # twice the first batch, to see whether it repeats
    single = operator(model, (x, y), loss_fn)
    single(torch.randn(1, sum(hessian.dims)))
    assert Marked.latest() is not None  # the graph is kept
    del single, hessian
    assert Marked.latest() is None


# Bad input


def test_a_loss_that_depends_on_no_block() -> None:
    model = PartlyUsed()
    with pytest.raises(ValueError, match=r"depends on none of unused.weight"):
        operator(model, labeled(4), nn.CrossEntropyLoss(), {"a": "unused.weight"})


@pytest.mark.parametrize(
    ("loss_fn", "text"),
    [
        (lambda m, b: m(b[0]), r"0-dimensional tensor, got shape \(4, 3\) for batch 0"),
        (lambda m, b: m(b[0]).mean().item(), "must return a tensor, got a float"),
        (lambda m, b: m(b[0]).mean().detach(), "requires no gradient for batch 0"),
        (lambda m, b: m(b[0]).mean() * 1j, "real number, got torch.complex128"),
        (lambda m, b: m(b[0]).mean() * float("nan"), "finite loss, got nan for batch 0"),
        (lambda m, b: (m(b[0]).mean(), -1), "weight of at least 0, got -1.0 for batch 0"),
        (lambda m, b: (m(b[0]).mean(), float("nan")), "weight of at least 0, got nan"),
        (lambda m, b: (m(b[0]).mean(), 0), "weight above 0, got 1 of weight 0"),
        (lambda m, b: F.dropout(m(b[0])).square().mean(), "same loss for the same batch"),
        (42, "loss_fn must be callable or None, got int"),
    ],
)
def test_bad_losses(loss_fn: object, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        operator(mlp(), labeled(4), loss_fn)


def test_the_bad_batch_is_named() -> None:
    x, y = labeled(6)
    x[5] = float("inf")
    with pytest.raises(ValueError, match="got nan for batch 1"):
        operator(mlp(), list(zip(x.split(4), y.split(4))), nn.CrossEntropyLoss())


def test_an_operation_without_second_derivative_is_named() -> None:
    def loss_fn(m: nn.Module, batch: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return m(batch).square().mean()

    hessian = operator(SelfAttention(), torch.randn(2, 3, 4), loss_fn)
    with pytest.raises(NotImplementedError, match=r"block 'qkv.weight' needs a second derivative .*flash_attention"):
        hessian(torch.randn(1, sum(hessian.dims)))


@pytest.mark.parametrize("batches", [1, 2])
def test_an_operation_that_is_differentiable_once_is_refused(batches: int) -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * 2

    data = [labeled(4)] * batches
    with pytest.raises(NotImplementedError, match="marked once_differentiable"):
        hessian = operator(mlp(), data, lambda m, b: F.cross_entropy(Once.apply(m(b[0])), b[1]))
        hessian(torch.randn(1, sum(hessian.dims)))


def test_parameters_and_data_on_different_devices() -> None:
    model, (x, y) = mlp(), labeled(4)
    with pytest.raises(ValueError, match="model's device cpu, got batch 0 on meta"):
        operator(model, (x.to("meta"), y), nn.CrossEntropyLoss())
    model[2].to("meta")
    with pytest.raises(ValueError, match=r"one device, got '0.weight' on cpu and '2.weight' on meta"):
        operator(model, (x, y), nn.CrossEntropyLoss())


def test_what_autograd_gets_silently_wrong_is_refused() -> None:
    weight_norm = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3))
    arguments = weight_norm, labeled(5), nn.CrossEntropyLoss()
    with pytest.raises(NotImplementedError, match="fused weight norm"):
        blockhess.spectrum(*arguments, num_probes=1, num_steps=2, engine="autograd")
    assert blockhess.spectrum(*arguments, num_probes=1, num_steps=2).provenance["engine"] == "difference"

    def checkpointed(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        x = batch[0].clone().requires_grad_()
        return F.cross_entropy(checkpoint(model, x, use_reentrant=reentrant), batch[1])

    reentrant = True
    with pytest.raises(NotImplementedError, match="use_reentrant=False"):
        blockhess.spectrum(mlp(), labeled(5), checkpointed, num_probes=1, num_steps=2)
    reentrant = False
    blockhess.spectrum(mlp(), labeled(5), checkpointed, num_probes=1, num_steps=2)


def test_autocast_around_the_call_changes_nothing() -> None:
    model, data = mlp(), labeled(5)
    plain = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=1, num_steps=3)
    with torch.autocast("cpu"):
        inside = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=1, num_steps=3)
    assert torch.equal(plain.quadrature.nodes, inside.quadrature.nodes)
