"""reorthogonalize: orthogonal to the basis to rounding, and equal to the reference."""

from __future__ import annotations

import math

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blockhess_ext import ops, reference
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import FINISHED, RUNNING
from tests.helpers.recurrence_cases import Case, assert_same_state, mid_flight

STORED = [False, True, True, False, True, True, False]
COUNT = 2


def prepared(dtype: torch.dtype, rng: torch.Generator) -> tuple[Case, torch.Tensor]:
    """A case after lanczos_step, and an orthonormal basis of COUNT rows for the blocks that store one."""
    case = mid_flight(dtype, rng, steps=COUNT - 1, uneven=False)
    case.layout = case.layout.with_basis(STORED)
    basis = torch.zeros(4, 3, case.layout.n_basis, dtype=dtype)
    for p in range(3):
        for l, stored in enumerate(STORED):
            if stored:
                columns = case.layout.basis_columns(l)
                q, _ = torch.linalg.qr(torch.randn(case.layout.dims[l], COUNT, generator=rng, dtype=torch.float64))
                basis[:COUNT, p, columns] = q.T.to(dtype)
    ops.lanczos_step(*case.arguments())
    case.partial = torch.empty(3, case.layout.n_tiles, 5, dtype=torch.float64)
    return case, basis


def run(op, case: Case, basis: torch.Tensor, project: torch.Tensor | None = None) -> None:
    op(case.v_prev, basis, case.recurrences, case.layout, case.partial, project)


def test_result_is_orthogonal_to_the_basis_and_of_norm_one(dtype, rng):
    case, basis = prepared(dtype, rng)
    run(ops.reorthogonalize, case, basis)
    eps = torch.finfo(dtype).eps
    for p in range(3):
        for l in (2, 4, 5):
            v = case.v_prev[p, case.layout.columns(l)].double()
            V = basis[:COUNT, p, case.layout.basis_columns(l)].double()
            if case.recurrences.status[p, l] == RUNNING:
                assert (V @ v).abs().max() <= 4 * eps
                assert abs(v.norm() - 1) <= 4 * eps
                assert torch.equal(basis[COUNT, p, case.layout.basis_columns(l)], v.to(dtype))


def test_one_pass_would_not_be_enough(dtype, rng):
    """A residual almost in the span of the basis: rounding of the first pass is large relative to the remainder."""
    case, basis = prepared(dtype, rng)
    eps, l = torch.finfo(dtype).eps, 5
    case.recurrences.norm[0, l] = 1e-3  # small enough that the residual does not count as zero
    columns = case.layout.basis_columns(l)
    q0, q1 = basis[:COUNT, 0, columns].double()
    outside = torch.randn(len(q0), generator=rng, dtype=torch.float64)
    r = q0 + q1 + 1e3 * eps * outside / outside.norm()
    case.v_prev[0, case.layout.columns(l)] = r.to(dtype)
    case.recurrences.alpha[COUNT - 1, 0, l] = 0.0
    run(ops.reorthogonalize, case, basis)
    v = case.v_prev[0, case.layout.columns(l)].double()
    assert case.recurrences.status[0, l] == RUNNING
    assert (basis[:COUNT, 0, columns].double() @ v).abs().max() <= 8 * eps


def test_a_residual_inside_the_basis_finishes(dtype, rng):
    case, basis = prepared(dtype, rng)
    l = 5
    inside = 0.3 * basis[0, 0, case.layout.basis_columns(l)] - 0.2 * basis[1, 0, case.layout.basis_columns(l)]
    case.v_prev[0, case.layout.columns(l)] = inside
    run(ops.reorthogonalize, case, basis)
    assert case.recurrences.status[0, l] == FINISHED
    assert case.recurrences.steps[0, l] == COUNT
    assert (case.v_prev[0, case.layout.columns(l)] == 0).all()
    assert (basis[COUNT, 0, case.layout.basis_columns(l)] == 0).all()


def test_each_recurrence_uses_the_rows_that_it_has_filled(dtype, rng):
    """One has filled one row less than the others, one all rows; unfilled rows are NaN and must not be read."""
    case, basis = prepared(dtype, rng)
    r, behind, full = case.recurrences, case.layout.basis_columns(4), case.layout.basis_columns(5)
    r.steps[0, 4], r.steps[2, 5] = COUNT - 2, len(basis) - 1
    basis[COUNT - 1 :, 0, behind] = math.nan
    basis[COUNT:, 2, full] = 0.0
    last = basis[-1, 2, full].clone()
    run(ops.reorthogonalize, case, basis)
    v = case.v_prev[0, case.layout.columns(4)]
    assert v.isfinite().all() and torch.equal(basis[COUNT - 1, 0, behind], v)
    assert abs(basis[0, 0, behind].double() @ v.double()) <= 4 * torch.finfo(dtype).eps
    assert r.steps[0, 4] == COUNT - 1 and r.steps[2, 5] == len(basis)
    assert torch.equal(basis[-1, 2, full], last)  # there is no row for the next vector


def test_cpu_equals_reference(dtype, rng):
    case, basis = prepared(dtype, rng)
    expected, expected_basis = case.copy(), basis.clone()
    run(ops.reorthogonalize, case, basis)
    run(reference.reorthogonalize, expected, expected_basis)
    rtol = 16 * torch.finfo(dtype).eps
    assert_same_state(case, expected, rtol)
    torch.testing.assert_close(basis, expected_basis, rtol=rtol, atol=rtol)


def test_without_projections_the_residual_is_only_normalized(dtype, rng):
    case, basis = prepared(dtype, rng)
    project = torch.ones_like(case.recurrences.status)
    project[0] = 0
    everywhere, everywhere_basis = case.copy(), basis.clone()
    run(ops.reorthogonalize, everywhere, everywhere_basis)
    expected, expected_basis = case.copy(), basis.clone()
    run(reference.reorthogonalize, expected, expected_basis, project)
    before = case.copy()
    run(ops.reorthogonalize, case, basis, project)
    rtol = 16 * torch.finfo(dtype).eps
    assert_same_state(case, expected, rtol)
    torch.testing.assert_close(basis, expected_basis, rtol=rtol, atol=rtol)
    columns, row = case.layout.columns(5), case.layout.basis_columns(5)
    r = before.v_prev[0, columns].double()
    torch.testing.assert_close(case.v_prev[0, columns], (r / r.norm()).to(dtype), rtol=rtol, atol=rtol)
    assert torch.equal(basis[COUNT, 0, row], case.v_prev[0, columns])
    assert torch.equal(case.recurrences.beta[:, 0, 5], before.recurrences.beta[:, 0, 5])
    assert torch.equal(case.v_prev[1:], everywhere.v_prev[1:])
    assert not torch.equal(case.v_prev[0, columns], everywhere.v_prev[0, columns])


def test_same_bits_for_one_and_two_threads(dtype, rng):
    case, basis = prepared(dtype, rng)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            one, one_basis = case.copy(), basis.clone()
            run(ops.reorthogonalize, one, one_basis)
        finally:
            torch.set_num_threads(before)
        results.append((one.v_prev, one.recurrences.beta, one_basis))
    for a, b in zip(*results):
        assert torch.equal(a, b)


def test_scratch_follows_the_running_recurrences(dtype, rng):
    """Of a batch with many ended recurrences, most of it is neither read nor written."""
    case, basis = prepared(dtype, rng)
    case.recurrences.status[:] = FINISHED
    case.recurrences.status[2, 5] = RUNNING
    case.partial.fill_(-1)
    run(ops.reorthogonalize, case, basis)
    assert (case.partial != -1).sum() <= (COUNT + 1) * case.layout.n_tiles
    assert (case.partial[1:] == -1).all()


def test_opcheck(dtype, rng):
    case, basis = prepared(dtype, rng)
    r, layout = case.recurrences, case.layout
    stored = (case.v_prev, basis, layout.basis_offsets, layout.basis_tiles)
    tables = (layout.offsets, layout.tiles, layout.tile_offsets, case.partial)
    for project in (None, torch.ones_like(r.status)):
        arguments = (*stored, *vars(r).values(), project, *tables)
        torch.library.opcheck(torch.ops.blockhess_ext.reorthogonalize.default, arguments)


def test_a_call_makes_no_tensor(dtype, rng):
    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            called.append(str(op))
            return op(*args, **(kwargs or {}))

    called: list[str] = []
    case, basis = prepared(dtype, rng)
    with Operations():
        run(ops.reorthogonalize, case, basis)
    assert [name for name in called if "reorthogonalize" not in name] == []


def test_the_tiles_in_the_basis():
    layout = Layout.of((3, 70_000, 5, 40_000)).with_basis([False, True, False, True])
    assert layout.basis_tiles.tolist() == [1, 2, 3, 5, 6]
    assert layout.with_basis([False] * 4).basis_tiles.tolist() == []
