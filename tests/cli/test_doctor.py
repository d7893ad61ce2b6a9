"""`blockhess doctor`: it says that all is well where it is, and notices where it is not."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

import blockhess
import blockhess_ext
from blockhess.cli import doctor
from blockhess.cli.main import main
from blockhess.hvp import TracedEngine


def test_all_is_well_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("All checks passed.\n") and "FAIL" not in text
    assert torch.__version__ in text and "instruction_set" in text and "(42.3356164608)" in text


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert [check["name"] for check in found["checks"]] == [*doctor.CHECKS, *doctor.ON_DEVICE]


def broken(*_: Any, **__: Any) -> Any:
    raise ImportError("undefined symbol: aoti_torch_x")


def test_an_extension_that_does_not_load(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(blockhess_ext, "build_info", broken)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "FAIL  extension" in text and "undefined symbol" in text and "--no-build-isolation" in text
    assert "checks failed." in text


@pytest.mark.parametrize("name", ["self-test: operator", "self-test: network"])
def test_kernels_that_compute_something_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes that are wrong by 1e-9 are noticed."""
    right = blockhess_ext.ops.tridiag_quadrature

    def wrong(*arguments: Any) -> Any:
        nodes, weights = right(*arguments)
        return nodes * (1 + 1e-9), weights

    monkeypatch.setattr(blockhess_ext.ops, "tridiag_quadrature", wrong)
    (check,) = [check for check in doctor.examine() if check.name == name]
    assert not check.ok and "build again" in check.advice


def test_products_that_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TracedEngine._multiply
    monkeypatch.setattr(TracedEngine, "_multiply", lambda self, columns, share: right(self, columns, share * 1.1))
    (check,) = [check for check in doctor.examine() if check.name == "self-test: product"]
    assert not check.ok


def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if blockhess_ext.build_info()["cuda"]:
        pytest.skip("this build has kernels for GPUs")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    monkeypatch.setattr(blockhess, "spectrum", broken, raising=False)
    checks = {check.name: check for check in doctor.examine()}
    assert not checks["CUDA"].ok and "BLOCKHESS_CUDA=1" in checks["CUDA"].advice


def test_missing_extras_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "OPTIONAL", {"no-such-package": "frames"})
    (check,) = [check for check in [doctor._guarded("optional", doctor._optional)]]
    assert check.ok and check.found == "none" and 'pip install "blockhess[frames]"' in check.advice


def test_old_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.9.1+cpu")
    assert not doctor._guarded("packages", doctor._packages).ok
    monkeypatch.setattr(sys, "version_info", (3, 9))
    assert not doctor._guarded("python", doctor._python).ok


def test_no_compiler_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = doctor._guarded("compiler", doctor._compiler)
    assert check.ok and "not on PATH" in check.found


def test_the_device_that_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "--device", "cpu"]) == 0
    checks = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    for name in doctor.ON_DEVICE:
        assert "relative error" in checks[name]["found"]
    if not torch.cuda.is_available():
        assert main(["doctor", "--device", "cuda"]) == 1
