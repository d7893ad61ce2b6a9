"""The arrows between the parts: what each folder may know of the others."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
from setuptools import find_packages

from tests import ROOT

STANDARD = re.compile(r"<[a-z_]+>")

MAY_INCLUDE = {
    "ops": [STANDARD, re.compile(r'"[a-z_]+\.h"')],
    "cpu": [STANDARD, re.compile(r'"(ops/)?[a-z_]+\.h"'), re.compile(r"<immintrin\.h>|BLOCKHESS_LOOPS")],
    "cuda": [STANDARD, re.compile(r'"(ops/)?[a-z_]+\.(h|cuh)"'), re.compile(r"<cuda_runtime\.h>")],
}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / "csrc" / folder).glob("*.*"))


@pytest.mark.parametrize("folder", [name for name in MAY_INCLUDE if sources(name)])
def test_no_torch_below_the_bindings(folder):
    for path in sources(folder):
        for include in re.findall(r"#include\s+(\S+)", path.read_text()):
            assert any(rule.fullmatch(include) for rule in MAY_INCLUDE[folder]), f"{path.name} includes {include}"


def test_bindings_use_the_stable_abi_alone():
    for path in sources("bindings"):
        for include in re.findall(r"#include\s+(<torch/\S+>|<ATen\S+>|<c10\S+>)", path.read_text()):
            assert re.match(r"<torch/(csrc/stable|headeronly|csrc/inductor/aoti_torch/c)/", include), (
                f"{path}: {include}"
            )


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_extension_knows_nothing_of_models_and_autograd():
    for path in (ROOT / "blockhess_ext").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] != "blockhess", f"{path.name} imports {name}"
            assert not name.startswith(("torch.nn", "torch.autograd", "torch.func")), f"{path.name} imports {name}"


@pytest.mark.parametrize("op", [path.stem for path in sources("ops") if path.stem != "common"])
def test_every_op_has_all_its_parts(op):
    assert (ROOT / "csrc/cpu" / f"{op}.cpp").exists()
    assert (ROOT / "tests/ext" / f"test_{op}.py").exists()
    assert f'"{op}(' in (ROOT / "csrc/bindings/ops.cpp").read_text()
    for module in ("ops", "reference"):
        tree = ast.parse((ROOT / "blockhess_ext" / f"{module}.py").read_text())
        assert op in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{module}.{op}"


def test_every_package_is_installed() -> None:
    include = re.search(r"^include = (\[.*?\])", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    installed = {name for where in ("python", ".") for name in find_packages(ROOT / where, include=json.loads(include))}
    folders = {str(f.parent.relative_to(ROOT / "python")).replace("/", ".") for f in ROOT.glob("python/**/*.py")}
    assert installed == folders | {"blockhess_ext"}
