"""lanczos_step: hand numbers for the reference, then every backend against the reference."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from blockhess_ext import ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import FINISHED, NON_FINITE, RUNNING, Recurrences
from tests.helpers.recurrence_cases import STEPS, UNWRITTEN, Case, assert_same_state, mid_flight

IMPLEMENTATIONS = [reference.lanczos_step, ops.lanczos_step]


def first_step(H: torch.Tensor, v: torch.Tensor) -> Case:
    """The arguments of the first step of one recurrence with H."""
    layout = Layout.of([len(v)])
    recurrences = Recurrences.start(1, torch.tensor([100]))
    v = v[None]
    partial = torch.empty(1, layout.n_tiles, dtype=torch.float64)
    return Case(v @ H, v, torch.zeros_like(v), recurrences, layout, partial)


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
def test_hand_numbers(step, dtype):
    H = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=dtype)
    case = first_step(H, torch.tensor([1.0, 0.0], dtype=dtype))
    step(*case.arguments())
    assert case.recurrences.alpha[0].item() == 2.0  # <e1, H e1>
    assert case.recurrences.beta[0].item() == 1.0  # |H e1 - 2 e1|
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
    assert case.recurrences.alpha[0].item() == pytest.approx(scale, rel=1e-6)
    assert case.v_prev.tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize("exponent", [-130, -120, 0, 120, 127])
def test_the_next_vector_has_norm_one_if_one_over_beta_is_out_of_range(step, exponent, dtype):
    beta = 2.0**exponent  # its inverse is beyond float32, or has few digits there
    case = first_step(torch.tensor([[0.0, beta], [beta, 0.0]], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype))
    step(*case.arguments())
    assert case.recurrences.beta[0].item() == beta
    assert case.v_prev.tolist() == [[0.0, 1.0]]


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
def test_a_non_finite_recurrence_stops_and_the_others_continue(step, bad, dtype, rng):
    case = mid_flight(dtype, rng)
    clean = case.copy()
    case.w[0, case.layout.columns(5).stop - 1] = bad  # last element of a block of two tiles
    step(*case.arguments())
    step(*clean.arguments())
    assert case.recurrences.status[0, 5] == NON_FINITE
    assert case.recurrences.steps[0, 5] == 5
    assert case.recurrences.alpha[STEPS, 0, 5] == case.recurrences.beta[STEPS, 0, 5] == 0
    assert (case.v_prev[0, case.layout.columns(5)] == 0).all()
    case.v_prev[0, case.layout.columns(5)] = clean.v_prev[0, case.layout.columns(5)]
    assert torch.equal(case.v_prev, clean.v_prev)


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("scale", "status"),
    [(1e-300, NON_FINITE), (1e-121, NON_FINITE), (1e-119, RUNNING), (1e119, RUNNING), (1e121, NON_FINITE)],
)
def test_magnitudes_whose_squares_overflow_stop_the_recurrence(step, scale, status):
    H = scale * torch.tensor([[0.5, 1.0], [1.0, 0.5]], dtype=torch.float64)
    case = first_step(H, torch.tensor([1.0, 0.0], dtype=torch.float64))
    step(*case.arguments())
    r = case.recurrences
    assert r.status.item() == status
    assert r.beta[0].item() == pytest.approx(scale if status == RUNNING else 0.0)
    assert r.steps.item() == (status == RUNNING) and case.v_prev.isfinite().all()


def test_cpu_equals_reference(dtype, rng):
    case = mid_flight(dtype, rng)
    expected = case.copy()
    ops.lanczos_step(*case.arguments())
    reference.lanczos_step(*expected.arguments())
    assert_same_state(case, expected, rtol=8 * torch.finfo(dtype).eps)
    for untouched in ("w", "v"):
        assert torch.equal(getattr(case, untouched), getattr(expected, untouched))


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
def test_each_recurrence_writes_its_own_row_and_no_other(step, dtype, rng):
    case = mid_flight(dtype, rng)
    before, r = case.copy(), case.recurrences
    step(*case.arguments())
    for p, l in np.ndindex(*r.steps.shape):
        j, running = before.recurrences.steps[p, l], before.recurrences.status[p, l] == RUNNING
        for table, old in ((r.alpha, before.recurrences.alpha), (r.beta, before.recurrences.beta)):
            changed = (table[:, p, l] != old[:, p, l]).nonzero().flatten().tolist()
            assert changed == ([j] if running else [])
    assert r.steps[1, 5] == 1 and r.steps[1, 1] == STEPS  # the delayed recurrences


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
def test_the_first_step_has_no_previous_vector(step, dtype, rng):
    case = mid_flight(dtype, rng)
    other = case.copy()
    other.v_prev[1, case.layout.columns(5)] = 9.0
    for each in (case, other):
        step(*each.arguments())
    assert torch.equal(case.v_prev, other.v_prev)


@pytest.mark.parametrize("step", IMPLEMENTATIONS)
def test_a_recurrence_ends_with_the_last_row(step, dtype, rng):
    case = mid_flight(dtype, rng)
    r = case.recurrences
    r.limits.fill_(1000)
    r.steps[2, 5] = len(r.alpha) - 1
    step(*case.arguments())
    assert r.status[2, 5] == FINISHED and r.steps[2, 5] == len(r.alpha)
    assert (case.v_prev[2, case.layout.columns(5)] == 0).all()


@pytest.mark.parametrize("steps", [-1, 10, 2**40])
def test_steps_out_of_range_write_nothing(steps, dtype, rng):
    case = mid_flight(dtype, rng)
    r = case.recurrences
    r.steps[2] = steps
    ops.lanczos_step(*case.arguments())
    assert (r.alpha[:, 2] == UNWRITTEN).all() and (r.steps[2] == steps).all()
    assert (case.v_prev[2] == 0).all()


def test_blocks_with_a_basis_are_left_to_reorthogonalize(dtype, rng):
    case = mid_flight(dtype, rng, uneven=False)
    case.layout = case.layout.with_basis([False] * 5 + [True, False])
    plain = case.copy()
    plain.layout = plain.layout.with_basis([False] * 7)
    ops.lanczos_step(*case.arguments())
    ops.lanczos_step(*plain.arguments())
    columns = case.layout.columns(5)
    assert (case.recurrences.steps[:, 5] == 5).all()
    beta = case.recurrences.beta[STEPS, :, 5:6].to(dtype)
    torch.testing.assert_close(case.v_prev[:, columns] / beta, plain.v_prev[:, columns])
    case.v_prev[:, columns] = plain.v_prev[:, columns]
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
    a, b = results
    for x, y in zip((a.v_prev, *vars(a.recurrences).values()), (b.v_prev, *vars(b.recurrences).values())):
        assert torch.equal(x, y)


def test_a_segment_has_the_same_bits_alone_and_among_many(dtype, rng):
    """Alone it is split among all threads; among many, one thread computes it."""
    among = mid_flight(dtype, rng, dims=(100_003,) * 12, n_probes=2, uneven=False)
    r, columns = among.recurrences, among.layout.columns(5)
    own = {name: getattr(r, name)[..., 5:6].clone() for name in vars(r)}
    w, v, v_prev = (x[:, columns].clone() for x in (among.w, among.v, among.v_prev))
    layout = Layout.of([100_003])
    alone = Case(w, v, v_prev, Recurrences(**own), layout, torch.empty(2, layout.n_tiles, dtype=torch.float64))
    for each in (among, alone):
        ops.lanczos_step(*each.arguments())
    assert torch.equal(among.v_prev[:, columns], alone.v_prev)
    assert torch.equal(r.beta[..., 5:6], alone.recurrences.beta)


def test_opcheck(dtype, rng):
    case = mid_flight(dtype, rng, dims=(3, 1, 5, 2), n_probes=2)
    r, layout = case.recurrences, case.layout
    tables = (layout.basis_offsets, layout.offsets, layout.tiles, layout.tile_offsets)
    arguments = (case.w, case.v, case.v_prev, *vars(r).values(), *tables, case.partial)
    torch.library.opcheck(torch.ops.blockhess_ext.lanczos_step.default, arguments)


def test_memory_is_guarded(rng):
    case = mid_flight(torch.float32, rng)
    case.recurrences = replace(case.recurrences, beta=case.recurrences.beta[:9].contiguous())
    with pytest.raises(RuntimeError, match=r"lanczos_step: beta must have shape \(10, 3, 7\), got \(9, 3, 7\)"):
        ops.lanczos_step(*case.arguments())
    case = mid_flight(torch.float32, rng)
    case.recurrences = replace(case.recurrences, alpha=case.recurrences.alpha[0])
    with pytest.raises(RuntimeError, match="lanczos_step: alpha must have 3 dimensions, got 2"):
        ops.lanczos_step(*case.arguments())
    case = mid_flight(torch.float32, rng)
    case.v = case.v.double()
    with pytest.raises(RuntimeError, match="lanczos_step: v must be Float, got Double"):
        ops.lanczos_step(*case.arguments())
    case = mid_flight(torch.float32, rng)
    case.v_prev = case.v_prev.t().contiguous().t()
    with pytest.raises(RuntimeError, match="lanczos_step: v_prev must be contiguous"):
        ops.lanczos_step(*case.arguments())
