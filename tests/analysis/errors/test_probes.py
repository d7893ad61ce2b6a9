"""Variance over probes and interval of the trace."""

from __future__ import annotations

import torch

from blockhess_ext import batched_slq
from tests.helpers.dense_measures import lanczos
from tests.helpers.spectra_cases import as_spectra, float64


def test_trace_interval_is_skewed_towards_the_side_of_the_outlier() -> None:
    for sign in (1.0, -1.0):
        eigenvalues = torch.zeros(200).double()
        eigenvalues[0] = sign
        lower, upper = as_spectra(lanczos(eigenvalues, num_probes=5).quadrature).trace_interval()
        value = as_spectra(lanczos(eigenvalues, num_probes=5).quadrature).trace()[0]
        below, above = float(value - lower), float(upper - value)
        assert above > 1.5 * below if sign > 0 else below > 1.5 * above
        assert lower <= sign <= upper


def test_rademacher_probes_are_not_taken_for_gaussian_ones() -> None:
    # On a diagonal operator every Rademacher probe gives the exact trace: the sample knows, theory for the sphere errs.
    diagonal = torch.linspace(0, 1, 50, dtype=torch.float64)
    q = batched_slq(
        lambda v: v * diagonal, [50], num_probes=4, num_steps=5, distribution="rademacher", dtype=torch.float64
    )
    lower, upper = as_spectra(q).trace_interval()
    assert (upper - lower).item() < 1e-10
    assert float64([25.0]).sub(lower).abs().item() < 1e-10
