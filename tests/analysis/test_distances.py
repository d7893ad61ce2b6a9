"""transport.py: against scipy, the metric axioms, and steps that coincide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp, wasserstein_distance

from blockhess.analysis.distances import METRICS, distance_matrix
from tests.helpers.spectra_cases import float64


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), spread=st.floats(1e-8, 1e8), ties=st.booleans())
def test_equals_scipy_and_is_a_metric(seed: int, spread: float, ties: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    nodes = spread * (nodes.round() if ties else nodes)
    weights = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    weights /= weights.sum(1, keepdim=True)
    for metric in METRICS:
        matrix = distance_matrix(nodes, weights, metric)
        assert torch.equal(matrix, matrix.T) and not matrix.diagonal().any()
        slack = 1e-12 * float(matrix.max())
        assert (matrix[:, None, :] <= matrix[:, :, None] + matrix[None, :, :] + slack).all()
        for i in range(4):
            for j in range(i):
                x, y, u, v = (part[k].numpy() for part in (nodes, weights) for k in (i, j))
                if metric == "wasserstein":
                    expected = wasserstein_distance(x, y, u, v)
                else:
                    points = torch.cat([nodes[i], nodes[j]])
                    cdfs = [(weights[k] * (nodes[k] <= points[:, None])).sum(1) for k in (i, j)]
                    expected = float((cdfs[0] - cdfs[1]).abs().max())
                assert matrix[i, j].item() == pytest.approx(expected, rel=1e-9, abs=1e-12 * spread + 1e-14)


def test_kolmogorov_equals_the_two_sample_statistic() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randn(2, 30, generator=generator, dtype=torch.float64).round(decimals=1)
    got = distance_matrix(nodes, torch.full((2, 30), 1 / 30, dtype=torch.float64), "kolmogorov")[0, 1].item()
    assert got == pytest.approx(ks_2samp(*nodes.numpy()).statistic, abs=1e-12)


def test_by_hand() -> None:
    nodes, weights = float64([[0.0, 1.0], [0.0, 3.0], [0.0, 0.0]]), float64([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]])
    assert distance_matrix(nodes, weights).tolist() == [[0, 1, 0.5], [1, 0, 1.5], [0.5, 1.5, 0]]
    assert distance_matrix(nodes, weights, "kolmogorov").tolist() == [[0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]
