"""axes.py and its use in comparisons: hand numbers, invariances, and blocks that cannot be normalized."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from blockhess.analysis.axes import Axis, as_axis, default_scale, divisors, kth_largest
from blockhess.analysis.jensen_shannon import js_matrix
from blockhess.analysis.selection import normalizable
from tests.helpers.spectra_cases import float64, make_spectra, random_spectra

# Ten eigenvalues 1 ... 10, and a block of three.
NODES = [[[float(i) for i in range(1, 11)], [2.0, 4.0, 5.0] + [5.0] * 7]]
WEIGHTS = [[[0.1] * 10, [1 / 3] * 3 + [0.0] * 7]]


def test_kth_largest_by_hand() -> None:
    spectra = make_spectra(NODES, WEIGHTS, dims=[10, 3], steps=[[10, 3]])
    nodes, weights = spectra.merged
    for k, expected in ((1, [10, 5]), (2, [9, 4]), (3, [8, 2]), (10, [1, 2])):
        assert kth_largest(nodes, weights, [10, 3], k).tolist() == expected
    value, lower, upper = spectra.kth_eigenvalue(3)
    assert value.tolist() == [8, 2] and lower[0] < 8 < upper[0]
    assert spectra.kth_eigenvalue(10)[0][1].isnan() and not spectra.kth_eigenvalue(10)[0][0].isnan()


def test_kth_eigenvalue_covers_the_truth() -> None:
    from tests.analysis.errors.test_bands import as_spectra
    from tests.helpers.dense_measures import lanczos

    eigenvalues = torch.linspace(0, 1, 200) ** 4
    inside = 0
    for seed in range(40):
        q = lanczos(eigenvalues, num_probes=5, num_steps=40, seed=seed).quadrature
        value, lower, upper = as_spectra(q).kth_eigenvalue(10)
        inside += int(lower <= eigenvalues[-10] + 1e-6 and eigenvalues[-10] - 1e-6 <= upper)
        assert lower <= value <= upper and upper - lower < 0.4
    assert inside >= 34


def test_divisors() -> None:
    nodes, weights = float64([[-4.0, 1.0], [2.0, 2.0]]), float64([[0.25, 0.75], [0.5, 0.5]])
    assert divisors(nodes, weights, [8, 5], "radius").tolist() == [4, 2]
    assert divisors(nodes, weights, [8, 5], "trace").tolist() == [-2, 10]
    assert divisors(nodes, weights, [8, 5], "none").tolist() == [1, 1]
    assert divisors(nodes, weights, [8, 5], 2).tolist() == [1, 2]


def test_default_scale_is_the_median_root_mean_square() -> None:
    nodes, weights = float64([[3.0, -3.0], [0.0, 2.0], [0.0, 0.0], [1e200, 1e200]]), float64([[0.5, 0.5]] * 4)
    assert default_scale(nodes, weights) == pytest.approx(3.0)
    assert default_scale(nodes[2:3], weights[2:3]) == 1.0


def test_asinh_is_linear_near_zero_and_logarithmic_beyond() -> None:
    axis = Axis("asinh", scale=2.0)
    small, large = float64([1e-4, -1e-4]), float64([1e9, -1e9])
    torch.testing.assert_close(axis.place(small), small / 2)
    torch.testing.assert_close(axis.place(large), float64([1, -1]) * math.log(1e9))


def test_an_axis_says_all_it_depends_on() -> None:
    assert str(Axis()) == "linear axis"
    assert str(Axis("asinh", 10, 0.25)) == (
        "asinh axis (linear below 0.25) of eigenvalues divided by the block's eigenvalue number 10"
    )
    assert str(Axis("linear", "trace")) == "linear axis of eigenvalues divided by the block's trace"


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


def with_zero_block(**provenance: object) -> object:
    nodes = [[[1.0, 2.0], [0.0, 0.0], [1e-9, 2e-9], [-1.0, 0.5], [3.0, 4.0]]]
    return make_spectra(nodes, [[[0.5, 0.5]] * 5], dims=[20, 20, 20, 20, 2], names="abcde", **provenance)


def test_blocks_that_cannot_be_normalized_are_excluded_and_named() -> None:
    spectra = with_zero_block()
    assert spectra.zero_blocks == ("b",)
    assert spectra.js0().blocks == tuple("abcde") and spectra.js0().excluded == ()
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


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"name": "log"}, "name must be one of linear, asinh, got 'log'"),
        ({"normalize": "norm"}, "normalize must be one of none, radius, trace or k >= 1 for an eigenvalue, got 'norm'"),
        ({"normalize": 0}, "normalize must be .* got 0"),
        ({"normalize": True}, "normalize must be .* got True"),
        ({"scale": 1.0}, "scale must be positive and goes with the asinh axis, got 1.0 for linear"),
        ({"name": "asinh", "scale": 0.0}, "scale must be positive .* got 0.0 for asinh"),
        ({"name": "asinh", "scale": math.nan}, "scale must be positive .* got nan"),
    ],
)
def test_refusals(options: dict[str, object], text: str) -> None:
    with pytest.raises(ValueError, match=f"Axis: {text}"):
        Axis(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["log", None, ("asinh", "radius")])
def test_an_unknown_axis_is_refused(axis: object) -> None:
    text = "axis must be one of linear, asinh or an Axis, got "
    with pytest.raises(ValueError, match=f"op: {text}"):
        as_axis("op", axis)  # type: ignore[arg-type]
    for call in (random_spectra().js0, random_spectra().density, random_spectra().distance_matrix):
        with pytest.raises(ValueError, match=text):
            call(axis=axis)  # type: ignore[operator]


def test_sigma_above_the_range_on_the_axis_is_refused() -> None:
    spectra = random_spectra()
    for call in (spectra.js0, spectra.js_matrix, spectra.density, spectra.density_band):
        with pytest.raises(ValueError, match=r"sigma must be at most the range of all nodes, .*, got 50"):
            call(sigma=50.0)  # type: ignore[operator]
        with pytest.raises(ValueError, match=r"sigma must be at most the range of all nodes, .*, got 3"):
            call(sigma=3.0, axis=Axis(normalize="radius"))  # type: ignore[operator]
    zero = make_spectra([[[0.0], [0.0]]], [[[1.0], [1.0]]])
    assert float(zero.js0(sigma=3.0)) == 0.0


def test_a_block_axis_is_inverted_and_its_slope_is_the_derivative() -> None:
    x = float64([-30.0, -1.0, 0.0, 0.2, 4.0])
    for axis in (Axis(normalize="radius").of_block(2.0), Axis("asinh", "radius", 0.5).of_block(2.0)):
        torch.testing.assert_close(axis.invert(axis.place(x)), x)
        torch.testing.assert_close(axis.slope(x), (axis.place(x + 1e-6) - axis.place(x - 1e-6)) / 2e-6)


@pytest.mark.parametrize("normalize", ["radius", "trace", 1])
def test_a_block_of_which_nothing_is_known_is_not_normalized(normalize: str | int) -> None:
    spectra = make_spectra(
        [[[1.0, 3.0], [0.0, 0.0]]], [[[0.5, 0.5], [0.0, 0.0]]], steps=[[2, 0]], nonfinite=[[False, True]]
    )
    axis = Axis(normalize=normalize)
    assert normalizable(spectra, axis) == ("block0",) and normalizable(spectra, Axis()) == spectra.names
    for call in (spectra.density, spectra.density_band, spectra.cdf_band, spectra.wasserstein_error):
        with pytest.raises(ValueError, match=r"'block1' cannot be divided by .*: nothing is known of them"):
            call(axis=axis)
    assert spectra.density_band(blocks=["block0"], axis=axis).x.isfinite().all()
