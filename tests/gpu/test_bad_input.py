"""Invalid arguments on a GPU raise errors that name them, and the device stays usable."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from blockhess_ext import batched_slq, ops
from blockhess_ext.layout import Layout
from tests.gpu import device
from tests.gpu.cases import SHORT, combinations, density_arguments, projection, step_case, tridiagonals
from tests.gpu.device import on

device.require()


@pytest.fixture(autouse=True)
def _device_still_works():
    yield
    torch.cuda.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3


@pytest.mark.parametrize("name", ["v", "v_prev", "alpha", "beta", "steps", "status", "partial"])
def test_a_tensor_left_on_the_cpu(name):
    case = on("cuda", step_case(torch.float32, SHORT))
    if name in vars(case):
        setattr(case, name, getattr(case, name).cpu())
    else:
        case.recurrences = replace(case.recurrences, **{name: getattr(case.recurrences, name).cpu()})
    with pytest.raises(RuntimeError, match=f"lanczos_step: {name} must be on the device of the first argument"):
        ops.lanczos_step(*case.arguments())


def test_a_layout_left_on_the_cpu():
    case = on("cuda", step_case(torch.float32, SHORT))
    case.layout = on("cpu", case.layout)
    with pytest.raises(RuntimeError, match=r"lanczos_step: .* must be on the device of the first argument"):
        ops.lanczos_step(*case.arguments())


def test_the_first_argument_left_on_the_cpu():
    case = on("cuda", step_case(torch.float32, SHORT))
    case.w = case.w.cpu()
    with pytest.raises(RuntimeError, match=r"lanczos_step: .* must be on the device of the first argument"):
        ops.lanczos_step(*case.arguments())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_vectors_of_another_dtype(dtype):
    case = on("cuda", step_case(torch.float32, SHORT))
    case.w = case.w.nan_to_num().to(dtype)
    with pytest.raises(RuntimeError, match="lanczos_step: vectors must be float32 or float64, got"):
        ops.lanczos_step(*case.arguments())


def test_mixed_dtypes():
    case = on("cuda", step_case(torch.float32, SHORT))
    case.v = case.v.double()
    with pytest.raises(RuntimeError, match="lanczos_step: v must be Float, got Double"):
        ops.lanczos_step(*case.arguments())


def test_non_contiguous_vectors():
    case = on("cuda", step_case(torch.float32, SHORT))
    case.v_prev = case.v_prev.t().contiguous().t()
    with pytest.raises(RuntimeError, match="lanczos_step: v_prev must be contiguous"):
        ops.lanczos_step(*case.arguments())
    start = on("cuda", projection(torch.float32, SHORT, 3, 5))
    start.basis = start.basis.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(RuntimeError, match="reorthogonalize: basis must be contiguous"):
        start.run(ops)


def test_wrong_shapes():
    start = on("cuda", projection(torch.float32, SHORT, 3, 5))
    start.basis = start.basis[0]
    with pytest.raises(RuntimeError, match="reorthogonalize: basis must have 3 dimensions, got 2"):
        start.run(ops)
    alpha, beta, steps = on("cuda", tridiagonals(4))
    with pytest.raises(RuntimeError, match="tridiag_quadrature: beta must have shape"):
        ops.tridiag_quadrature(alpha, beta[:, :3].contiguous(), steps)
    with pytest.raises(RuntimeError, match="tridiag_quadrature: alpha must be Double, got Float"):
        ops.tridiag_quadrature(alpha.float(), beta, steps)
    nodes, weights, grid, sigma = on("cuda", density_arguments())
    with pytest.raises(RuntimeError, match="gaussian_density: grid must be on the device of the first argument"):
        ops.gaussian_density(nodes, weights, grid.cpu(), sigma)
    combination = combinations(torch.float32, "cuda")[0]
    combination.bases[1] = combination.bases[1].cpu()
    with pytest.raises(RuntimeError, match=r"linear_combination: bases\[1\] must be on the device of out"):
        combination.after(ops)
    layout = Layout.of(SHORT, "cuda")
    with pytest.raises(RuntimeError, match="random_probes: block_ids must be on the device of the first argument"):
        ops.random_probes(layout, 2, seed=0, block_ids=torch.arange(len(SHORT)))


def test_a_problem_that_is_not_finite_is_named():
    alpha, beta, steps = on("cuda", tridiagonals(4))
    alpha[1, 2] = float("nan")
    with pytest.raises(RuntimeError, match="problem 1 does not"):
        ops.tridiag_quadrature(alpha, beta, steps)
    steps[0] = 5
    with pytest.raises(RuntimeError, match="problem 0 does not"):
        ops.tridiag_quadrature(alpha, beta, steps)


def test_an_operator_on_the_wrong_device():
    with pytest.raises(ValueError, match=r"hvp\(v\) must return device cuda:0, got cpu"):
        batched_slq(lambda v: v.cpu(), [3], device="cuda")


def test_a_device_that_is_not_there():
    missing = torch.cuda.device_count()
    with pytest.raises(ValueError, match=rf"CUDA devices that torch sees, got cuda:{missing}"):
        batched_slq(lambda v: v, [3], device=f"cuda:{missing}")
