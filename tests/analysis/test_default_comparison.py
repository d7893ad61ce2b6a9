"""The default comparison, on the signed-log axis, against its criteria; the linear axis fails some of them."""

from __future__ import annotations

import dataclasses
import json
from functools import cache

import pytest
import torch

import blockhess
from bench.accuracy.comparisons import FOLDER, with_flat_block
from blockhess.analysis.jensen_shannon import JS0
from blockhess.spectra import Spectra
from tests.helpers.spectra_cases import float64, make_spectra, random_spectra

POLICIES = ("eval", "frozen_batch_stats", "batch")
NETWORKS = [f"{name}{seed}" for seed in ("", "_seed1") for name in ("gpt2_nano", *(f"resnet18_{p}" for p in POLICIES))]


@cache
def spectra(name: str) -> Spectra:
    return blockhess.load(FOLDER / f"{name}.npz")


@cache
def interval(name: str, axis: str = "asinh") -> tuple[float, float, float]:
    found: JS0 = spectra(name).js0(axis=axis, confidence=0.95)
    assert found.probes_interval is not None
    return found.probes_interval


@pytest.mark.parametrize("seed", ["", "_seed1"])
@pytest.mark.parametrize("policy", POLICIES)
def test_the_gpt_is_above_the_resnet_with_intervals_apart(policy: str, seed: str) -> None:
    """At the same number of steps: bounds for 20 steps leave the exact values open."""
    assert interval(f"gpt2_nano{seed}")[0] > interval(f"resnet18_{policy}{seed}")[1]


def test_on_the_linear_axis_it_is_not() -> None:
    assert interval("gpt2_nano", "linear")[1] < interval("resnet18_batch", "linear")[0]


@pytest.mark.parametrize("name", NETWORKS)
def test_sigma_probes_and_one_more_flat_block_change_little(name: str) -> None:
    js0 = spectra(name).js0(confidence=0.95)
    assert js0.stderr is not None and js0.stderr < 0.1 * js0.value
    for factor in (0.5, 2.0):
        assert spectra(name).js0(sigma=factor * js0.sigma).value == pytest.approx(js0.value, rel=0.15)
    for factor in (1.0, 100.0):
        more = with_flat_block(spectra(name), factor)
        assert more.js0().num_pairs > js0.num_pairs
        assert more.js0().value == pytest.approx(js0.value, rel=0.15)


def test_small_networks_as_measured() -> None:
    """Three seeds of weights and data, two of probes: the committed result of bench.accuracy.comparisons."""
    rows = json.loads((FOLDER.parents[2] / "bench/results/comparisons_cpu.json").read_text())["small"]
    for first, second in zip(rows[::2], rows[1::2]):
        assert second["js0"] == pytest.approx(first["js0"], rel=0.1)
        gpts = [row for row in rows if row["network"] == "GPT" and row["seed"] == first["seed"]]
        for row in () if first["network"] == "GPT" else (first, second):
            assert all(row["interval"][1] < gpt["interval"][0] for gpt in gpts)
    assert {row["seed"] for row in rows} == {0, 1, 2} and len(rows) == 24


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 1e3, 1e6])
def test_the_scale_of_the_loss_changes_nothing(factor: float) -> None:
    given = spectra("resnet18_frozen_batch_stats")
    q = given.quadrature
    scaled = {name: factor * getattr(q, name) for name in ("nodes", "alpha", "beta")}
    errors = {name: factor * error for name, error in given.provenance["hvp_error"].items()}
    other = Spectra(given.blocks, dataclasses.replace(q, **scaled), {**given.provenance, "hvp_error": errors})
    expected, found = given.js0(), other.js0()
    assert found.value == pytest.approx(expected.value, rel=1e-9)
    assert found.scale == pytest.approx(factor * expected.scale, rel=1e-12)


def test_flat_blocks_are_resolved() -> None:
    """Two pairs of blocks, 10,000 times apart: the linear axis takes the flat ones for one spike."""
    nodes = torch.linspace(-1, 1, 20, dtype=torch.float64)
    sizes = float64([1.0, 1e-4, 3e-6])[:, None]
    three = make_spectra([(sizes * nodes).tolist()], [[[1 / 20] * 20] * 3], dims=[100] * 3)
    assert three.js_matrix()[1, 2] > 0.5 and three.js_matrix(axis="linear")[1, 2] < 0.02


def test_eigenvalues_within_the_error_of_the_products_are_zero() -> None:
    """A sharp block with errors as large as the eigenvalues of the flat one."""
    nodes = [[[-2e-6, 1e-6, 1.0], [0.0, 0.0, 1.0], [-1e-6, 5e-7, 2e-6]]]
    weights = [[[0.45, 0.45, 0.1]] * 3]
    for error, alike in ((3e-6, True), (0.0, False)):
        options = {"dims": [100] * 3, "dtype": "float64", "hvp_error": {"block0": error, "block1": error}}
        found = make_spectra(nodes, weights, **options)
        assert (float(found.js_matrix()[0, 1]) < 1e-6) == alike
        band = found.density_band(axis="asinh")
        _, density = found.density(axis="asinh", grid=band.x, sigma=found.default_sigma())
        assert torch.equal(band.value, density) or torch.allclose(band.value, density, atol=1e-12)


def test_labels_name_axis_and_rule() -> None:
    text = str(random_spectra().js0())
    assert "asinh axis (linear below" in text and "the scale being 3 % of the lower quartile of the blocks'" in text
    scale = random_spectra().js0().scale
    assert "lower quartile" not in str(random_spectra().js0(axis=blockhess.Axis("asinh", scale=scale)))
    assert "linear axis" in str(random_spectra().js0(axis="linear"))


def test_all_blocks_zero() -> None:
    zero = make_spectra([[[0.0], [0.0]]], [[[1.0], [1.0]]])
    with pytest.raises(ValueError, match=r"at least two are needed .* got \[\]; excluded: block0 \(zero\), block1 "):
        zero.js0()
    assert zero.curvature_spread() is None
