"""ritz.py: residual bounds that hold, eigenvalues merged over probes, ghosts merged; histograms and masses at zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from blockhess.analysis.outliers import eigenvalues, residuals
from tests.analysis.errors.test_bands import as_spectra
from tests.helpers.dense_measures import lanczos, spectra
from tests.helpers.spectra_cases import float64, make_spectra, random_spectra

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
    assert sum(e.multiplicity for e in found) == pytest.approx(4)
    zero = as_spectra(lanczos(torch.zeros(5)).quadrature).outliers("b0")
    assert [(e.value, e.probes) for e in zero] == [(0.0, 3)] and zero[0].multiplicity == pytest.approx(5)


def test_nothing_known_nothing_found() -> None:
    broken = make_spectra([[[1.0, 2.0]]], [[[0.5, 0.5]]], steps=[[0]], nonfinite=[[True]])
    assert broken.outliers("block0") == []
    with pytest.raises(ValueError, match="no block is called"):
        broken.outliers("w")


def test_mass_at_zero_is_the_rank_deficiency() -> None:
    for dtype in (torch.float32, torch.float64):
        q = lanczos(SPECTRA["low rank"] + 0.5 * (SPECTRA["low rank"] > 0), num_probes=20, num_steps=40, dtype=dtype)
        assert as_spectra(q.quadrature).zero_mass().item() == pytest.approx(0.9, abs=0.03)
    assert as_spectra(lanczos(SPECTRA["arcsine"]).quadrature).zero_mass().item() == 0
    hand = make_spectra([[[-0.1, 0.0, 2.0]]], [[[0.25, 0.5, 0.25]]])
    assert hand.zero_mass().item() == 0.5 and hand.zero_mass(0.1).item() == 0.75
    assert "0.5000" in hand.table().splitlines()[2].split()
    with pytest.raises(ValueError, match="zero_mass: tolerance must not be negative, got -1"):
        hand.zero_mass(-1)


def test_histogram_equals_numpy() -> None:
    result = random_spectra(dims=[40, 30, 20, 15])
    nodes, weights = (part.numpy() for part in result.merged)
    for bins in (7, [-1.0, -0.5, 0.0, 0.01, 2.0]):
        edges, counts = result.histogram(bins)
        for row, dim in enumerate(result.dims):
            expected, _ = np.histogram(nodes[row], edges.numpy(), weights=dim * weights[row])
            np.testing.assert_allclose(counts[row].numpy(), expected, atol=1e-12)
    assert result.histogram()[1].sum(1).tolist() == pytest.approx([40, 30, 20, 15])
    constant = make_spectra([[[3.0]]], [[[1.0]]], dims=[8])
    assert constant.histogram(1)[1].tolist() == [[8.0]]


@pytest.mark.parametrize(("bins", "text"), [(0, "at least 1, got 0"), ([1.0], "two edges"), ([1.0, 0.0], "ascend")])
def test_histogram_refusals(bins: object, text: str) -> None:
    with pytest.raises(ValueError, match=f"histogram: .*{text}"):
        random_spectra().histogram(bins)  # type: ignore[arg-type]


def test_histogram_of_nothing_known_needs_edges() -> None:
    nothing = make_spectra([[[0.0]]], [[[0.0]]], steps=[[0]], nonfinite=[[True]])
    with pytest.raises(ValueError, match="histogram: bins must be edges where nothing is known of any block, got 50"):
        nothing.histogram()
    assert bool(nothing.histogram([0.0, 1.0])[1].isnan().all())
