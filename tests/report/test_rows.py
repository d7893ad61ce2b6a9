"""Records of blocks, and the digits that their bounds support."""

from __future__ import annotations

import math

import pytest

from blockhess.report.rows import block_records, bounded, record_texts, share
from tests.helpers.spectra_cases import hand, make_spectra, random_spectra


@pytest.mark.parametrize(
    ("value", "bound", "text"),
    [
        (1.2345, 1.2346, "1.23e+00"),
        (1.2345, 1.25, "1.2e+00"),
        (-1.2345, -1.4, "-1e+00"),
        (1.2345, 2.3, "~1e+00"),
        (9.6, 12.0, "~1e+01"),
        (1.2345, 2.5, ">=1.2e+00"),
        (0.008, -0.0003, "<=8.0e-03"),  # the sign is open
        (0.00816, -0.0003, "<=8.2e-03"),
        (0.00812, -0.0003, "<=8.2e-03"),
        (-0.00819, -0.03, "<=-8.1e-03"),
        (-0.00812, 0.03, ">=-8.2e-03"),
        (0.00819, 0.03, ">=8.1e-03"),
        (0.0, -0.2, "<=0"),
        (0.0, -1e-7, "0"),  # within the tolerance
        (3.0, math.inf, ">=3.0e+00"),
        (-3.0, -math.inf, "<=-3.0e+00"),
        (math.nan, math.nan, "-"),
    ],
)
def test_digits_are_those_that_the_bound_supports(value: float, bound: float, text: str) -> None:
    assert bounded(value, bound, 1e-7) == text


def test_shares_are_rounded_outwards() -> None:
    assert share(0.1234, 0.1266) == "0.12..0.13" and share(0.0, 0.501) == "unresolved"
    assert share(0.375, 0.375) == "0.375" and share(0.0, 0.0) == "0" and share(math.nan, math.nan) == "-"
    assert share(0.1, 0.6) == "0.10..0.60"


def test_records_hold_every_interval() -> None:
    spectra = random_spectra()
    record = block_records(spectra)[1]
    assert record["lambda_max"] == spectra["block1"].lambda_max <= record["lambda_max_upper"]
    for name, method in (("trace", "trace_interval"), ("negative", "negative_interval"), ("zero", "zero_interval")):
        lower, upper = getattr(spectra, method)()
        assert (record[f"{name}_lower"], record[f"{name}_upper"]) == (float(lower[1]), float(upper[1]))


def test_a_block_that_is_noise_has_no_numbers() -> None:
    noise = {"block0": 1e-3, "block1": 0.0, "block2": 0.0}
    nodes = [[[-1e-4, 5e-4], [1.0, 2.0], [0.0, 0.0]]] * 2
    spectra = make_spectra(nodes, [[[0.5, 0.5]] * 3] * 2, hvp_error=noise)
    zero, known, exact_zero = block_records(spectra)
    estimates = [key for key in zero if key not in ("block", "shape", "dim", "steps", "note")]
    assert all(math.isnan(zero[key]) for key in estimates) and zero["note"] == "zero within HVP error"
    assert set(record_texts(zero, 1e-3).values()) == {"-"}
    assert known["lambda_max"] == 2.0 and known["note"] == ""
    assert exact_zero["lambda_max"] == 0.0 and exact_zero["zero_lower"] == 1.0  # zero, not noise
    assert spectra.noise_blocks == ("block0",)
    line = spectra.table().splitlines()[2].split()
    assert line[:3] == ["block0", "2", "2"] and line[3:13] == ["-"] * 10
    assert "0.0005" not in spectra.table() and "5.00e-04" not in spectra.table()


def test_nothing_below_the_noise_of_the_vectors() -> None:
    spectra = make_spectra([[[-2e-10, 1.0]]] * 2, [[[0.5, 0.5]]] * 2)
    assert block_records(spectra)[0]["lambda_min"] == 0.0
    assert block_records(make_spectra([[[-1.0, 1.0 + 1e-13]]], [[[0.5, 0.5]]]))[0]["trace"] == 0.0
    zero, tolerance = hand(), hand().zero_tolerance.tolist()
    texts = record_texts(block_records(zero)[2], tolerance[2])
    assert texts["lambda_min"] == texts["lambda_max"] == texts["trace"] == texts["trace_error"] == "0"
