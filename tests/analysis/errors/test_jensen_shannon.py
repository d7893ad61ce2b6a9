"""js_error.py and sensitivity.py: the noise of JS0 against many runs, and the table against single calls."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess.analysis.axes import Axis
from blockhess.analysis.errors.intervals import jackknife, leave_one_out
from blockhess.analysis.errors.jensen_shannon import mean_of_pairs
from blockhess.analysis.jensen_shannon import js_matrix
from blockhess_ext import batched_slq
from tests.analysis.errors.test_bands import N_RUNS, runs
from tests.helpers.dense_measures import spectra
from tests.helpers.spectra_cases import as_spectra, make_spectra


def three_blocks(n_probes: int) -> object:
    """Blocks of 60 elements: two with the same spectrum, one other."""
    kinds = spectra(60)
    diagonal = torch.cat([kinds["uniform"], kinds["uniform"], kinds["arcsine"]])
    return batched_slq(lambda v: v * diagonal, [60] * 3, num_probes=n_probes, num_steps=30, dtype=torch.float64)


def test_bias_and_interval_of_js0() -> None:
    q = three_blocks(5 * N_RUNS)
    truth = as_spectra(q).js0(axis="linear", sigma=0.05)
    estimates = [as_spectra(part).js0(axis="linear", sigma=0.05, confidence=0.95) for part in runs(q)]
    raw = torch.tensor([js0.value for js0 in estimates]) - truth.value
    corrected = torch.tensor([js0.value - js0.bias for js0 in estimates]) - truth.value
    assert raw.mean() > 0.02, "noise must raise it: otherwise nothing is tested"
    assert abs(corrected.mean()) < 0.4 * raw.mean()
    inside = [js0.interval[0] <= truth.value <= js0.interval[1] for js0 in estimates]
    assert sum(inside) >= 0.9 * N_RUNS
    assert sum(js0.probes_interval[1] - js0.probes_interval[0] < 0.22 for js0 in estimates) > 0.9 * N_RUNS


@pytest.mark.parametrize("kind", ["distance", "divergence"])
def test_the_interval_of_js0_contains_what_few_steps_do(kind: str) -> None:
    """Of six spectra at 10 x 10: the interval for the probes alone misses the exact value, the total one does not."""
    exact = [x / x.abs().max() for x in spectra(400).values()]
    found = coverage_of_js0(exact, num_probes=10, num_steps=10, runs=8, kind=kind)
    assert all(total for total, _ in found) and sum(probes for _, probes in found) <= 2


@pytest.mark.parametrize("kind", ["distance", "divergence"])
def test_the_interval_of_js0_contains_that_of_spectra_whose_nodes_do_not_overlap(kind: str) -> None:
    """Their distance is near 1 for any number of steps, that of the exact spectra is not."""
    normal = torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = [torch.cat([torch.zeros(200).double(), x]) for x in (normal, normal**2)]
    found = coverage_of_js0(exact, num_probes=4, num_steps=10, runs=20, kind=kind)
    assert sum(total for total, _ in found) >= 19 and sum(probes for _, probes in found) <= 4


def test_the_interval_of_js0_contains_that_of_an_inexact_beside_an_exact_spectrum() -> None:
    normal = torch.randn(117, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = [torch.cat([torch.zeros(183).double(), normal]), torch.cat([torch.zeros(299), torch.ones(1)]).double()]
    found = coverage_of_js0(exact, num_probes=10, num_steps=21, runs=20, kind="distance")
    assert all(total for total, _ in found)


def coverage_of_js0(
    exact: list[torch.Tensor], *, num_probes: int, num_steps: int, runs: int, kind: str
) -> list[tuple[bool, bool]]:
    """Return for every run whether interval and probes_interval contain the JS0 of the exact spectra, (n,) each."""
    eigenvalues = torch.stack(exact)
    dims = [eigenvalues.shape[1]] * len(exact)
    q = batched_slq(
        lambda v: v * eigenvalues.flatten().to(v.dtype), dims, num_probes=num_probes * runs, num_steps=num_steps
    )
    found = []
    for run in range(runs):
        part = q.of_probes(slice(num_probes * run, num_probes * (run + 1)))
        js0 = as_spectra(part).js0(kind, confidence=0.95)
        placed = Axis(js0.axis, scale=js0.scale).place(eigenvalues)
        weights = torch.full_like(placed, 1 / eigenvalues.shape[1])
        truth = mean_of_pairs(js_matrix(placed, weights, sigma=js0.sigma, kind=kind))
        (low, high, _), (probes_low, probes_high, _) = js0.interval, js0.probes_interval
        assert low <= probes_low <= probes_high <= high
        found.append((low <= truth <= high, probes_low <= truth <= probes_high))
    return found


def test_the_error_of_the_steps_vanishes_for_exact_recurrences() -> None:
    q = batched_slq(lambda v: v * torch.arange(24.0), [8] * 3, num_probes=4, num_steps=8)
    js0 = as_spectra(q).js0(axis="linear", confidence=0.95)
    assert js0.interval == pytest.approx(js0.probes_interval, abs=1e-9)


def test_the_error_of_a_single_step_is_unknown() -> None:
    q = batched_slq(lambda v: v * torch.arange(24.0), [8] * 3, num_probes=4, num_steps=1)
    assert as_spectra(q).js0(axis="linear", confidence=0.95).interval == (0.0, 1.0, 0.95)


@pytest.mark.parametrize("kind", ["distance", "divergence"])
def test_js_matrix_error(kind: str) -> None:
    result = as_spectra(three_blocks(6))
    bias, stderr = result.js_matrix_error(kind=kind, axis="linear", sigma=0.05)
    assert bias.shape == stderr.shape == (3, 3)
    assert torch.equal(bias, bias.T) and not bias.diagonal().any()
    # The pair of equal spectra is at 0: all that is seen there is noise, and much of it is taken for such.
    value = result.js_matrix(kind, axis="linear", sigma=0.05)
    assert bias[0, 1] > 0.5 * value[0, 1] > 0 and stderr[0, 2] > 0
    if kind != "distance":
        parts = [
            js_matrix(*result.quadrature.of_probes(rest).merged(), sigma=0.05, kind=kind)
            for rest in ([q for q in range(6) if q != p] for p in range(6))
        ]
        torch.testing.assert_close(bias, 5 * (torch.stack(parts).mean(0) - value), rtol=1e-9, atol=1e-12)


def test_fewer_probes_of_a_block_are_overestimated_by_what_is_said() -> None:
    x = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # what k = 3 of n = 8 gave
    for power in (1, 2):
        alone, among = (
            jackknife(*leave_one_out(lambda probes, power=power: x[[p for p in probes if p < 3]].mean() ** power, n))
            for n in (3, 8)
        )
        factor = 3 * 7 / (8 * 2)
        torch.testing.assert_close(among[0], factor * alone[0], rtol=1e-9, atol=1e-12)
        if power == 1:  # of others the spread is about the mean of the parts, which differs
            torch.testing.assert_close(among[1], factor**0.5 * alone[1], rtol=1e-9, atol=0)


def test_the_interval_stays_within_the_bounds_and_is_printed() -> None:
    js0 = as_spectra(three_blocks(3)).js0(confidence=0.9)
    lower, upper, confidence = js0.interval
    assert 0 <= lower <= upper <= 1 and confidence == 0.9
    assert f"({lower:.3g} ... {upper:.3g} with 90 %" in str(js0)
    assert str(js0).startswith(f"JS0 = {js0.value:.4g} (")
    plain = as_spectra(three_blocks(3)).js0()
    assert plain.value == js0.value and plain.interval is None and " with " not in str(plain)


def test_one_probe_gives_the_widest_interval() -> None:
    js0 = as_spectra(three_blocks(1)).js0("divergence", math.e, confidence=0.95)
    assert js0.interval == (0.0, pytest.approx(math.log(2)), 0.95) and math.isnan(js0.stderr)
    assert "(no interval: one probe)" in str(js0) and "nan" not in str(js0)
    one_left = make_spectra(
        [[[1.0], [2.0]], [[1.0], [0.0]]], [[[1.0], [1.0]], [[1.0], [0.0]]], steps=[[1, 1], [1, 0]], dims=[5, 5]
    )
    assert one_left.js_matrix_error(blocks=["block0", "block1"])[1].isnan().any()
