"""jensen_shannon.py: hand numbers, scipy's quad on analytic mixtures, identities, spectra that do not overlap."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import logsumexp

from blockhess.analysis import jensen_shannon
from blockhess.analysis.jensen_shannon import BATCHNORM_POLICIES, JS0, KINDS, js_matrix
from blockhess.problem.model_state import BATCHNORM
from tests.helpers.mixtures import by_quad, mixtures
from tests.helpers.spectra_cases import float64


@pytest.mark.parametrize(("spread", "seed"), [(1, 0), (5, 1), (9, 2), (20, 3), (40, 4), (70, 5)])
def test_integrals_equal_quad(spread: float, seed: int) -> None:
    nodes, weights = mixtures(spread, seed)
    expected = by_quad("divergence", nodes, weights, 1.0)
    got = js_matrix(nodes, weights, sigma=1.0, kind="divergence", base=math.e)[0, 1].item()
    assert got == pytest.approx(expected, rel=1e-10, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(0.1, 100), evenness=st.floats(0.01, 10))
def test_divergence_of_any_mixtures_is_exact_to_1e_10(seed: int, spread: float, evenness: float) -> None:
    rng = np.random.default_rng(seed)
    nodes = rng.uniform(-spread, spread, (2, 12))
    weights = rng.dirichlet(np.full(12, evenness), 2) + 1e-300
    weights /= weights.sum(1, keepdims=True)
    # Composite Gauss-Legendre of 40 points a quarter of sigma.
    edges = np.arange(nodes.min() - 12, nodes.max() + 12.25, 0.25)
    x, w = np.polynomial.legendre.leggauss(40)
    t = ((edges[1:] + edges[:-1])[:, None] + 0.25 * x) / 2
    logs = [
        logsumexp(-0.5 * (t[..., None] - a) ** 2, b=b, axis=-1) - math.log(2 * math.pi) / 2
        for a, b in zip(nodes, weights)
    ]
    middle = np.logaddexp(*logs) - math.log(2)
    expected = float((sum(0.5 * np.exp(p) * (p - middle) for p in logs) * (0.125 * w)).sum())
    got = js_matrix(float64(nodes.tolist()), float64(weights.tolist()), sigma=1.0, kind="divergence", base=math.e)
    assert got[0, 1].item() == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize("distance", [6.0, 8.6, 12.0])
def test_the_hardest_mixture_for_the_trapezoid_rule(distance: float) -> None:
    # p + q has its zeros nearest to the real axis, weighed by p, where two single peaks cross: see POINTS_PER_SIGMA.
    nodes, weights = float64([[0.0], [distance]]), float64([[1.0], [1.0]])
    got = js_matrix(nodes, weights, sigma=1.0, kind="divergence", base=math.e)[0, 1].item()
    assert got == pytest.approx(by_quad("divergence", nodes, weights, 1.0), abs=2e-12)


def test_hand_numbers() -> None:
    # Disjoint halves: the divergence is the share that differs.
    nodes, weights = float64([[0.0, 100.0], [0.0, -100.0]]), float64([[0.75, 0.25], [0.75, 0.25]])
    assert js_matrix(nodes, weights, sigma=1.0, kind="divergence")[0, 1].item() == pytest.approx(0.25, abs=1e-13)
    assert js_matrix(nodes, weights, sigma=1.0)[0, 1].item() == pytest.approx(0.5, abs=1e-13)
    # p lives on half of q: 1/2 log2(2 / (1 + 1/2)) + 1/2 (1/2 log2(2/3) + 1/2 log2 2).
    nodes, weights = float64([[0.0, 0.0], [0.0, 50.0]]), float64([[1.0, 0.0], [0.5, 0.5]])
    expected = 0.5 * math.log2(4 / 3) + 0.25 * math.log2(2 / 3) + 0.25
    assert js_matrix(nodes, weights, sigma=1.0, kind="divergence")[0, 1].item() == pytest.approx(expected, abs=1e-13)


@pytest.mark.parametrize("base", [2.0, math.e, 10.0])
def test_bounds_reached_by_spectra_that_do_not_overlap(base: float) -> None:
    nodes, weights = float64([[0.0, 1e3], [1e6, 2e6], [-1e12, -3e12]]), float64([[0.3, 0.7]] * 3)
    off_diagonal = ~torch.eye(3, dtype=torch.bool)
    bound = math.log(2) / math.log(base)
    for kind, value in (("divergence", bound), ("distance", math.sqrt(bound))):
        matrix = js_matrix(nodes, weights, sigma=10.0, kind=kind, base=base)
        torch.testing.assert_close(matrix[off_diagonal], float64([value] * 6), rtol=1e-12, atol=0)
        assert (matrix <= value).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("apart", [0.0, 1e-9, 1.0, 1e3, 1e9, 1e12])
def test_nothing_is_nan_however_far_apart(kind: str, apart: float) -> None:
    # The paper's NaN for c >= 9: densities that underflow, divided by each other.
    nodes, weights = float64([[0.0, 0.1], [apart, 1.1 * apart]]), float64([[0.5, 0.5], [1.0, 0.0]])
    matrix = js_matrix(nodes, weights, sigma=0.01 if apart < 1e9 else 10.0, kind=kind)
    assert matrix.isfinite().all() and (matrix >= 0).all()
    assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()


def test_the_naive_formula_is_nan_there() -> None:
    # Control of the above: what dividing the densities gives.
    p, q = (torch.exp(-0.5 * ((torch.tensor([0.0, 50.0]) - x) / 0.5) ** 2) for x in (0.0, 50.0))
    assert not (p * (p / q).log() + q * (q / p).log()).isfinite().any()


@pytest.mark.parametrize("kind", KINDS)
def test_equal_spectra_are_at_exactly_zero(kind: str) -> None:
    nodes, weights = mixtures(10, 2)
    twice = js_matrix(nodes[[0, 0, 1]], weights[[0, 0, 1]], sigma=0.3, kind=kind)
    assert twice[0, 1] == 0
    assert twice[0, 2] == twice[1, 2] > 0


def test_close_spectra_do_not_drown_in_rounding() -> None:
    # For a small shift e of a Gaussian, D = e^2 / (8 sigma^2) nats to first order.
    for shift in (1e-3, 1e-6):
        nodes, weights = float64([[1.0], [1.0 + shift]]), float64([[1.0], [1.0]])
        got = js_matrix(nodes, weights, sigma=0.5, base=math.e)[0, 1].item()
        assert got == pytest.approx(shift / (0.5 * math.sqrt(8)), rel=1e-5)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), n_blocks=st.integers(2, 5), spread=st.floats(0.1, 300))
def test_properties(seed: int, n_blocks: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    nodes = spread * torch.randn(n_blocks, 6, generator=generator, dtype=torch.float64)
    weights = torch.rand(n_blocks, 6, generator=generator, dtype=torch.float64)
    weights /= weights.sum(1, keepdim=True)
    distance, d = (js_matrix(nodes, weights, sigma=1.0, kind=kind) for kind in KINDS)
    assert torch.equal(d, d.T) and not d.diagonal().any()
    assert (d >= 0).all() and (d <= 1).all()
    torch.testing.assert_close(distance**2, d, rtol=1e-12, atol=1e-15)
    # A metric: through a third block is never shorter.
    assert (distance[:, None, :] <= distance[:, :, None] + distance[None, :, :] + 1e-12).all()
    # Blocks in another order, nodes in another order, a node cut in two: the same.
    order = torch.randperm(n_blocks, generator=generator)
    torch.testing.assert_close(js_matrix(nodes[order], weights[order], sigma=1.0), distance[order][:, order])
    torch.testing.assert_close(js_matrix(nodes.flip(1), weights.flip(1), sigma=1.0), distance, rtol=1e-9, atol=1e-9)
    halves = js_matrix(nodes.repeat(1, 2), weights.repeat(1, 2) / 2, sigma=1.0)
    torch.testing.assert_close(halves, distance, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-100, 1e-10, 1e10])
def test_scale_invariant(kind: str, scale: float) -> None:
    nodes, weights = mixtures(20, 3)
    expected = js_matrix(nodes, weights, sigma=0.2, kind=kind)
    torch.testing.assert_close(
        js_matrix(scale * nodes, weights, sigma=0.2 * scale, kind=kind), expected, rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_of_the_grid_change_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes, weights = mixtures(60, 4)
    whole = js_matrix(nodes, weights, sigma=0.5, kind=kind)
    monkeypatch.setattr(jensen_shannon, "CHUNK_ELEMENTS", 50)
    torch.testing.assert_close(js_matrix(nodes, weights, sigma=0.5, kind=kind), whole, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"kind": "hellinger"}, "kind must be one of distance, divergence, got 'hellinger'"),
        ({"base": 1.0}, "base must be finite and above 1, got 1.0"),
        ({"base": math.nan}, "base must be finite and above 1, got nan"),
        ({"sigma": 0.0}, "sigma must be finite and at least .*, got 0.0"),
        ({"sigma": math.nan}, "sigma must be finite and at least .*, got nan"),
    ],
)
def test_refusals(options: dict[str, object], text: str) -> None:
    nodes, weights = mixtures(5, 0)
    with pytest.raises(ValueError, match=f"js_matrix: {text}"):
        js_matrix(nodes, weights, **{"sigma": 0.1, **options})  # type: ignore[arg-type]


def test_js0_says_all_it_depends_on() -> None:
    js0 = JS0(0.123456, "distance", 2.0, "linear", 0.0125, ("a", "b", "c"), (("dead", "unused"),), "eval")
    assert float(js0) == 0.123456 and js0.num_pairs == 3
    assert str(js0) == (
        "JS0 = 0.1235: Jensen-Shannon distance, base 2; sigma 0.0125 on the linear axis; "
        "mean over 3 pairs of 3 blocks; BatchNorm in eval mode; excluded: dead (unused)"
    )
    js0 = JS0(0.5, "divergence", math.e, "linear", 1.0, ("a", "b"), (("x", "unused"),) * 9, "")
    assert str(js0) == (
        "JS0 = 0.5: Jensen-Shannon divergence, base 2.71828; sigma 1 on the linear axis; "
        "mean over 1 pair of 2 blocks; BatchNorm policy not recorded; "
        "excluded: " + ", ".join(["x (unused)"] * 6) + " and 3 more"
    )


@pytest.mark.parametrize(("bias", "shown"), [(0.0123, True), (-8e-16, False), (2e-15, False)])
def test_a_bias_below_the_last_digit_is_not_shown(bias: float, shown: bool) -> None:
    js0 = JS0(0.9, "distance", 2.0, "linear", 0.1, ("a", "b"), interval=(0.8, 1.0, 0.95), bias=bias)
    text = str(replace(js0, probes_interval=(0.85, 0.95, 0.95)))
    assert ("raised by few probes" in text) is shown and "0.85 ... 0.95 at this number of steps" in text


def test_every_batchnorm_policy_has_words() -> None:
    assert {*BATCHNORM, "none"} == BATCHNORM_POLICIES.keys()


def test_a_base_is_a_number() -> None:
    one = torch.ones(2, 1, dtype=torch.float64)
    with pytest.raises(TypeError, match="js_matrix: base must be a number, got 'e'"):
        js_matrix(one, one, sigma=1.0, base="e")  # type: ignore[arg-type]
