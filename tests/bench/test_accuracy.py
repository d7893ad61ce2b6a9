"""bench/accuracy/accuracy.py's parts: the spectra are what their names say, and the rivals are restated with their faults."""

from __future__ import annotations

import pytest
import torch
from scipy import stats


def test_synthetic_spectra_have_the_moments_of_their_densities():
    from bench.harness.known_spectra import synthetic

    x = synthetic(20_000)
    for name, mean, variance in (("semicircle", 0, 1 / 4), ("Marchenko-Pastur", 1, 1 / 2), ("uniform", 0, 1 / 3)):
        assert x[name].mean().item() == pytest.approx(mean, abs=1e-3)
        assert x[name].var().item() == pytest.approx(variance, rel=2e-3)
    assert x["spikes and bulk"].max() == 1 and x["spikes and bulk"].min() == -0.7
    assert (x["bimodal"] > 0).double().mean() == 0.5
    slope = stats.linregress(
        torch.arange(1, 2001).log().numpy(), x["power law"].sort(descending=True).values[:2000].log()
    )
    assert slope.slope == pytest.approx(-0.75, abs=0.05)


def test_dense_hessian_of_a_quadratic_form():
    from bench.harness.known_spectra import dense_hessian

    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    w = torch.randn(2, 3, generator=generator, dtype=torch.float64).requires_grad_()
    loss = (w.flatten() @ matrix @ w.flatten()) / 2 + w.sum()
    torch.testing.assert_close(dense_hessian(loss, w), (matrix + matrix.T) / 2)


def run(name: str, eigenvalues: torch.Tensor, num_steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    from bench.accuracy.errors import diagonal, unit_probes
    from bench.accuracy.rival_recurrences import RECURRENCES

    return RECURRENCES[name](diagonal(eigenvalues), unit_probes(5, len(eigenvalues), 0), num_steps)


RIVALS = ("blockhess, none", "blockhess, full", "paper's code", "PyHessian", "curvlinops-like")


def test_all_recurrences_agree_where_nothing_is_difficult():
    eigenvalues = torch.linspace(-1, 2, 500, dtype=torch.float64)
    results = [run(name, eigenvalues, 8) for name in RIVALS]
    for alpha, beta in results[1:]:
        torch.testing.assert_close(alpha, results[0][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(beta, results[0][1], rtol=0, atol=1e-5)


def extremes(name: str, scale: float) -> tuple[float, float]:
    """Of the semidefinite operator of 21 distinct eigenvalues up to 50, 95 % of the mass at 0."""
    from blockhess_ext import ops

    eigenvalues = torch.zeros(400, dtype=torch.float64)
    eigenvalues[:20] = torch.linspace(2.5, 50, 20)
    alpha, beta = run(name, scale * eigenvalues, 60)
    nodes, weights = ops.tridiag_quadrature(alpha.contiguous(), beta.contiguous(), torch.full((5,), 60))
    seen = nodes[weights > 0] / max(scale, 1e-300)
    return float(seen.min()), float(seen.max())


def test_rivals_break_as_they_are_known_to_and_ours_does_not():
    for name in ("blockhess, none", "blockhess, full"):
        for scale in (1.0, 1e-7, 1e-9):
            low, high = extremes(name, scale)
            assert low > -1e-3 and high == pytest.approx(50, rel=1e-3)
    assert extremes("PyHessian", 1.0)[0] < -5
    assert extremes("paper's code", 1e-9)[0] < -10
    assert not run("curvlinops-like", torch.zeros(400).double(), 5)[0].isfinite().all()


def test_errors_of_the_exact_quadrature_are_zero():
    from bench.accuracy.errors import errors

    alpha, beta = torch.tensor([[1.0, 1.0]]).double(), torch.tensor([[2.0, 0.0]]).double()  # eigenvalues -1, 3
    l1, w1 = errors(alpha, beta, torch.tensor([-1.0, 3.0]).double())
    assert l1 < 1e-9 and w1 < 1e-12
    l1, w1 = errors(alpha, beta, torch.tensor([-1.0, 4.0]).double())
    assert l1 == pytest.approx(1.0, abs=1e-3) and w1 == pytest.approx(0.5 / 5)
    assert errors(alpha * float("nan"), beta, alpha[0]) == (float("inf"), float("inf"))


def test_a_kept_result_tells_what_the_run_told(tmp_path, monkeypatch, capsys):
    from bench.accuracy import axes

    kept, tables = tmp_path / "axes.json", tmp_path / "axes.txt"
    monkeypatch.setattr("sys.argv", ["axes", "--quick", "--json", str(kept), "--text", str(tables)])
    axes.main()
    told = capsys.readouterr().out
    assert tables.read_text() == told and told.count("\n") > len(axes.AXES) * len(axes.NAMES)
    monkeypatch.setattr(axes, "measure", None)  # nothing is measured again
    monkeypatch.setattr("sys.argv", ["axes", "--show", str(kept)])
    axes.main()
    assert capsys.readouterr().out == told
