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


PYTHON = ROOT / "python"

# The rooms of python/blockhess, floor by floor: a room imports from the floors below its own, and from itself.
FLOORS = (
    {"_text", "_checks", "_version", "models", "datasets"},
    {"problem"},
    {"hvp", "results"},
    {"analysis"},
    {"run", "report"},
    {"spectra"},
    {"estimate", "sign_descent"},
    {"integrations"},
    {"cli"},
)


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(PYTHON).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_name(path): path for path in PYTHON.rglob("*.py")}


def imports(path: Path) -> set[str]:
    """The modules that a file imports anywhere, within functions and for type checking too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else node.module for name in inside}
    return names


def test_the_extension_knows_nothing_of_models_and_autograd():
    for path in (ROOT / "blockhess_ext").glob("*.py"):
        for name in imports(path):
            assert name.split(".")[0] != "blockhess", f"{path.name} imports {name}"
            assert not name.startswith(("torch.nn", "torch.autograd", "torch.func")), f"{path.name} imports {name}"


def floor_of(module: str) -> int:
    room = module.split(".")[1]
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


# blockhess/__init__.py hands names on when they are first used.
LIBRARY = sorted(name for name in MODULES if name.startswith("blockhess."))


@pytest.mark.parametrize("module", LIBRARY)
def test_rooms_import_from_the_floors_below(module: str) -> None:
    for name in imports(MODULES[module]):
        top, _, room = name.partition(".")
        assert top not in ("blockhess_paper", "bench", "docs", "tests"), f"{module} imports {name}"
        if top == "blockhess" and room and room.split(".")[0] != module.split(".")[1]:
            assert floor_of(name) < floor_of(module), f"{module} imports {name}"


def test_python_imports_neither_benchmarks_nor_documentation() -> None:
    for module, path in MODULES.items():
        for name in imports(path):
            assert name.split(".")[0] not in ("bench", "docs", "tests"), f"{module} imports {name}"


def test_no_import_circle() -> None:
    below = {name: imports(path) & MODULES.keys() - {name, "blockhess"} for name, path in MODULES.items()}
    while below:
        ground = {name for name, needed in below.items() if not needed & below.keys()}
        assert ground, f"these import one another in a circle, or what does: {sorted(below)}"
        below = {name: needed for name, needed in below.items() if name not in ground}


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
