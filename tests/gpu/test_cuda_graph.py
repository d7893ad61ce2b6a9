"""The loop replayed from CUDA graphs equals the eager loop bitwise, with and without the product in the graphs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from blockhess_ext import batched_slq
from tests.gpu import device
from tests.gpu.device import assert_near, assert_same_bits
from tests.gpu.test_slq import DIMS, GROWTH, Dense, results
from tests.helpers.replay_cases import STEPS, Operator, run

device.require()


@pytest.mark.parametrize("reorthogonalize", ["none", "full", "partial", "auto"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_replayed_loop_has_the_same_bits(reorthogonalize, capturable, dtype):
    options = {"reorthogonalize": reorthogonalize, "dtype": dtype, "device": "cuda"}
    expected = run(Operator(dtype, where="cuda"), **options)
    assert expected[-1].sum() == 1  # a recurrence becomes non-finite in a replay
    for _ in range(3):
        operator = Operator(dtype, capturable, "cuda")
        assert_same_bits(run(operator, cuda_graph=True, **options), expected)
        assert operator.calls == (5 if capturable else STEPS)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 6])
def test_few_steps(num_steps):
    options = {"num_steps": num_steps, "device": "cuda"}
    got = run(Operator(capturable=True, where="cuda"), cuda_graph=True, **options)
    assert_same_bits(got, run(Operator(where="cuda"), **options))


def test_on_another_stream():
    expected = run(Operator(where="cuda"), device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = run(Operator(capturable=True, where="cuda"), device="cuda", cuda_graph=True)
        assert torch.cuda.current_stream() == stream
    stream.synchronize()
    assert_same_bits(got, expected)


def test_a_product_by_cublas(dtype):
    options = {"num_probes": 2, "num_steps": 12, "reorthogonalize": "full", "dtype": dtype, "device": "cuda"}
    plain, captured = Dense("cuda", dtype), Dense("cuda", dtype)
    captured.capturable = True
    got = batched_slq(captured, DIMS, cuda_graph=True, **options)
    assert captured.calls == 5
    assert_near(results(got), results(batched_slq(plain, DIMS, **options)), GROWTH * torch.finfo(dtype).eps)


class DoubleBackward:
    """A Hessian-vector product by autograd that builds its whole graph inside the call."""

    capturable = True

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(64, 6, generator=generator, dtype=torch.float64).cuda()
        self.weight = torch.randn(18, generator=generator, dtype=torch.float64).cuda()

    def __call__(self, v: Tensor) -> Tensor:
        with torch.enable_grad():
            weight = self.weight.clone().requires_grad_()
            loss = nn.functional.softplus(self.x @ weight.view(6, 3)).square().mean()
            (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
            rows = [torch.autograd.grad(gradient, weight, row, retain_graph=True)[0] for row in v]
        return torch.stack(rows)


def test_a_product_by_autograd():
    options = {"num_probes": 2, "num_steps": 10, "reorthogonalize": "full", "dtype": torch.float64, "device": "cuda"}
    got, expected = (batched_slq(DoubleBackward(), [18], cuda_graph=graph, **options) for graph in (True, False))
    assert_near([got.nodes, got.weights], [expected.nodes, expected.weights], GROWTH * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize(("capturable", "sets"), [(True, 3), (False, 4)])
def test_memory(capturable, sets):
    n, probes = 2**22, 4
    scales = torch.linspace(-1, 2, n, device="cuda")

    def hvp(v: Tensor) -> Tensor:
        return v * scales

    hvp.capturable = capturable
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    batched_slq(hvp, [n], num_probes=probes, num_steps=12, reorthogonalize="none", device="cuda", cuda_graph=True)
    used = torch.cuda.max_memory_allocated() - before
    assert used <= sets * probes * n * 4 + 2**24
    assert torch.cuda.memory_allocated() <= before + 2**20


def test_an_operator_that_is_not_capturable_raises():
    """In a subprocess: torch does not guarantee that a process continues after a failed capture."""
    program = """
import torch
from blockhess_ext import batched_slq
def hvp(v):
    v.sum().item()
    return v * torch.arange(1.0, 31.0, device="cuda")
hvp.capturable = True
user = torch.cuda.current_stream()
try:
    batched_slq(hvp, [30], device="cuda", cuda_graph=True)
except RuntimeError as error:
    assert torch.cuda.current_stream() == user
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "hvp must support capture in a CUDA graph if hvp.capturable is True" in done.stdout, done.stderr


def test_an_error_in_the_operator_during_a_capture():
    """A Python exception ends the capture cleanly, and the process continues."""
    calls = []

    def hvp(v: Tensor) -> Tensor:
        calls.append(v)
        if len(calls) == 3:
            raise KeyError("mine")
        return v * torch.arange(1.0, 31.0, device="cuda")

    hvp.capturable = True
    with pytest.raises(KeyError, match="mine"):
        batched_slq(hvp, [30], device="cuda", cuda_graph=True)
    assert_same_bits(
        run(Operator(where="cuda", capturable=True), device="cuda", cuda_graph=True),
        run(Operator(where="cuda"), device="cuda"),
    )
