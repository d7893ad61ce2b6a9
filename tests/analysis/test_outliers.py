"""ritz.py: residual bounds that hold, eigenvalues merged over probes, ghosts merged; histograms and masses at zero."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from blockhess.analysis.outliers import eigenvalues, residuals
from blockhess_ext import ops
from tests.helpers.dense_measures import lanczos, spectra
from tests.helpers.spectra_cases import as_spectra, float64, make_spectra

SPECTRA = spectra()


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("dtype", "how"), [(torch.float64, "full"), (torch.float32, "none")])
def test_an_eigenvalue_lies_within_every_residual(name: str, dtype: torch.dtype, how: str) -> None:
    seen = lanczos(SPECTRA[name], num_steps=25, dtype=dtype, reorthogonalize=how)
    bounds, nodes = residuals(seen.quadrature, 0), seen.quadrature.nodes[:, 0]
    valid = seen.quadrature.valid[:, 0]
    distance = (nodes[..., None] - seen.eigenvalues).abs().amin(-1)
    assert (distance[valid] <= bounds[valid]).all()
    assert bounds[~valid].isnan().all()


def test_residuals_tell_converged_from_unconverged() -> None:
    seen = lanczos(SPECTRA["spikes and bulk"], num_steps=25)
    bounds = residuals(seen.quadrature, 0)
    assert bounds[:, -1].max() < 1e-6 and bounds.max() > 1e-3


def test_spikes_are_found_with_their_multiplicity() -> None:
    found = as_spectra(lanczos(SPECTRA["spikes and bulk"], num_probes=40, num_steps=25).quadrature).outliers("b0")
    assert [round(e.value, 6) for e in found[:4]] == [1.0, 0.8, -0.7, 0.5]
    for e in found[:4]:
        assert e.probes == 40 and e.residual < 1e-3 and abs(e.multiplicity - 1) < 5 * math.sqrt(2 / 40)
        assert e.multiplicity_interval[0] == 1 < e.multiplicity_interval[1] < 2


def test_no_multiplicity_of_an_eigenvalue_that_few_probes_found() -> None:
    """Early steps: some probes have converged to the largest eigenvalue, and by chance have more weight there."""
    exact = torch.linspace(0, 1, 300).double()
    exact[-1] = 1.25
    found = {}
    for steps in range(6, 14):
        for seed in range(5):
            q = lanczos(exact, num_probes=10, num_steps=steps, seed=seed).quadrature
            for e in eigenvalues(q, 0)[:1]:
                found.setdefault(e.probes, []).append(e)
    assert min(found) < 5 and max(found) == 10
    for probes, some in found.items():
        for e in some:
            assert (e.multiplicity is None) == (e.multiplicity_interval is None) == (probes < 5)
    known = [e.multiplicity_interval for probes, some in found.items() if probes >= 5 for e in some]
    assert sum(low <= 1 <= high for low, high in known) >= 0.9 * len(known)


def test_multiplicities_where_probes_have_different_numbers_of_steps() -> None:
    """As with a tolerance: an eigenvalue has converged for nearly all probes, with very different residuals."""
    exact = 10.0 ** (-8 * torch.arange(400, dtype=torch.float64) / 400)
    q = lanczos(exact, num_probes=10, num_steps=40).quadrature
    steps = q.steps.clone()
    steps[5:] = 20
    nodes, weights = ops.tridiag_quadrature(q.alpha[:, 0], q.beta[:, 0], steps[:, 0])
    cut = replace(q, nodes=nodes[:, None], weights=weights[:, None], steps=steps)
    first, second = eigenvalues(q, 0)[0], eigenvalues(cut, 0)[0]
    assert first.probes == 10 and second.probes >= 9 and second.reach > first.reach
    assert second.multiplicity == pytest.approx(first.multiplicity, rel=0.1)


def test_multiplicities_of_eigenvalues_whose_residuals_overlap() -> None:
    """One large eigenvalue, relative to which many residuals in the bulk are small and overlap in a chain."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.cat([float64([100.0]), torch.rand(39, generator=generator).double() - 0.5])
    inside, resolved = [], 0
    for seed in range(10):
        q = lanczos(exact, num_probes=10, num_steps=20, seed=seed).quadrature
        found = sorted(eigenvalues(q, 0), key=lambda e: e.value)
        for e in found:
            assert (exact - e.value).abs().min() <= e.residual <= e.reach
            if e.multiplicity is not None:
                low, high = e.multiplicity_interval
                assert low <= e.multiplicity <= high
                inside.append(low <= int(((exact - e.value).abs() <= e.reach).sum()) <= high)
                resolved += high < 3.5
        for left, right in itertools.pairwise(found):
            assert left.value + left.reach <= right.value - right.reach + 1e-12
    assert len(inside) > 100 and sum(inside) >= 0.95 * len(inside) and resolved > 40


def test_ghosts_are_one_eigenvalue() -> None:
    q = lanczos(SPECTRA["power law"], num_steps=120, dtype=torch.float32, reorthogonalize="none").quadrature
    assert int(((q.nodes - 1).abs() < 1e-5).sum()) > 3  # copies of the largest in some probe
    found = eigenvalues(q, 0)
    exact = SPECTRA["power law"].sort(descending=True).values[:5]
    torch.testing.assert_close(float64([e.value for e in found[:5]]), exact, rtol=0, atol=1e-5)
    assert found[0].probes == 3 and found[0].multiplicity == pytest.approx(1, abs=2.5)


def test_a_small_block_gives_all_its_eigenvalues() -> None:
    found = as_spectra(lanczos(float64([-2.0, -2.0, 0.0, 5.0]), num_probes=2).quadrature).outliers("b0")
    assert [round(e.value, 9) for e in found] == [5.0, -2.0, 0.0]
    assert all(1 <= e.multiplicity_interval[0] <= e.multiplicity <= e.multiplicity_interval[1] <= 4 for e in found)
    zero = as_spectra(lanczos(torch.zeros(5)).quadrature).outliers("b0")
    assert [(e.value, e.probes) for e in zero] == [(0.0, 3)] and zero[0].multiplicity == pytest.approx(5)


def test_nothing_known_nothing_found() -> None:
    broken = make_spectra([[[1.0, 2.0]]], [[[0.5, 0.5]]], steps=[[0]], nonfinite=[[True]])
    assert broken.outliers("block0") == []
    with pytest.raises(ValueError, match="no block is called"):
        broken.outliers("w")
