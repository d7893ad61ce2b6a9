"""bench/hvp/products.py: wrong rivals are not timed, operations are counted, and tables are correct."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench.hvp import products
from tests import ROOT


def linear_case():
    torch.manual_seed(0)
    batch = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    return products.Case("linear", nn.Linear(3, 2, bias=False), nn.CrossEntropyLoss(), batch, ("weight",))


def test_wrong_absent_and_broken_rivals_are_not_timed() -> None:
    right = products.RIVALS["autograd"]

    def off_by(factor: float) -> type:
        class Off(right):
            def of_block(self, name: str) -> Callable[[Tensor], Tensor]:
                product = super().of_block(name)
                return lambda v: factor * product(v)

        return Off

    def absent(case):
        raise ImportError("No module named 'peer'")

    class Broken(right):
        def of_block(self, name: str) -> Callable[[Tensor], Tensor]:
            raise RuntimeError("derivative for this is not implemented")

    makers = {"right": right, "close": off_by(1 + 1e-5), "wrong": off_by(1.01), "nan": off_by(float("nan"))}
    makers |= {"absent": absent, "broken": Broken}
    rows = {row.rival: row for row in products.measure(linear_case(), makers, 2)}
    for name in ("right", "close"):
        assert not rows[name].failure and len(rows[name].seconds["weight"]) == 2, rows[name]
    for name in ("wrong", "nan", "absent", "broken"):
        assert not rows[name].seconds
    assert (
        rows["wrong"].error == pytest.approx(0.01, rel=1e-2)
        and "wrong by 0.01 of |H v| on weight" in rows["wrong"].failure
    )
    assert "wrong by nan" in rows["nan"].failure
    assert rows["absent"].failure == "absent (No module named 'peer')"
    assert rows["broken"].failure == "RuntimeError: derivative for this is not implemented"


def test_a_program_that_was_not_compiled_is_not_timed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    rows = products.measure(linear_case(), products.COMPILED, 1)
    assert [row.failure for row in rows] == ["", "RuntimeError: torch.compile compiled nothing"]


def test_operations_are_those_of_the_chain_rule() -> None:
    # X is 4 x 3, W is 2 x 3: a product with X, or with its transpose, takes 2 * 4 * 3 * 2 = 48 operations. H v takes
    # the tangents X V^T and their adjoint; the paper's step also has the forward and the first backward pass.
    case = linear_case()
    ours = ("traced", "autograd", "the paper's procedure")
    rows = products.measure(case, {name: products.RIVALS[name] for name in ours}, 1)
    assert case.problem.forward_flops == 48
    assert [row.flops for row in rows] == [{"weight": 96}, {"weight": 96}, {"weight": 192}]


def test_table_has_medians_ratios_and_when_tracing_pays() -> None:
    def row(rival: str, make: float, milliseconds: list[float]):
        seconds = {"a": [t / 1e3 for t in milliseconds], "b": [t / 1e3 for t in milliseconds]}
        return products.Row(rival, make_seconds=make, seconds=seconds, flops={"a": 3e6, "b": 1e6}, peak_bytes=2**20)

    rows = [row("traced", 10.5, [1, 2, 3]), row("autograd", 0.5, [4, 6, 3]), products.Row("peer", "absent (no)")]
    result = products.Result("case", 7, 4, ("a", "b"), 10**6, 50, 2**20, 2**21, (1.0, 2.0), rows)
    lines = products.table(result).splitlines()
    # Medians 2 and 4 ms, ratios 4, 3 and 1; 2e6 operations, 2 forward passes of 1e6, in 4 ms: 0.5 GFLOP/s.
    assert lines[5] == "| autograd | 4 (3 - 6) | 3 (1 - 4) | 2.00 | 0.5 | 0.50 | 1 | 0 |"
    assert "| peer | not timed: absent (no) |" in lines[6]
    # 10 s more set-up, 2 ms less per product: 5,000 products, 1,250 for each of 4 blocks.
    assert (
        "(210 ms for each of the 50 operations of the gradient) and pays after 5,000 products, 1,250 per block"
        in lines[-1]
    )
    assert "2 MiB, 2.00 times the" in lines[-1]
    rows[0].seconds = row("", 0, [9, 9, 9]).seconds
    assert "does not pay: products are not faster" in products.table(result)


@pytest.mark.parametrize("fresh_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_quick(
    fresh_process: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if not fresh_process:
        monkeypatch.setattr(products, "in_fresh_process", lambda *_: 1)
    path = tmp_path / "result.json"
    threads = torch.get_num_threads()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # main sets it
    monkeypatch.setattr(sys, "argv", ["hvp", "--quick", "--case", "resnet", "--json", str(path)])
    try:
        assert products.main() == 0
    finally:
        torch.set_num_threads(threads)
    data = json.loads(path.read_text())
    assert capsys.readouterr().out.strip() == products.markdown(data)
    rows = {row["rival"]: row for row in data["results"][0]["rows"]}
    assert list(rows) == list(products.RIVALS)
    for name in ("traced", "autograd", "the paper's procedure"):
        assert not rows[name]["failure"] and rows[name]["seconds"]
    assert rows["traced"]["peak_bytes"] > 0
    for name in ("hessian-eigenthings", "curvlinops", "PyHessian"):
        assert not rows[name]["failure"] or rows[name]["failure"].startswith("absent")


def test_the_committed_tables_are_up_to_date() -> None:
    results = ROOT / "bench/results"
    table = products.markdown(json.loads((results / "hvp_cpu.json").read_text()))
    assert (results / "hvp_cpu.md").read_text() == f"{table}\n"
    assert "Target: 3 times as long for curvlinops" not in table and "Target: 6 times as long for curvlinops" in table
