"""A default device and inference mode of the caller change nothing."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import blockhess
from blockhess_ext import batched_slq
from tests import ROOT
from tests.helpers.spectra_cases import random_spectra
from tests.helpers.tiny_models import labeled, mlp

FACTORIES = {
    "arange", "as_tensor", "empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


def factories_without_device(text: str) -> list[int]:
    """Return the lines of calls of factories that name no device, and of imports that hide such calls."""
    nodes = list(ast.walk(ast.parse(text)))
    return [
        call.lineno
        for call in nodes
        if isinstance(call, ast.Call)
        and ast.unparse(call.func) in {f"torch.{name}" for name in FACTORIES}
        and not any(keyword.arg in ("device", None) for keyword in call.keywords)
    ] + [
        imported.lineno
        for imported in nodes
        if isinstance(imported, ast.ImportFrom)
        and imported.module == "torch"
        and any(alias.name in FACTORIES for alias in imported.names)
    ]


@pytest.mark.parametrize("folder", ["blockhess_ext", "python/blockhess"])
def test_every_factory_names_its_device(folder: str) -> None:
    # Models are built where the caller wants.
    paths = [path for path in (ROOT / folder).rglob("*.py") if path.parent.name != "models"]
    found = {str(path): factories_without_device(path.read_text()) for path in paths}
    assert not {path: lines for path, lines in found.items() if lines}
    text = "torch.ones(3)\ntorch.ones(3, device='cpu')\nx.ones(3)\nfrom torch import Tensor, ones"
    assert factories_without_device(text) == [1, 4]


CALLS: dict[str, Callable[[blockhess.Spectra], Any]] = {
    "js_matrix": lambda s: s.js_matrix(axis="linear"),
    "js_matrix asinh": lambda s: s.js_matrix(),
    "distance_matrix": lambda s: s.distance_matrix(),
    "js0": lambda s: s.js0(confidence=0.95),
    "density": lambda s: s.density(),
    "density_band": lambda s: s.density_band(),
    "kth_eigenvalue": lambda s: s.kth_eigenvalue(2),
    "curvature_spread": lambda s: s.curvature_spread(),
    "table": lambda s: s.table(),
    "quantiles": lambda s: s.quantiles([0.1, 0.5]),
    "histogram": lambda s: s.histogram(),
    "zero_mass": lambda s: s.zero_mass(0.1),
}


@pytest.mark.parametrize("name", CALLS)
def test_spectra(name: str) -> None:
    spectra = random_spectra()
    expected = repr(CALLS[name](spectra))
    with torch.device("meta"):
        assert repr(CALLS[name](spectra)) == expected


def _slq(reorthogonalize: str) -> torch.Tensor:
    return batched_slq(
        lambda v: v * torch.arange(1.0, 9, device=v.device), [3, 5], num_steps=4, check=True,
        tol=1e-3, reorthogonalize=reorthogonalize,
    ).nodes  # fmt: skip


@pytest.mark.parametrize("reorthogonalize", ["none", "partial", "full"])
def test_batched_slq(reorthogonalize: str) -> None:
    expected = _slq(reorthogonalize)
    with torch.inference_mode():
        assert torch.equal(_slq(reorthogonalize), expected)
        assert torch.is_inference_mode_enabled()
    with torch.device("meta"):
        assert torch.equal(_slq(reorthogonalize), expected)


def test_a_changed_argument_is_found_in_inference_mode() -> None:
    with torch.inference_mode(), pytest.raises(ValueError, match="must not change its argument in place"):
        batched_slq(lambda v: v.mul_(2), [3], num_steps=2)


def test_spectrum() -> None:
    model, data = mlp(), labeled(7)
    options = {"num_probes": 2, "num_steps": 4, "progress": False}
    expected = blockhess.spectrum(model, data, F.cross_entropy, **options)
    with torch.device("meta"):
        found = blockhess.spectrum(model, data, F.cross_entropy, **options)
    assert torch.equal(found.quadrature.nodes, expected.quadrature.nodes)
