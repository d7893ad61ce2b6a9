"""Every engine against dense float64 Hessians, for one tiny model of every kind that people use."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import blockhess
from blockhess.hvp import AutogradEngine, BlockOperator, Engine, GaussNewtonEngine, TracedEngine
from blockhess.hvp.operator import product
from blockhess.problem.batches import as_batches, map_tensors
from blockhess.problem.blocks import BlockSpec, ParameterSlice, partition
from blockhess.problem.losses import make_loss
from blockhess.problem.model_state import fixed_state, freeze_batch_statistics
from blockhess.problem.problem import Problem
from tests.helpers.dense_hessian import dense_hessian
from tests.helpers.model_zoo import ZOO, Checkpointed

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


pytestmark = pytest.mark.usefixtures("float64_models")


@contextmanager
def prepared_problem(name: str, blocks: BlockSpec = "parameter") -> Iterator[Problem]:
    """A case of the zoo, parameters and data rounded to float32, so that both precisions have the same Hessian."""
    case = ZOO[name]
    if case.transformers:
        pytest.importorskip("transformers")
    model, data, loss_fn = case.make()
    loss = make_loss(loss_fn)
    model.float().double()
    batches = as_batches(data, pairs=loss.pairs)
    with fixed_state(model, case.batchnorm):
        if case.batchnorm == "frozen_batch_stats":
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


SLOW = (
    "BertForMaskedLM",
    "LlamaForCausalLM",
    "ViTForImageClassification",
    "BatchNorm residual, eval",
    "BatchNorm residual, batch",
    "ConvNeXt-like",
    "GRU",
    "encoder layer",
    "PINN",
    "MambaForCausalLM",
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ZOO])
def test_products_are_those_of_the_dense_hessian(name: str) -> None:
    with prepared_problem(name) as problem:
        traced = None if name == "control flow on activations" else TracedEngine(problem)
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
            for traced.rows in (1, 3, 1000):
                assert max(errors(problem, traced, vectors, expected)) <= tolerance
        if single is not None:
            assert max(errors(single, AutogradEngine(single), vectors, expected)) <= TOLERANCE[torch.float32]


BLOCKS: dict[str, Any] = {
    "full": "full",
    "groups": [(r"^0\.", "first"), (r"^2\.", "second")],
    "parts": {"rows": ParameterSlice("0.weight", 1, 3), "column": ["2.bias", ParameterSlice("0.weight", 2, 3, dim=1)]},
}


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_groups_and_parts(blocks: BlockSpec) -> None:
    with prepared_problem("mlp", blocks) as problem:
        vectors = torch.randn(4, sum(problem.dims))
        expected = products(problem, AutogradEngine(problem), vectors)  # against dense Hessians in test_operator.py
        engine = TracedEngine(problem)
        assert max(errors(problem, engine, vectors, expected)) <= TOLERANCE[torch.float64]
        engine.rows = 3
        assert max(errors(problem, engine, vectors, expected)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["mlp", "ReLU and max-pooling", "tied embedding"])
def test_blocks_are_those_of_torch_func_hessian(name: str) -> None:
    with prepared_problem(name) as problem:
        (batch,) = problem.batches
        blocks = torch.func.hessian(
            lambda parameters: problem.loss(lambda x: functional_call(problem.model, parameters, x), batch)[0]
        )({n: p.detach() for n, p in problem.parameters.items()})
        vectors = torch.randn(2, sum(problem.dims))
        parts = zip(problem.parameters, problem.dims, vectors.split(problem.dims, dim=1))
        expected = [v @ blocks[n][n].reshape(dim, dim) for n, dim, v in parts]
        for engine in (AutogradEngine(problem), TracedEngine(problem)):
            assert max(errors(problem, engine, vectors, expected)) <= TOLERANCE[torch.float64]


@pytest.mark.parametrize("name", ["mlp", pytest.param("ConvNeXt-like", marks=pytest.mark.slow)])
def test_traced_products_in_float32_and_their_symmetry(name: str) -> None:
    with prepared_problem(name) as problem:
        vectors = torch.randn(2, sum(problem.dims))
        expected = products(problem, AutogradEngine(problem), vectors)
        single = problem.in_dtype(torch.float32)
        assert single.dtype == torch.float32
        for engine in (AutogradEngine(single), TracedEngine(single)):
            assert max(errors(single, engine, vectors, expected)) <= TOLERANCE[torch.float32]
        for (u, v), (hu, hv) in zip(vectors.split(problem.dims, dim=1), expected):
            torch.testing.assert_close(u @ hv, v @ hu, rtol=1e-9, atol=1e-13)


def test_curvlinops_has_the_same_blocks() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    with prepared_problem("attention") as problem:
        loss_fn, data = nn.CrossEntropyLoss(), problem.batches
        for number, name in enumerate(problem.parameters):
            parameters = [dict(problem.model.named_parameters())[name]]
            rival = curvlinops.HessianLinearOperator(problem.model, loss_fn, parameters, data)
            v = torch.randn(problem.dims[number])
            engine = AutogradEngine(problem)
            engine.prepare(0)
            torch.testing.assert_close(product(engine, number, v[None])[0], (rival @ v).to(v), rtol=1e-12, atol=1e-15)


# Gauss-Newton


def dense_gauss_newton(problem: Problem, outputs_and_loss: Any, name: str) -> Tensor:
    """J^T (d2 loss / dz2) J, all three written out."""
    parameter = problem.parameters[name]

    def outputs(w: Tensor) -> Tensor:
        return outputs_and_loss(lambda *a, **k: functional_call(problem.model, {name: w}, a, k))[0].flatten()

    z, loss_of = outputs_and_loss(problem.model)[0].detach(), outputs_and_loss(problem.model)[1]
    jacobian = torch.autograd.functional.jacobian(outputs, parameter.detach()).reshape(z.numel(), -1)
    inner = torch.autograd.functional.hessian(loss_of, z).reshape(z.numel(), z.numel())
    return jacobian.T @ inner @ jacobian


@pytest.mark.parametrize("name", ["mlp", "squared error", "GPT2LMHeadModel"])
def test_gauss_newton_products(name: str) -> None:
    with prepared_problem(name) as problem:
        (batch,) = problem.batches

        def outputs_and_loss(call: Any) -> tuple[Tensor, Any]:
            if ZOO[name].transformers:
                labels = batch["labels"][:, 1:].flatten()
                return call(**batch).logits, lambda z: F.cross_entropy(z[:, :-1].flatten(0, 1), labels)
            criterion = nn.MSELoss() if name == "squared error" else nn.CrossEntropyLoss()
            return call(batch[0]), lambda z: criterion(z, batch[1])

        names = [n for n in problem.parameters if problem.parameters[n].numel() < 30]
        vectors = torch.randn(1, sum(problem.dims))
        found = dict(zip(problem.parameters, products(problem, GaussNewtonEngine(problem), vectors)))
        parts = dict(zip(problem.parameters, vectors.split(problem.dims, dim=1)))
        tolerance = 1e-6 if ZOO[name].transformers else 1e-12
        dense = {n: dense_gauss_newton(problem, outputs_and_loss, n) for n in names}
        largest = max(float((parts[n] @ dense[n]).norm()) for n in names)
        for n in names:
            expected = parts[n] @ dense[n]
            assert float((found[n] - expected).norm()) <= tolerance * max(float(expected.norm()), 1e-2 * largest), n
            assert float(torch.linalg.eigvalsh(dense[n])[0]) >= -1e-6 * largest
            assert float((found[n] * parts[n]).sum()) >= -1e-12 * largest
        if name == "mlp":  # not the Hessian, except where the model is linear in the block
            hessian = dict(zip(problem.parameters, products(problem, AutogradEngine(problem), vectors)))
            torch.testing.assert_close(found["2.weight"], hessian["2.weight"], rtol=1e-12, atol=1e-14)
            assert float((found["0.weight"] - hessian["0.weight"]).norm()) > 1e-3 * largest


def test_gauss_newton_needs_outputs() -> None:
    with (
        prepared_problem("PINN") as problem,
        pytest.raises(TypeError, match=r"loss_fn must be a criterion .* got pinn.*loss_fn"),
    ):
        GaussNewtonEngine(problem)


# BatchNorm, wrappers, precision


def test_frozen_batch_statistics_are_eval_with_the_datas_averages() -> None:
    torch.manual_seed(1)
    model, data, loss_fn = ZOO["BatchNorm residual, frozen"].make()
    options: dict[str, Any] = {"num_probes": 1, "num_steps": 4}
    before = {name: b.clone() for name, b in model.named_buffers()}
    found = blockhess.spectrum(model, data, loss_fn, batchnorm="frozen_batch_stats", **options)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert found.provenance["batchnorm"] == "frozen_batch_stats"

    # The first layer's statistics by hand; those of the others depend on them, and are left to BatchNorm itself.
    conv = [model.conv1(x).transpose(0, 1).flatten(1) for x, _ in data]
    means = torch.stack([c.mean(1) for c in conv]).mean(0)
    variances = torch.stack([c.var(1) for c in conv]).mean(0)
    own = copy.deepcopy(model).train()
    for layer in own.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    for x, _ in data:
        own(x)
    torch.testing.assert_close((own.bn1.running_mean, own.bn1.running_var), (means, variances))
    expected = blockhess.spectrum(own, data, loss_fn, batchnorm="eval", **options)
    plain = blockhess.spectrum(model, data, loss_fn, batchnorm="eval", **options)
    for name in found.names:
        torch.testing.assert_close(found[name].nodes, expected[name].nodes)
    assert not torch.allclose(found["conv1.weight"].nodes, plain["conv1.weight"].nodes, rtol=1e-3)


def spectra_are_equal(a: blockhess.Spectra, b: blockhess.Spectra, rtol: float = 1e-10) -> bool:
    return a.names == b.names and all(torch.allclose(a[n].nodes, b[n].nodes, rtol=rtol, atol=rtol) for n in a.names)


def test_wrapped_models() -> None:
    model, data, loss_fn = ZOO["mlp"].make()
    options: dict[str, Any] = {"num_probes": 1, "num_steps": 4}
    expected = blockhess.spectrum(model, data, loss_fn, **options)
    wrapped = [torch.compile(model), nn.DataParallel(model)]
    with tempfile.NamedTemporaryFile() as store:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
        try:
            wrapped.append(nn.parallel.DistributedDataParallel(model))
            for each in wrapped:
                assert spectra_are_equal(blockhess.spectrum(each, data, loss_fn, **options), expected)
                one = {"0.weight": "module.0.weight"}
                assert blockhess.spectrum(each, data, loss_fn, blocks=one, **options).names == ("0.weight",)
        finally:
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["mlp", "LlamaForCausalLM"])
def test_half_precision_is_promoted(name: str, dtype: torch.dtype) -> None:
    if ZOO[name].transformers:
        pytest.importorskip("transformers")
    model, data, loss_fn = ZOO[name].make()
    model.to(dtype)
    options: dict[str, Any] = {"num_probes": 1, "num_steps": 2, "engine": "autograd"}
    found = blockhess.spectrum(model, data, loss_fn, **options)
    assert found.provenance["dtype"] == "float32"
    assert {p.dtype for p in model.parameters()} == {dtype}
    data = map_tensors(lambda t: t.float() if t.is_floating_point() else t, data)
    assert spectra_are_equal(found, blockhess.spectrum(copy.deepcopy(model).float(), data, loss_fn, **options), 1e-6)


def test_half_precision_as_it_is() -> None:
    model, (x, y), loss_fn = ZOO["mlp"].make()
    options: dict[str, Any] = {"num_probes": 1, "num_steps": 2}
    data, half = (x.bfloat16(), y), copy.deepcopy(model).bfloat16()
    rough = blockhess.spectrum(half, data, loss_fn, dtype=torch.bfloat16, **options)
    fine = blockhess.spectrum(half, data, loss_fn, **options)
    assert spectra_are_equal(rough, fine, 0.1) and not spectra_are_equal(rough, fine, 1e-4)
    assert max(rough.provenance["hvp_error"].values()) > 100 * max(fine.provenance["hvp_error"].values())
    with pytest.raises(ValueError, match=r"dtype must be float32 or float64 for parameters of torch.float64"):
        blockhess.spectrum(model, (x, y), loss_fn, dtype=torch.bfloat16, **options)


def test_float64_of_a_float32_model() -> None:
    model, (x, y), loss_fn = ZOO["mlp"].make()
    model.float()
    options: dict[str, Any] = {"num_probes": 1, "num_steps": 4}
    found = blockhess.spectrum(model, (x.float(), y), loss_fn, dtype=torch.float64, **options)
    expected = blockhess.spectrum(copy.deepcopy(model).double(), (x.float().double(), y), loss_fn, **options)
    assert found.provenance["dtype"] == "float64"
    assert spectra_are_equal(found, expected, 1e-12)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
