"""The paper's quadratic models: spectra, condition numbers, what measured spectra become, and bad input."""

from __future__ import annotations

import pytest
import torch

from blockhess_paper.theory.quadratics import CASE_3, CASE_4, case, make_quadratics, quadratic_from_spectra
from tests.helpers.spectra_cases import make_spectra

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("number", [1, 2, 3, 4])
def test_cases_have_condition_number_2000(number):
    problems = case(number, num_trials=3, seed=1)
    torch.testing.assert_close(problems.kappa, torch.full((3,), 2000.0, dtype=torch.float64), rtol=1e-12, atol=0)
    eigenvalues = torch.linalg.eigvalsh(problems.hessian)
    d = eigenvalues.shape[-1]
    torch.testing.assert_close(eigenvalues, problems.eigenvalues, rtol=0, atol=100 * d * EPS * 2000)
    assert problems.hessian.shape == ((3, 4, 100, 100) if number < 3 else (3, 3, 3, 3))
    assert not torch.equal(problems.hessian[0], problems.hessian[1])


def test_cases_3_and_4_share_all_eigenvalues():
    assert sorted(value for block in CASE_3 for value in block) == sorted(value for block in CASE_4 for value in block)
    assert case(3).block_kappa[0].tolist() == [3.0, 101 / 99, 2000 / 1998]
    assert case(4).block_kappa[0].tolist() == [1998.0, 1999 / 2, 2000 / 3]


def test_gaussian_rotation_does_not_keep_the_spectrum():
    problems = make_quadratics(CASE_3, num_trials=20, rotation="gaussian")
    torch.testing.assert_close(torch.linalg.eigvalsh(problems.hessian), problems.eigenvalues)
    assert bool((problems.kappa > 4000).any())


def test_rotations_are_uniform():
    """E Q_11 = 0: without fixing the signs of QR it is not."""
    problems = make_quadratics([[1.0, 2.0]], num_trials=20_000)
    first = problems.hessian[:, 0, 0, 0]  # cos^2 + 2 sin^2 of a uniform angle: mean 3/2, variance 1/8
    assert abs(first.mean().item() - 1.5) < 5 * (1 / 8 / 20_000) ** 0.5
    assert abs(first.var().item() - 1 / 8) < 0.005


def test_one_shift_and_scale_for_all_blocks():
    spectra = make_spectra([[[0.0, 10.0], [4.0, 5.0]]], [[[0.5, 0.5], [0.5, 0.5]]])
    problems = quadratic_from_spectra(spectra, samples=50, kappa=101.0, num_trials=4)
    for trial in problems.eigenvalues:
        assert set(trial[0].tolist()) == {1.0, 101.0}
        assert set(trial[1].tolist()) == {41.0, 51.0}
    torch.testing.assert_close(problems.block_kappa[0], torch.tensor([101.0, 51 / 41], dtype=torch.float64))


def test_draws_follow_the_weights():
    spectra = make_spectra([[[0.0, 1.0], [0.0, 1.0]]], [[[0.9, 0.1], [0.2, 0.8]]])
    problems = quadratic_from_spectra(spectra, samples=100, num_trials=100)
    share = (problems.eigenvalues > 1).double().mean((0, 2))
    torch.testing.assert_close(share, torch.tensor([0.1, 0.8], dtype=torch.float64), rtol=0, atol=0.02)


def test_same_seed_same_problems():
    assert torch.equal(case(1, seed=3).hessian, case(1, seed=3).hessian)
    assert not torch.equal(case(1, seed=3).hessian, case(1, seed=4).hessian)


@pytest.mark.parametrize(
    ("eigenvalues", "message"),
    [
        ([[1.0, 2.0], [3.0, -4.0]], "positive and finite, got -4 at position 1 of block 1"),
        ([[1.0, 0.0]], "got 0 at position 1 of block 0"),
        ([[1.0, float("nan")]], "got nan"),
        ([[1.0, 2.0], [3.0]], r"same size, got \[2, 1\]"),
        (torch.ones(3), "shape"),
        ([], "shape"),
    ],
)
def test_bad_eigenvalues(eigenvalues, message):
    with pytest.raises(ValueError, match=message):
        make_quadratics(eigenvalues)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 1}, "samples must be at least 2, got 1"),
        ({"kappa": 1.0}, "kappa"),
        ({"num_trials": 0}, "num_trials"),
        ({"blocks": ["block0", "nothing"]}, "nothing"),
    ],
)
def test_bad_requests(options, message):
    spectra = make_spectra([[[0.0, 10.0], [4.0, 5.0]]], [[[0.5, 0.5], [0.5, 0.5]]])
    with pytest.raises(ValueError, match=message):
        quadratic_from_spectra(spectra, **options)


def test_equal_eigenvalues_are_too_few():
    spectra = make_spectra([[[3.0, 3.0], [3.0, 3.0]]], [[[0.5, 0.5], [0.5, 0.5]]])
    with pytest.raises(ValueError, match="two different eigenvalues, got 100 times 3"):
        quadratic_from_spectra(spectra)


def test_unknown_case_and_rotation():
    with pytest.raises(ValueError, match="got 5"):
        case(5)
    with pytest.raises(ValueError, match="rotation"):
        make_quadratics(CASE_3, rotation="none")
    with pytest.raises(ValueError, match="num_trials"):
        make_quadratics(CASE_3, num_trials=0)
