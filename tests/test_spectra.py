"""Spectra: moments, distribution functions and ranges against hand numbers, and what comparisons take and say."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockhess._text import format_table, number
from blockhess.analysis.jensen_shannon import js_matrix
from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext import batched_slq
from tests.helpers.spectra_cases import float64, make_spectra, random_spectra

# Two probes, three blocks: a plain one, a single eigenvalue 4 (of one element), an all-zero one.
HAND = {
    "nodes": [
        [[-1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]],
        [[-1.0, 1.0, 3.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]],
    ],
    "weights": [[[0.5, 0.25, 0.25], [1.0, 0, 0], [1.0, 0, 0]], [[0.25, 0.25, 0.5], [1.0, 0, 0], [1.0, 0, 0]]],
    "dims": [10, 1, 7],
    "steps": [[3, 1, 1], [3, 1, 1]],
}


def hand(**options: object) -> Spectra:
    return make_spectra(**{**HAND, **options})  # type: ignore[arg-type]


def test_trace_and_its_error() -> None:
    # Probes of block 0 say 10 x 0.75 and 10 x 1.5.
    value, stderr = hand().trace()
    assert value.tolist() == pytest.approx([11.25, 4.0, 0.0])
    assert stderr.tolist() == pytest.approx([10 * (0.75 / 2), 0.0, 0.0])


def test_frobenius_norm_and_its_error() -> None:
    # Probes of block 0 say 10 x 3.75 and 10 x 5.
    value, stderr = hand().frobenius_norm()
    square = 10 * 4.375
    assert value.tolist() == pytest.approx([math.sqrt(square), 4.0, 0.0])
    assert stderr.tolist() == pytest.approx([10 * (1.25 / 2) / (2 * math.sqrt(square)), 0.0, 0.0])


def test_one_probe_knows_no_error_but_of_a_single_element() -> None:
    one = {key: HAND[key][:1] for key in ("nodes", "weights", "steps")}  # type: ignore[index]
    spectra = make_spectra(**one, dims=[10, 1, 7])
    for _, stderr in (spectra.trace(), spectra.frobenius_norm()):
        assert stderr.tolist() == [math.inf, 0.0, math.inf]


def test_range_and_negative_mass() -> None:
    low, high = hand().eigenvalue_range()
    assert low.tolist() == [-1.0, 4.0, 0.0] and high.tolist() == [3.0, 4.0, 0.0]
    assert hand().negative_mass().tolist() == pytest.approx([0.375, 0.0, 0.0])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_negative_mass_ignores_rounding_of_the_vectors(dtype: str) -> None:
    tolerance = 64 * torch.finfo(getattr(torch, dtype)).eps * 100
    nodes = [[[-1.5 * tolerance, -0.5 * tolerance, 100.0]]]
    spectra = make_spectra(nodes, [[[0.25, 0.25, 0.5]]], dtype=dtype)
    assert spectra.negative_mass().item() == pytest.approx(0.25)


def test_cdf_by_hand() -> None:
    x, shares = hand().cdf([-2.0, -1.0, 0.0, 1.0, 2.5, 3.0, 4.0])
    assert x.tolist() == [-2.0, -1.0, 0.0, 1.0, 2.5, 3.0, 4.0]
    expected = [
        [0.0, 0.375, 0.375, 0.5, 0.625, 1.0, 1.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
        [0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
    ]
    torch.testing.assert_close(shares, float64(expected))
    assert hand().cdf(0.0)[1].shape == (3, 1)


def test_cdf_at_its_own_nodes_ends_at_exactly_one() -> None:
    spectra = random_spectra()
    x, shares = spectra.cdf()
    assert (x.diff() > 0).all() and len(x) == spectra.quadrature.nodes.numel()
    assert (shares[:, -1] == 1).all() and (shares.diff(dim=1) >= 0).all()
    assert torch.equal(spectra.cdf(x.flip(0))[1], shares.flip(1))


def test_cdf_is_the_integral_of_the_density() -> None:
    spectra = random_spectra()
    grid, densities = spectra.density(sigma=1e-4)
    areas = torch.cumulative_trapezoid(densities, grid)
    nodes = spectra.merged[0].flatten()
    far = (grid[1:, None] - nodes).abs().amin(1) > 9e-4
    torch.testing.assert_close(spectra.cdf(grid[1:])[1][:, far], areas[:, far], rtol=0, atol=1e-10)


def test_quantiles_by_hand() -> None:
    # Block 0: cdf steps to 0.375 at -1, 0.5 at 1, 0.625 at 2, 1 at 3.
    got = hand().quantiles([0.0, 0.375, 0.4, 0.5, 0.625, 0.7, 1.0])
    assert got[0].tolist() == [-1.0, -1.0, 1.0, 1.0, 2.0, 3.0, 3.0]
    assert (got[1] == 4).all() and (got[2] == 0).all()
    assert hand().quantiles(0.5).tolist() == [[1.0], [4.0], [0.0]]


def test_quantiles_equal_those_of_numpy_for_equal_weights() -> None:
    nodes = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    spectra = make_spectra([[nodes.sort().values.tolist()]], [[[1 / 40] * 40]])
    q = (np.arange(40) + 0.5) / 40
    assert spectra.quantiles(q.tolist())[0].tolist() == np.quantile(nodes.numpy(), q, method="inverted_cdf").tolist()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), q=st.floats(0, 1))
def test_quantiles_invert_the_cdf(seed: int, q: float) -> None:
    spectra = random_spectra(seed=seed)
    x = spectra.quantiles(q)
    for row in range(len(spectra)):
        assert spectra.cdf(x[row])[1][row, 0] >= q - 1e-11
        assert spectra.cdf(x[row] - 1e-9 * abs(x[row]))[1][row, 0] < max(q, 1e-300)


def test_padding_and_unfinished_probes_take_no_part() -> None:
    # Garbage beyond the steps, a probe that made no step: the rest is as without them.
    nodes = [[[1.0, 2.0, math.nan]], [[math.nan, 5.0, 1e300]]]
    weights = [[[0.25, 0.75, 0.5]], [[0.5, 0.5, math.nan]]]
    broken = make_spectra(nodes, weights, steps=[[2], [0]], nonfinite=[[True], [True]], dims=[5])
    clean = make_spectra([[[1.0, 2.0]]], [[[0.25, 0.75]]], dims=[5])
    assert broken.trace()[0].tolist() == clean.trace()[0].tolist() == [8.75]
    assert broken.trace()[1].tolist() == [math.inf]
    assert broken.eigenvalue_range() == clean.eigenvalue_range()
    assert broken.negative_mass().tolist() == [0.0]
    assert broken.quantiles([0.2, 0.3]).tolist() == [[1.0, 2.0]]
    grid, density = broken.density(sigma=0.1)
    torch.testing.assert_close(density, clean.density(sigma=0.1, grid=grid)[1])


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


def test_moments_of_a_known_operator() -> None:
    # End to end with batched_slq: diagonal blocks of known trace and norm, errors about as large as stated.
    diagonal = torch.linspace(-1, 3, 200, dtype=torch.float64)
    dims = [150, 49, 1]
    quadrature = batched_slq(lambda v: v * diagonal, dims, num_probes=40, num_steps=20, dtype=torch.float64)
    spectra = Spectra([BlockInfo(f"b{d}", (d,), d, (f"b{d}",)) for d in dims], quadrature, {})
    for (value, stderr), exact in (
        (spectra.trace(), [part.sum() for part in diagonal.split(dims)]),
        (spectra.frobenius_norm(), [part.norm() for part in diagonal.split(dims)]),
    ):
        assert ((value - torch.stack(exact)).abs() <= 4 * stderr + 1e-12).all()
        assert (stderr[:2] > 0).all() and stderr[2] == 0
    low, high = spectra.eigenvalue_range()
    assert (low >= torch.stack([part.min() for part in diagonal.split(dims)]) - 1e-12).all()
    assert (high <= torch.stack([part.max() for part in diagonal.split(dims)]) + 1e-12).all()
    value, stderr = quadrature.moment(1)
    exact, error = quadrature.integrate(lambda x: x)
    torch.testing.assert_close((value, stderr), (exact, torch.where(torch.tensor(dims) == 1, 0.0, error)))


def test_density_defaults() -> None:
    spectra = random_spectra()
    nodes = spectra.merged[0]
    assert spectra.default_sigma() == pytest.approx(0.01 * float(nodes.max() - nodes.min()))
    grid, densities = spectra.density()
    assert densities.shape == (4, len(grid))
    torch.testing.assert_close(torch.trapezoid(densities, grid), torch.ones(4).double(), rtol=0, atol=1e-12)
    assert grid[0] <= nodes.min() - 8.5 * spectra.default_sigma()
    assert grid[-1] >= nodes.max() + 8.5 * spectra.default_sigma()


def test_density_is_the_mean_over_probes() -> None:
    spectra = random_spectra(n_probes=2)
    grid = torch.linspace(-3, 3, 50, dtype=torch.float64)
    single = []
    for probe in range(2):
        q = spectra.quadrature
        one = {f: getattr(q, f)[probe : probe + 1] for f in ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")}
        single.append(Spectra(spectra.blocks, dataclasses.replace(q, **one), {}).density(0.1, grid)[1])
    torch.testing.assert_close(spectra.density(0.1, grid)[1], (single[0] + single[1]) / 2)
    assert spectra.density(0.1, [0.0, 1.0])[1].shape == (4, 2)


def test_refuses_bad_density_cdf_and_quantile_arguments() -> None:
    spectra = random_spectra()
    with pytest.raises(ValueError, match="density: sigma must be finite"):
        spectra.density(sigma=-1.0)
    with pytest.raises(ValueError, match="density: grid must ascend"):
        spectra.density(grid=[1.0, 0.0])
    with pytest.raises(ValueError, match="cdf: x must have shape"):
        spectra.cdf([math.nan])
    for q in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"quantiles: q must be in \[0, 1\]"):
            spectra.quantiles(q)


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


def test_js_matrix_is_that_of_the_merged_measures() -> None:
    spectra = random_spectra()
    nodes, weights = spectra.merged
    for kind in ("distance", "divergence"):
        expected = js_matrix(nodes, weights, sigma=spectra.default_sigma(), kind=kind)
        assert torch.equal(spectra.js_matrix(kind), expected)
    pair = spectra.js_matrix(sigma=0.1, blocks=["block3", "block0"])
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


def test_default_sigma_follows_the_compared_blocks() -> None:
    spectra = random_spectra()
    few = ["block2", "block3"]
    assert spectra.js0(blocks=few).sigma == spectra.default_sigma(few) < spectra.default_sigma() / 10


def test_one_and_the_same_spike_everywhere() -> None:
    for value in (0.0, 3.0, -1e-9):
        spectra = make_spectra([[[value], [value], [value]]], [[[1.0], [1.0], [1.0]]])
        for kind in ("distance", "divergence"):
            assert not spectra.js_matrix(kind).any()


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


def test_refuses_blocks_that_do_not_fit() -> None:
    spectra = random_spectra()
    with pytest.raises(ValueError, match=r"Spectra: blocks must have dims \(12, 12, 12, 12\), got \(12, 12, 12\)"):
        Spectra(spectra.blocks[:3], spectra.quadrature, {})
    with pytest.raises(ValueError, match="Spectra: blocks must have different names, got block0 more than once"):
        Spectra(spectra.blocks[:1] * 4, spectra.quadrature, {})
    with pytest.raises(TypeError, match="Spectra: provenance must hold JSON values only"):
        Spectra(spectra.blocks, spectra.quadrature, {"model": torch.nn.Linear(1, 1)})


def test_provenance_is_a_copy() -> None:
    frozen = ["a"]
    spectra = random_spectra(frozen=frozen)
    frozen.append("b")
    assert spectra.provenance == {"frozen": ["a"]}


def test_table() -> None:
    spectra = hand(names=["w", "one", "zero"], notes=["", "tied with x", "unused"], steps=[[3, 1, 1], [2, 1, 1]])
    lines = spectra.table().splitlines()
    assert len(lines) == 5 and lines[0].split()[:4] == ["block", "shape", "dim", "lambda_min"]
    assert "2..3" in lines[2] and lines[3].endswith("tied with x") and lines[4].endswith("unused")
    assert len({len(line) for line in lines[1:2]} | {max(map(len, lines))}) == 1  # the rule spans all columns
    assert spectra.table(["zero", "w"]).splitlines()[2].startswith("zero")
    assert "note" not in hand().table()
    with pytest.raises(ValueError, match="no block is called 'x'"):
        spectra.table(["x"])


def test_format_table() -> None:
    table = format_table(["block", "dim", "empty"], [["w", "12", ""], ["layer.bias", "4", ""]])
    assert table == "block       dim\n----------  ---\nw            12\nlayer.bias    4"
    assert format_table(["a", "b"], []) == "a  b\n-  -"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (math.nan, "-"), (math.inf, "inf"), (-1.2345e-7, "-1.23e-07"), (12345.0, "1.23e+04")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_repr_is_one_readable_line() -> None:
    assert repr(random_spectra(model="GPT")) == (
        "Spectra of GPT: 4 blocks, 48 parameters; 3 gaussian probes, 12 Lanczos steps in float32, seed 3"
    )
