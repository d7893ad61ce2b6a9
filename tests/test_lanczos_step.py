"""lanczos_step: hand numbers for the reference, then every backend against the reference."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess_ext import ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import FINISHED, NON_FINITE, RUNNING, Recurrences
from tests.recurrence_cases import Case, assert_same_state, mid_flight

IMPLEMENTATIONS = [reference.lanczos_step, ops.lanczos_step]


def first_step(H: torch.Tensor, v: torch.Tensor) -> Case:
    """The arguments of the first step of one recurrence with H."""
    layout = Layout.of([len(v)])
    zero = torch.zeros(1, 1, dtype=torch.float64)
    recurrences = Recurrences.start(1, torch.tensor([100]))
    v = v[None]
    partial = zero.new_empty(1, layout.n_tiles)
    return Case(v @ H, v, torch.zeros_like(v), zero, zero.clone(), zero.clone(), recurrences, layout, partial)


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
def test_hand_numbers(step, dtype):
    H = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=dtype)
    case = first_step(H, torch.tensor([1.0, 0.0], dtype=dtype))
    step(*case.arguments())
    assert case.alpha.item() == 2.0  # <e1, H e1>
    assert case.beta.item() == 1.0  # |H e1 - 2 e1|
    assert case.v_prev.tolist() == [[0.0, 1.0]]
    assert case.recurrences.norm.item() == 2.0
    assert case.recurrences.steps.item() == 1
    assert case.recurrences.status.item() == RUNNING


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_an_eigenvector_finishes_at_any_scale(step, scale, dtype):
    v = torch.tensor([0.6, 0.8], dtype=dtype)
    case = first_step(scale * torch.eye(2, dtype=dtype), v)
    step(*case.arguments())
    assert case.recurrences.status.item() == FINISHED
    assert case.recurrences.steps.item() == 1
    assert case.alpha.item() == pytest.approx(scale, rel=1e-6)
    assert case.v_prev.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
def test_the_threshold_is_64_eps_of_the_running_norm(step, dtype):
    eps = torch.finfo(dtype).eps
    for beta, status in [(63 * eps, FINISHED), (66 * eps, RUNNING)]:
        H = torch.tensor([[1.0, beta], [beta, 1.0]], dtype=dtype)
        case = first_step(H, torch.tensor([1.0, 0.0], dtype=dtype))
        step(*case.arguments())
        assert case.recurrences.status.item() == status


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_recurrence_that_is_not_finite_is_frozen_and_the_others_go_on(step, bad, dtype, rng):
    case, clean = mid_flight(dtype, rng), None
    clean = case.copy()
    case.w[0, case.layout.columns(5).stop - 1] = bad  # last element of a block of two tiles
    step(*case.arguments())
    step(*clean.arguments())
    assert case.recurrences.status[0, 5] == NON_FINITE
    assert case.recurrences.steps[0, 5] == 5
    assert case.alpha[0, 5] == case.beta[0, 5] == 0
    assert (case.v_prev[0, case.layout.columns(5)] == 0).all()
    case.v_prev[0, case.layout.columns(5)] = clean.v_prev[0, case.layout.columns(5)]
    assert torch.equal(case.v_prev, clean.v_prev)


def test_cpu_equals_reference(dtype, rng):
    case = mid_flight(dtype, rng)
    expected = case.copy()
    ops.lanczos_step(*case.arguments())
    reference.lanczos_step(*expected.arguments())
    assert_same_state(case, expected, rtol=8 * torch.finfo(dtype).eps)
    for untouched in ("w", "v", "beta_prev"):
        assert torch.equal(getattr(case, untouched), getattr(expected, untouched))


def test_blocks_with_a_basis_are_left_to_reorthogonalize(dtype, rng):
    case = mid_flight(dtype, rng)
    case.layout = case.layout.with_basis([False] * 5 + [True, False])
    plain = case.copy()
    plain.layout = plain.layout.with_basis([False] * 7)
    ops.lanczos_step(*case.arguments())
    ops.lanczos_step(*plain.arguments())
    kept = case.layout.columns(5)
    assert (case.recurrences.steps[:, 5] == 5).all()
    torch.testing.assert_close(case.v_prev[:, kept] / case.beta[:, 5:6].to(dtype), plain.v_prev[:, kept])
    case.v_prev[:, kept] = plain.v_prev[:, kept]
    assert torch.equal(case.v_prev, plain.v_prev)


def test_same_bits_for_one_and_two_threads(dtype, rng):
    case = mid_flight(dtype, rng)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            run = case.copy()
            ops.lanczos_step(*run.arguments())
        finally:
            torch.set_num_threads(before)
        results.append(run)
    for name in ("alpha", "beta", "v_prev"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name))


def test_opcheck(dtype, rng):
    case = mid_flight(dtype, rng, dims=(3, 1, 5, 2), n_probes=2)
    r, layout = case.recurrences, case.layout
    arguments = (case.w, case.v, case.v_prev, case.beta_prev, case.alpha, case.beta, r.norm, r.steps, r.status)
    tables = (layout.basis_offsets, layout.offsets, layout.tiles, layout.tile_offsets)
    torch.library.opcheck(torch.ops.blockhess_ext.lanczos_step.default, (*arguments, r.limits, *tables, case.partial))


def test_memory_is_guarded(rng):
    case = mid_flight(torch.float32, rng)
    case.alpha = case.alpha[:, :-1].contiguous()
    with pytest.raises(RuntimeError, match=r"lanczos_step: alpha must have shape \(3, 7\), got \(3, 6\)"):
        ops.lanczos_step(*case.arguments())
    case = mid_flight(torch.float32, rng)
    case.v = case.v.double()
    with pytest.raises(RuntimeError, match="lanczos_step: v must be Float, got Double"):
        ops.lanczos_step(*case.arguments())
    case = mid_flight(torch.float32, rng)
    case.v_prev = case.v_prev.t().contiguous().t()
    with pytest.raises(RuntimeError, match="lanczos_step: v_prev must be contiguous"):
        ops.lanczos_step(*case.arguments())
