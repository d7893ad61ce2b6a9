"""bench/hvp/products.py: wrong rivals are not timed, and operations are counted."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench.harness.timing import WrongResult
from bench.hvp import products
from tests.bench.cases import TINY


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
    entries, _ = products.measure(linear_case(), makers, 2)
    for name in ("right", "close"):
        assert not entries[name].failure and len(entries[name].seconds) == 2, entries[name]
    for name in ("wrong", "nan", "absent", "broken"):
        assert not entries[name].seconds
    assert entries["wrong"].error == pytest.approx(0.01, rel=1e-2)
    assert "wrong by 0.01 of |H v| on weight" in entries["wrong"].failure
    assert "wrong by nan" in entries["nan"].failure
    assert entries["absent"].failure == "absent (No module named 'peer')"
    assert entries["broken"].failure == "RuntimeError: derivative for this is not implemented"


def test_operations_are_those_of_the_chain_rule() -> None:
    # X is 4 x 3, W is 2 x 3: a product with X, or with its transpose, takes 2 * 4 * 3 * 2 = 48 operations. H v takes
    # the tangents X V^T and their adjoint; the paper's step also has the forward and the first backward pass.
    case = linear_case()
    ours = ("traced", "autograd", "the paper's procedure")
    _, flops = products.measure(case, {name: products.RIVALS[name] for name in ours}, 1)
    assert case.problem.forward_flops == 48
    assert flops == {"traced": 96, "autograd": 96, "the paper's procedure": 192}


@pytest.mark.parametrize("fresh_process", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_row(fresh_process: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fresh_process:
        monkeypatch.setattr(products, "in_fresh_process", lambda *_: 1)
    row = products.row(TINY, "resnet", 5)
    assert list(row.times) == list(products.RIVALS)
    for name in ("traced", "autograd", "the paper's procedure"):
        assert row.times[name]["repeats"] == 1 and row.times[name]["peak_mib"] > 0
        assert 0.5 < row.measured[f"forward passes, {name}"] < 5
    for name in ("hessian-eigenthings", "curvlinops", "PyHessian"):
        assert row.times[name].get("failure", "absent").startswith("absent")


def test_our_own_wrong_engine_fails_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(products.RIVALS["autograd"]):
        def of_block(self, name: str) -> Callable[[Tensor], Tensor]:
            return lambda v: 0 * v

    monkeypatch.setitem(products.RIVALS, "autograd", Broken)
    with pytest.raises(WrongResult, match=r"autograd: wrong by 1 of \|H v\|"):
        products.row(TINY, "gpt", 1)
