"""Blocks written out: their quadrature is the spectral density itself."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import blockhess
from blockhess.hvp.exact import _quadrature, is_cheaper_exact
from tests.helpers.dense_hessian import dense_hessian
from tests.helpers.tiny_models import labeled, mlp


def test_eigenvalues_are_those_of_the_dense_hessian() -> None:
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), labeled(7)
    x = x.double()
    spectra = blockhess.spectrum(model, (x, y), nn.CrossEntropyLoss(), num_probes=3, engine="exact")
    assert spectra.provenance["plan"]["exact"] == list(spectra.names)
    assert spectra.provenance["hvps"] == 12 + 4 + 12 + 3
    for row, name in enumerate(spectra.names):
        dense = dense_hessian(model, lambda call: F.cross_entropy(call(x), y), [name])
        found = spectra[name]
        exact = torch.linalg.eigvalsh(dense)
        scale = float(exact.abs().max())
        grid = torch.linspace(float(exact[0]) - 0.1 * scale, float(exact[-1]) + 0.1 * scale, 400, dtype=torch.float64)
        sigma = 0.02 * scale
        expected = torch.exp(-0.5 * ((grid[:, None] - exact) / sigma) ** 2).mean(1) / (sigma * (2 * torch.pi) ** 0.5)
        _, densities = spectra.density(sigma=sigma, grid=grid)
        torch.testing.assert_close(densities[row], expected, rtol=1e-9, atol=1e-9 / scale)
        assert found.trace == pytest.approx(float(dense.trace()), abs=1e-12) and found.trace_stderr < 1e-15
        assert found.lambda_max == pytest.approx(float(exact[-1]), abs=1e-12)


def test_many_equal_eigenvalues_are_one_node() -> None:
    eigenvalues = torch.tensor([0.0] * 50 + [1.0] * 30 + [1e-9, 5.0], dtype=torch.float64)
    q = _quadrature(eigenvalues, num_probes=2)
    steps = int(q.steps[0, 0])
    assert steps == 4 and q.nodes.shape[:2] == (2, 1)
    expected = torch.tensor([0.0, 1e-9, 1.0, 5.0], dtype=torch.float64)
    torch.testing.assert_close(q.nodes[0, 0, :4], expected, rtol=0, atol=1e-14)
    share_at_zero = float(q.weights[0, 0, :2].sum())  # two values that rounding cannot tell apart
    assert share_at_zero == pytest.approx(51 / 82, abs=1e-12)
    torch.testing.assert_close(q.weights[0, 0, 2:4], torch.tensor([30.0, 1.0], dtype=torch.float64) / 82)


@pytest.mark.parametrize(
    "spectrum", [torch.zeros(5), torch.ones(1), torch.linspace(-1, 1, 300), torch.logspace(-12, 2, 40)]
)
def test_any_spectrum(spectrum: torch.Tensor) -> None:
    eigenvalues = spectrum.double()
    q = _quadrature(eigenvalues, num_probes=1)
    scale = max(float(eigenvalues.abs().max()), 1e-300)
    for power in (1, 2, 3):
        moment = float((q.weights * q.nodes**power).sum())
        assert abs(moment - float((eigenvalues**power).mean())) <= 1e-12 * scale**power


def test_a_block_that_is_not_finite_is_reported() -> None:
    q = _quadrature(torch.full((3,), torch.nan, dtype=torch.float64), num_probes=2)
    assert q.steps.tolist() == [[0], [0]] and q.nonfinite.all() and not q.nodes.isnan().any()


def test_when_it_is_cheaper() -> None:
    assert is_cheaper_exact(dim=99, num_probes=10, num_steps=10) and not is_cheaper_exact(100, 10, 10)
    assert not is_cheaper_exact(dim=5, num_probes=1, num_steps=10)


def test_small_blocks_next_to_estimated_ones() -> None:
    torch.manual_seed(0)
    model, data = mlp(), labeled(7)
    spectra = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=4)
    assert spectra.provenance["plan"]["exact"] == ["0.bias", "2.bias"]
    alone = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=4, engine="autograd")
    for name in ("0.weight", "2.weight"):
        assert torch.equal(spectra[name].nodes[:, :4], alone[name].nodes[:, :4])
    assert spectra["0.bias"].steps.tolist() == [4, 4] and spectra["0.bias"].trace_stderr < 1e-15
    probes, steps = spectra.wasserstein_error()
    exact = torch.tensor([name in spectra.provenance["plan"]["exact"] for name in spectra.names])
    assert torch.equal(probes == 0, exact) and torch.equal(steps < 1e-12, exact)
    js = spectra.js_matrix()
    assert js.shape == (4, 4) and js.isfinite().all()
