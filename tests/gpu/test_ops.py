"""Each op on the GPU equals its CPU implementation and the reference, bitwise the same for misaligned vectors."""

from __future__ import annotations

import pytest
import torch

from blockhess_ext import ops, reference
from blockhess_ext.recurrences import FINISHED, NON_FINITE, RUNNING
from tests.gpu import device
from tests.gpu.cases import (
    MANY,
    N_PROBES,
    RAGGED,
    SHORT,
    VECTORS,
    combinations,
    density_arguments,
    probes_of,
    projection,
    shifted,
    state,
    step_case,
    tridiagonals,
)
from tests.gpu.device import DEVICE, assert_near, assert_same_bits, on
from tests.helpers.combination_cases import random_combination

device.require(cuda=False)


@pytest.mark.parametrize("dims", [RAGGED, SHORT, MANY], ids=["ragged", "short", "many"])
def test_lanczos_step(dims, dtype):
    on_cpu, expected = step_case(dtype, dims), step_case(dtype, dims)
    case = on(DEVICE, on_cpu)
    before = on("cpu", case)
    ops.lanczos_step(*case.arguments())
    device.synchronize()
    ops.lanczos_step(*on_cpu.arguments())
    reference.lanczos_step(*expected.arguments())
    rtol = 16 * torch.finfo(dtype).eps
    assert_near(state(case), state(on_cpu), rtol)
    assert_near(state(case), state(expected), rtol)
    assert_same_bits([case.w, case.v], [before.w, before.v])
    status = case.recurrences.status
    assert status[0, 5] == status[0, 2] == FINISHED and status[1, -1] == NON_FINITE
    assert (status == RUNNING).sum() >= 5


@pytest.mark.parametrize("dims", [RAGGED, SHORT], ids=["ragged", "short"])
@pytest.mark.parametrize("by", [1, 2, 3])
def test_lanczos_step_off_alignment_has_the_same_bits(dims, by, dtype):
    aligned = on(DEVICE, step_case(dtype, dims))
    moved = shifted(on(DEVICE, step_case(dtype, dims)), by)
    for case in (aligned, moved):
        ops.lanczos_step(*case.arguments())
    assert_same_bits(state(moved), state(aligned))
    assert all(device.margins_untouched(getattr(moved, name)) for name in VECTORS)


@pytest.mark.parametrize(
    ("dims", "count", "capacity"),
    [(SHORT, 1, 1), (SHORT, 8, 9), (SHORT, 9, 9), (SHORT, 17, 18), (RAGGED, 3, 3), (RAGGED, 9, 10)],
)
def test_reorthogonalize(dims, count, capacity, dtype):
    start = projection(dtype, dims, count, capacity)
    runs = [on(DEVICE, start), on(DEVICE, start), on("cpu", start), on("cpu", start)]
    runs[1].case = shifted(runs[1].case, 1)
    runs[1].basis = device.misaligned(runs[1].basis, 3)
    for run, backend in zip(runs, (ops, ops, ops, reference), strict=True):
        run.run(backend)
    got, moved, on_cpu, expected = (run.results() for run in runs)
    rtol = 32 * torch.finfo(dtype).eps
    assert_near(got, on_cpu, rtol)
    assert_near(got, expected, rtol)
    assert_same_bits(moved, got)
    assert device.margins_untouched(runs[1].basis) and device.margins_untouched(runs[1].case.v_prev)


@pytest.mark.parametrize("m", [1, 2, 3, 40, 100, 1000])
def test_tridiag_quadrature(m):
    problems = tridiagonals(m)
    nodes, weights = (x.cpu() for x in ops.tridiag_quadrature(*on(DEVICE, problems)))
    eps = torch.finfo(torch.float64).eps
    for true_nodes, true_weights in (ops.tridiag_quadrature(*problems), reference.tridiag_quadrature(*problems)):
        scale = true_nodes.abs().amax(1, keepdim=True).clamp(min=1e-300)
        assert ((nodes - true_nodes).abs() / scale).max() <= 8 * m * eps
        assert (nodes.diff() >= 0).all()
        for power in range(4):  # moments, since single weights of clustered nodes are not determined
            got, expected = (
                (w * (n / scale) ** power).sum(1) for n, w in [(nodes, weights), (true_nodes, true_weights)]
            )
            torch.testing.assert_close(got, expected, rtol=16 * m * eps, atol=16 * m * eps)


def test_gaussian_density():
    arguments = density_arguments()
    got = ops.gaussian_density(*on(DEVICE, arguments)).cpu()
    sigma = arguments[-1]
    for expected in (ops.gaussian_density(*arguments), reference.gaussian_density(*arguments)):
        assert ((got - expected).abs().amax(1) <= 1e-12 / sigma).all()


def test_linear_combination(dtype):
    for case in [*combinations(dtype), *(random_combination(seed, dtype) for seed in range(100))]:
        got = on(DEVICE, case).after(ops).cpu()
        for backend in (ops, reference):
            assert ((got - case.after(backend)).abs() <= case.rounding()).all()


@pytest.mark.parametrize("by", [1, 2, 3])
def test_linear_combination_off_alignment_has_the_same_bits(by, dtype):
    aligned, moved = ([case.after(ops) for case in combinations(dtype, DEVICE, shift)] for shift in (0, by))
    assert_same_bits(moved, aligned)


@pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)
def test_random_probes(distribution, dtype):
    got = probes_of(DEVICE, distribution, dtype).cpu()
    # Norms are sums of up to 65,539 terms, in an order that depends on the backend; log and cos differ by some ulp.
    eps = torch.finfo(dtype).eps
    size = torch.cat([torch.full((dim,), dim**-0.5, dtype=dtype) for dim in RAGGED])
    for backend in (ops, reference):
        expected = probes_of("cpu", distribution, dtype, backend)
        assert ((got - expected).abs() <= 64 * eps * expected.abs() + 8 * eps * size).all()
        if distribution == "rademacher" and backend is ops:
            assert torch.equal(got, expected)
    assert got.shape == (N_PROBES, sum(RAGGED))
