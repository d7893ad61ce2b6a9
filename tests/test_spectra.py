"""Spectra: moments, distribution functions and ranges against hand numbers, and what comparisons take and say."""

from __future__ import annotations

import math

import pytest
import torch

from tests.helpers.spectra_cases import hand, make_spectra, random_spectra


def test_a_block_of_which_nothing_is_known() -> None:
    spectra = make_spectra(
        [[[1.0, 2.0], [math.nan, math.nan]]], [[[0.5, 0.5], [0.0, 0.0]]], steps=[[2, 0]], nonfinite=[[False, True]]
    )
    values = (*spectra.eigenvalue_range(), spectra.trace()[0], spectra.frobenius_norm()[0], spectra.negative_mass())
    for value in (*values, spectra.quantiles(0.5)[:, 0], spectra.cdf(1.5)[1][:, 0]):
        assert not value[0].isnan() and value[1].isnan()
    assert spectra.trace()[1][1] == spectra.frobenius_norm()[1][1] == math.inf
    assert not spectra.density()[1][1].any()
    assert spectra.cdf()[0].tolist() == [1.0, 2.0]
    assert "non-finite" in spectra.table().splitlines()[-1] and "nan" not in spectra.table()


def test_reads_like_a_mapping() -> None:
    spectra = hand(names=["w", "one", "zero"])
    assert len(spectra) == 3 and list(spectra) == ["w", "one", "zero"] == list(spectra.names)
    assert "one" in spectra and "two" not in spectra and spectra.dims == (10, 1, 7)
    block = spectra["w"]
    assert (block.name, block.dim, block.block.shape) == ("w", 10, (10,))
    assert torch.equal(block.nodes, spectra.quadrature.nodes[:, 0]) and block.weights.shape == (2, 3)
    assert block.steps.tolist() == [3, 3]
    assert block.trace == pytest.approx(11.25) and block.trace_stderr == pytest.approx(3.75)
    assert (block.lambda_min, block.lambda_max, block.negative_mass) == (-1.0, 3.0, pytest.approx(0.375))
    assert block.frobenius_norm == pytest.approx(math.sqrt(43.75))
    with pytest.raises(KeyError, match="no block is called 'ones'; close to it: one"):
        spectra["ones"]


def test_repr_is_one_readable_line() -> None:
    assert repr(random_spectra(model="GPT")) == (
        "Spectra of GPT: 4 blocks, 48 parameters; 3 gaussian probes, 12 Lanczos steps in float32, seed 3"
    )
    assert repr(make_spectra([[[1.0]]], [[[1.0]]], tol=0.01)) == (
        "Spectra of a model: 1 block, 1 parameter; at most 1 gaussian probe, at most 1 Lanczos step in float32, seed 3"
    )
