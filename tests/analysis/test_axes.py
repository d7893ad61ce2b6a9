"""axes.py and its use in comparisons: hand numbers, invariances, and blocks that cannot be normalized."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess.analysis.axes import Axis, as_axis, default_scale, divisors, kth_largest
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


def test_divisors() -> None:
    nodes, weights = float64([[-4.0, 1.0], [2.0, 2.0]]), float64([[0.25, 0.75], [0.5, 0.5]])
    assert divisors(nodes, weights, [8, 5], "radius").tolist() == [4, 2]
    assert divisors(nodes, weights, [8, 5], "trace").tolist() == [-2, 10]
    assert divisors(nodes, weights, [8, 5], "none").tolist() == [1, 1]
    assert divisors(nodes, weights, [8, 5], 2).tolist() == [1, 2]


def test_default_scale_follows_the_lower_quartile_of_the_root_mean_squares() -> None:
    nodes, weights = float64([[3.0, -3.0], [0.0, 2.0], [0.0, 0.0], [1e200, 1e200]]), float64([[0.5, 0.5]] * 4)
    assert default_scale(nodes, weights) == pytest.approx(0.03 * 2**0.5)
    sizes = float64([[float(size)] for size in (9, 2, 8, 3, 7, 4, 6, 5)])
    assert default_scale(sizes, torch.ones_like(sizes)) == pytest.approx(0.03 * 3)  # rank 2 of 8
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


def test_a_block_axis_is_inverted_and_its_slope_is_the_derivative() -> None:
    x = float64([-30.0, -1.0, 0.0, 0.2, 4.0])
    for axis in (Axis(normalize="radius").of_block(2.0), Axis("asinh", "radius", 0.5).of_block(2.0)):
        torch.testing.assert_close(axis.invert(axis.place(x)), x)
        torch.testing.assert_close(axis.slope(x), (axis.place(x + 1e-6) - axis.place(x - 1e-6)) / 2e-6)
