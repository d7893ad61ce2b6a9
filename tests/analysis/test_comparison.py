"""Comparisons of blocks: js_matrix, JS0 and distances against the functions of arrays."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockhess.analysis.axes import Axis
from blockhess.analysis.distances import distance_matrix
from blockhess.analysis.jensen_shannon import js_matrix
from tests.helpers.spectra_cases import float64, make_spectra, random_spectra


def test_js_matrix_is_that_of_the_merged_measures() -> None:
    spectra = random_spectra()
    nodes, weights = spectra.merged
    for kind in ("distance", "divergence"):
        expected = js_matrix(nodes, weights, sigma=spectra.default_sigma(axis="linear"), kind=kind)
        assert torch.equal(spectra.js_matrix(kind, axis="linear"), expected)
    pair = spectra.js_matrix(axis="linear", sigma=0.1, blocks=["block3", "block0"])
    assert torch.equal(pair, js_matrix(nodes[[3, 0]], weights[[3, 0]], sigma=0.1))


def test_js0_is_the_mean_over_pairs() -> None:
    spectra = random_spectra(batchnorm="eval")
    matrix, js0 = spectra.js_matrix(), spectra.js0()
    pairs = [matrix[i, j].item() for i in range(4) for j in range(i)]
    assert float(js0) == pytest.approx(sum(pairs) / 6)
    assert js0.sigma == spectra.default_sigma() and js0.blocks == spectra.names and js0.batchnorm == "eval"
    both = spectra.compare("divergence", math.e, 0.2)
    assert torch.equal(both[0], spectra.js_matrix("divergence", math.e, 0.2))
    assert both[1] == spectra.js0("divergence", math.e, 0.2)


def test_one_and_the_same_spike_everywhere() -> None:
    for value in (0.0, 3.0, -1e-9):
        spectra = make_spectra([[[value], [value], [value]]], [[[1.0], [1.0], [1.0]]])
        for kind in ("distance", "divergence"):
            assert not spectra.js_matrix(kind, blocks=spectra.names).any()


def test_refuses_bad_comparisons() -> None:
    spectra = random_spectra(n_blocks=3, notes=["", "unused", "unused"])
    with pytest.raises(ValueError, match=r"blocks: at least two are needed .* got \['block0'\]"):
        spectra.js0()
    for blocks, text in (
        ([], r"got \[\]"),
        (["block0", "blok1"], "no block is called 'blok1'; close to it: block1"),
        (["block0", "block0"], "different, got 'block0' 2 times"),
    ):
        with pytest.raises(ValueError, match=f"blocks: .*{text}"):
            spectra.js_matrix(blocks=blocks)
    with pytest.raises(ValueError, match="js_matrix: axis must be one of linear, asinh or an Axis, got 'log'"):
        spectra.js_matrix(axis="log", blocks=["block0", "block1"])
    dead = make_spectra([[[1.0], [0.0]]], [[[1.0], [0.0]]], steps=[[1, 0]], nonfinite=[[False, True]])
    with pytest.raises(ValueError, match="'block1' has no spectrum"):
        dead.js0(blocks=["block0", "block1"])


@pytest.mark.parametrize("normalize", ["radius", "trace", 3])
@pytest.mark.parametrize("axis", ["linear", "asinh"])
def test_blocks_that_differ_in_scale_alone_are_equal_once_normalized(normalize: str | int, axis: str) -> None:
    base = torch.rand(2, 1, 9, generator=torch.Generator().manual_seed(1)).double().sort(-1).values + 0.1
    scales = float64([1.0, 1e-6, 1e4])[:, None]
    spectra = make_spectra((base * scales).tolist(), [[[1 / 9] * 9] * 3] * 2, dims=[30] * 3)
    assert float(spectra.js0(axis=Axis(axis, normalize))) < 1e-6
    assert float(spectra.js0(axis=axis)) > 0.3
    assert spectra.distance_matrix(axis=Axis(axis, normalize)).max() < 1e-9


def test_comparisons_are_those_of_the_mapped_nodes() -> None:
    spectra = random_spectra()
    nodes, weights = spectra.merged
    size = nodes.abs().amax(1, keepdim=True)
    mapped = (nodes / size / 0.1).asinh()
    axis = Axis("asinh", "radius", 0.1)
    js0 = spectra.js0(axis=axis, sigma=0.2)
    torch.testing.assert_close(spectra.js_matrix(axis=axis, sigma=0.2), js_matrix(mapped, weights, sigma=0.2))
    assert (
        "sigma 0.2 on the asinh axis (linear below 0.1) of eigenvalues divided by the block's spectral radius"
        in str(js0)
    )
    assert (js0.axis, js0.normalize, js0.scale) == ("asinh", "radius", 0.1)
    assert spectra.default_sigma(axis=axis) == pytest.approx(0.01 * float(mapped.max() - mapped.min()))
    grid, density = spectra.density(axis=axis)
    torch.testing.assert_close(torch.trapezoid(density, grid), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert grid[0] < mapped.min() and mapped.max() < grid[-1] < nodes.max() / 0.1


def test_sigma_above_the_range_on_the_axis_is_refused() -> None:
    spectra = random_spectra()
    for call in (spectra.js0, spectra.js_matrix, spectra.density, spectra.density_band):
        with pytest.raises(ValueError, match=r"sigma must be at most the range of all nodes, .*, got 50"):
            call(sigma=50.0)  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"sigma must be at most the range of all nodes, .*, got 3"):
            call(sigma=3.0, axis=Axis(normalize="radius"))  # type: ignore[operator]
    zero = make_spectra([[[0.0], [0.0]]], [[[1.0], [1.0]]])
    assert float(zero.js0(sigma=3.0, blocks=zero.names)) == 0.0


def test_of_spectra() -> None:
    spectra = random_spectra(notes=["", "unused", "", ""])
    matrix = spectra.distance_matrix()
    assert matrix.shape == (3, 3)
    nodes, weights = spectra.merged
    assert torch.equal(matrix, distance_matrix(nodes[[0, 2, 3]], weights[[0, 2, 3]]))
    pair = spectra.distance_matrix("kolmogorov", blocks=["block3", "block0"])
    assert pair.shape == (2, 2) and 0 < pair[0, 1] <= 1
    with pytest.raises(
        ValueError, match="distance_matrix: metric must be one of wasserstein, kolmogorov, got 'energy'"
    ):
        spectra.distance_matrix("energy")


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000), axis=st.sampled_from(["linear", "asinh"]), normalize=st.sampled_from(["none", "radius"])
)
def test_a_metric_on_every_axis(seed: int, axis: str, normalize: str) -> None:
    result = random_spectra(seed=seed)
    d = result.js_matrix(axis=Axis(axis, normalize))
    assert torch.equal(d, d.T) and not d.diagonal().any() and (d >= 0).all() and (d <= 1).all()
    assert (d[:, None, :] <= d[:, :, None] + d[None, :, :] + 1e-9).all()
