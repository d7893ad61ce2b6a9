"""bench/end_to_end/fixed_budget.py: rivals are compared, and times add up."""

from __future__ import annotations

import pytest

from bench.end_to_end import fixed_budget, slices
from blockhess.problem.model_state import fixed_state
from tests.bench.cases import TINY, small_case


def test_a_wrong_js_matrix_is_detected(monkeypatch):
    case = small_case()
    with fixed_state(case.model):
        found = fixed_budget.compared(case, "autograd")
    error, failure = found["the paper's procedure"]
    assert error < fixed_budget.LARGEST_JS_ERROR and not failure
    right = slices.RIVALS["the paper's procedure"]

    class Off(right):
        def of_block(self, name):
            product = super().of_block(name)
            return lambda v: (4.0 if "tok" in name else 1.0) * product(v)

    monkeypatch.setitem(slices.RIVALS, "the paper's procedure", Off)
    monkeypatch.setattr(fixed_budget, "PEERS", ("the paper's procedure",))
    row = fixed_budget.job_row(TINY, lambda _: fixed_budget._small_gpt())
    refused = row.times["the paper's procedure"]
    assert refused["failure"].startswith("wrong by ") and refused["error"] > 5 * fixed_budget.LARGEST_JS_ERROR
    assert "times faster than the paper's procedure, cold" not in row.measured


def test_time_without_products(monkeypatch):
    monkeypatch.setattr(fixed_budget, "PEERS", ("the paper's procedure",))
    row = fixed_budget.job_row(TINY, fixed_budget.gpt_nano)
    first, last = row.times["blockhess"]["first_ms"] / 1e3, row.measured
    others = last["set-up, cold, s"] + last["Lanczos and quadratures, s"] + last["JS matrix, s"]
    assert last["share of all but products, cold"] == pytest.approx(others / first)
    assert last["times faster than the paper's procedure, cold"] == pytest.approx(
        row.times["the paper's procedure"]["first_ms"] / 1e3 / first
    )
    # 8 of 11 blocks have fewer than 1,000 entries; only ours computes them exactly.
    assert last["products"] < last["products of rivals"] <= 11 * 1000
    _, targets = fixed_budget.ROWS["end to end, 10 x 100, GPT2-nano (10.7M), 1,024 tokens"]
    assert all(target.quantity in row.measured for target in targets)
