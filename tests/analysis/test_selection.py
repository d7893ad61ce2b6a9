"""Which blocks are compared, and which an axis cannot normalize."""

from __future__ import annotations

import dataclasses

import pytest

from blockhess.analysis.axes import Axis
from blockhess.analysis.selection import normalizable
from tests.helpers.spectra_cases import make_spectra, random_spectra


def test_default_sigma_follows_the_compared_blocks() -> None:
    spectra = random_spectra()
    few = ["block2", "block3"]
    assert spectra.js0(blocks=few).sigma == spectra.default_sigma(few) < spectra.default_sigma()
    linear = spectra.js0(axis="linear", blocks=few)
    assert linear.sigma == spectra.default_sigma(few, "linear") < spectra.default_sigma(axis="linear") / 10


def test_unused_and_non_finite_blocks_are_excluded_and_named() -> None:
    spectra = random_spectra(
        n_probes=2,
        n_blocks=5,
        notes=["", "unused", "tied with head", "tied with x; unused", ""],
        nonfinite=[[False] * 5, [False] * 4 + [True]],
    )
    assert spectra.comparable_blocks() == ("block0", "block2")
    assert spectra.excluded == (("block1", "unused"), ("block3", "unused"), ("block4", "non-finite"))
    js0 = spectra.js0()
    assert js0.excluded == spectra.excluded and "block4 (non-finite)" in str(js0)
    assert spectra.js_matrix().shape == (2, 2)
    chosen = spectra.js0(blocks=["block0", "block1", "block4"])
    assert len(chosen.blocks) == 3 and chosen.excluded == ()


def with_zero_block(**provenance: object) -> object:
    nodes = [[[1.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [-1.0, 0.5], [3.0, 4.0]]]
    return make_spectra(nodes, [[[0.5, 0.5]] * 5], dims=[20, 20, 20, 20, 2], names="abcde", **provenance)


def test_blocks_that_cannot_be_normalized_are_excluded_and_named() -> None:
    spectra = with_zero_block()
    assert spectra.zero_blocks == ("b",)
    for axis in ("asinh", "linear"):
        js0 = spectra.js0(axis=axis)
        assert js0.blocks == tuple("acde") and js0.excluded == (("b", "zero"),)
    assert spectra.js0(blocks=["a", "b"]).blocks == ("a", "b")
    assert spectra.js0(axis=Axis(normalize="radius")).excluded == (("b", "zero"),)
    assert spectra.js0(axis=Axis(normalize="trace")).excluded == (("b", "zero"), ("d", "trace zero or negative"))
    tenth = spectra.js0(axis=Axis(normalize=15))
    assert tenth.excluded == (
        ("b", "zero"), ("d", "eigenvalue number 15 zero or negative"), ("e", "fewer than 15 eigenvalues")
    )  # fmt: skip
    assert "excluded: b (zero)" in str(tenth) and len(tenth.blocks) == 2
    for call in (spectra.js0, spectra.js_matrix, spectra.density, spectra.distance_matrix):
        with pytest.raises(
            ValueError, match="eigenvalues of 'b' cannot be divided by the block's spectral radius: zero"
        ):
            call(axis=Axis(normalize="radius"), blocks=["a", "b"])
    with pytest.raises(ValueError, match="eigenvalues of 'd' cannot be divided by the block's trace"):
        spectra.js0(axis=Axis(normalize="trace"), blocks=["a", "d"])


def test_blocks_within_the_error_of_their_products_are_zero() -> None:
    spectra = with_zero_block(hvp_error={"c": 1e-8, "a": 0.1})
    assert spectra.zero_blocks == ("b", "c") and spectra.hvp_error("a") == 0.1 and spectra.hvp_error("d") == 0.0
    assert dict(spectra.js0(axis=Axis(normalize="radius")).excluded) == {"b": "zero", "c": "zero"}
    assert spectra.zero_mass().tolist() == pytest.approx([0, 1, 1, 0, 0])

    class Measured:
        def __init__(self, block: object) -> None:
            self.__dict__.update(dataclasses.asdict(block), hvp_error=1.0)

    spectra.blocks = tuple(Measured(block) for block in spectra.blocks)
    assert spectra.hvp_error("d") == 1.0


@pytest.mark.parametrize("normalize", ["radius", "trace", 1])
def test_a_block_of_which_nothing_is_known_is_not_normalized(normalize: str | int) -> None:
    spectra = make_spectra(
        [[[1.0, 3.0], [0.0, 0.0]]], [[[0.5, 0.5], [0.0, 0.0]]], steps=[[2, 0]], nonfinite=[[False, True]]
    )
    axis = Axis(normalize=normalize)
    assert normalizable(spectra, axis) == ("block0",) and normalizable(spectra, Axis()) == spectra.names
    for call in (spectra.density, spectra.density_band, spectra.cdf_band, spectra.wasserstein_error):
        with pytest.raises(ValueError, match=r"'block1' cannot be divided by .*: no Lanczos step"):
            call(axis=axis)
    assert spectra.density_band(blocks=["block0"], axis=axis).x.isfinite().all()
