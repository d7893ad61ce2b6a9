"""bench/hvp/one_pass.py: calls and set-up are counted where they occur, and every target has its quantity."""

from __future__ import annotations

import subprocess
import time

import pytest
import torch

from bench.harness.rows import Row
from bench.hvp import one_pass
from tests import ROOT
from tests.bench.cases import TINY


def test_calls_count_views_but_kernels_do_not():
    with one_pass.Calls() as counted:
        torch.ones(2, 3).mT.exp()
    assert counted.count == 3 and counted.work.launches == 2


def test_all_rows_together_take_fewer_calls_than_a_product_at_a_time(monkeypatch):
    monkeypatch.setattr(one_pass, "planned_rows", lambda *_: 1)
    found = one_pass.calls(TINY).measured
    assert found["kernels, all rows together"] < found["kernels, planned rows"] / 10
    assert found["kernels, planned rows"] < found["kernels, autograd"]
    assert all(found[name] < found[name.replace("kernels", "calls with views")] for name in found if "kernels" in name)


def test_setup_contains_what_the_first_step_takes_longer(monkeypatch):
    class Slow(one_pass.TracedEngine):
        """Takes 0.3 s to make, 0.4 s to prepare for the first time, and 0.1 s for the products of every step."""

        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            time.sleep(0.3)
            self.fresh = True

        def multiply(self, columns, share):
            time.sleep(0.4 * self.fresh + 0.1)
            self.fresh = False
            yield from super().multiply(columns, share)

    monkeypatch.setattr(one_pass, "TracedEngine", Slow)
    found = one_pass.setup(TINY, "gpt").measured
    assert found["of that tracing, s"] > 0.3 and found["a later step, s"] > 0.1
    assert found["set-up, s"] > found["of that tracing, s"] + 0.35


def test_packages_of_two_commits_multiply_alike():
    known = subprocess.run(["git", "-C", ROOT, "cat-file", "-e", one_pass.PER_BLOCK], capture_output=True)
    if known.returncode:
        pytest.skip("the history of the sources is not available")
    row = one_pass.step_time(TINY, "gpt", 2)
    assert row.error < 1e-5 and row.times["a program for every block"]["repeats"] == 2


@pytest.mark.slow
def test_every_target_has_its_quantity(monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(one_pass, "in_fresh_process", lambda *_: (11, 10))
    monkeypatch.setattr(one_pass.fixed_budget, "PEERS", one_pass.PEERS[:1])
    for name, (measure, targets) in one_pass.ROWS.items():
        if "a product" in name or "Transformers" in name:  # tested above; needs other packages
            continue
        row: Row = measure(TINY)
        assert all(target.quantity in row.measured for target in targets), name
        if "memory" in name:
            assert row.measured["share beside the plan"] == pytest.approx(0.1)
