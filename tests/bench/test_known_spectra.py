"""bench/harness/known_spectra.py: moments of the densities, and an exact Hessian."""

from __future__ import annotations

import pytest
import torch
from scipy import stats

from bench.harness.known_spectra import dense_hessian, synthetic


def test_synthetic_spectra_have_the_moments_of_their_densities():
    x = synthetic(20_000)
    for name, mean, variance in (("semicircle", 0, 1 / 4), ("Marchenko-Pastur", 1, 1 / 2), ("uniform", 0, 1 / 3)):
        assert x[name].mean().item() == pytest.approx(mean, abs=1e-3)
        assert x[name].var().item() == pytest.approx(variance, rel=2e-3)
    assert x["spikes and bulk"].max() == 1 and x["spikes and bulk"].min() == -0.7
    assert (x["bimodal"] > 0).double().mean() == 0.5
    slope = stats.linregress(
        torch.arange(1, 2001).log().numpy(), x["power law"].sort(descending=True).values[:2000].log()
    )
    assert slope.slope == pytest.approx(-0.75, abs=0.05)


def test_dense_hessian_of_a_quadratic_form():
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    loss = (w.flatten() @ matrix @ w.flatten()) / 2 + w.sum()
    torch.testing.assert_close(dense_hessian(loss, w), (matrix + matrix.T) / 2)
