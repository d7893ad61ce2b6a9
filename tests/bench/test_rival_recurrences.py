"""bench/accuracy/rival_recurrences.py: the recurrences agree, and have the known faults of their packages."""

from __future__ import annotations

import pytest
import torch

from bench.accuracy.coverage import diagonal
from bench.accuracy.errors import unit_probes
from bench.accuracy.rival_recurrences import RECURRENCES
from blockhess_ext import ops


def run(name: str, eigenvalues: torch.Tensor, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    return RECURRENCES[name](diagonal(eigenvalues), unit_probes(5, len(eigenvalues), 0), num_steps)


RIVALS = ("blockhess, none", "blockhess, full", "paper's code", "PyHessian", "curvlinops-like")


def test_all_recurrences_agree_on_an_easy_spectrum():
    eigenvalues = torch.linspace(-1, 2, 500, dtype=torch.float64)
    results = [run(name, eigenvalues, 8) for name in RIVALS]
    for alpha, beta in results[1:]:
        torch.testing.assert_close(alpha, results[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(beta, results[0][1], rtol=0, atol=1e-5)


def extremes(name: str, scale: float) -> tuple[float, float]:
    """Return the extreme nodes for a semidefinite operator with 21 distinct eigenvalues, 95 % of them 0."""
    eigenvalues = torch.zeros(400, dtype=torch.float64)
    eigenvalues[:20] = torch.linspace(2.5, 50, 20)
    alpha, beta = run(name, scale * eigenvalues, 60)
    nodes, weights = ops.tridiag_quadrature(alpha.contiguous(), beta.contiguous(), torch.full((5,), 60))
    seen = nodes[weights > 0] / max(scale, 1e-300)
    return float(seen.min()), float(seen.max())


def test_known_faults_of_rivals():
    for name in ("blockhess, none", "blockhess, full"):
        for scale in (1.0, 1e-7, 1e-9):
            low, high = extremes(name, scale)
            assert low > -1e-3 and high == pytest.approx(50, rel=1e-3)
    assert extremes("PyHessian", 1.0)[0] < -5
    assert extremes("paper's code", 1e-9)[0] < -10
    assert not run("curvlinops-like", torch.zeros(400).double(), 5)[0].isfinite().all()
