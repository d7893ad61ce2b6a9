"""Propositions 1 and 2, Theorems 1 and 2, section 3.3, Table 2: by hand, by identities, and each bound made to fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from blockhess_paper.results import NOT_REPRODUCED, PARTLY, REPRODUCED, quantiles, verdict
from blockhess_paper.theory.bounds import Bound, count_violations
from blockhess_paper.theory.descent import blockwise_rate, iterates, optimal_rate
from blockhess_paper.theory.proposition1 import example
from blockhess_paper.theory.proposition2 import amplitude, one_dimensional
from blockhess_paper.theory.quadratics import Quadratics, case, make_quadratics
from blockhess_paper.theory.section33 import preconditioned_ratio
from blockhess_paper.theory.table2 import fit, iterations, measure, sweep_block
from blockhess_paper.theory.theorems import check_theorem1, check_theorem2, constants, counterexample


def float64(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("multiple", [0.2, 0.7, 1.0, 1.02])
def test_proposition_1_with_its_square_holds_and_is_tight(multiple):
    problems = example(float64([10.0, 2000.0]))
    rho = (1 - 2 / (problems.kappa + 1))[:, None]
    bounds = {
        "printed": Bound(rho, lower=True),
        "corrected": Bound(rho**2, lower=True),
        "more": Bound(rho**2 * 1.00001, lower=True),
    }
    found = count_violations(iterates(problems, multiple * optimal_rate(problems), 200), problems.kappa, bounds)
    assert found["corrected"].broken == 0
    assert found["corrected"].iterations == 400
    if multiple == 1.0:
        assert found["printed"].broken == found["more"].broken == 400


def test_no_problem_can_save_the_printed_proposition():
    """At 2 / (mu + L) the loss of every problem shrinks by rho^2 or more, below the printed lower bound rho."""
    problems = case(4, num_trials=10)
    rho = (1 - 2 / (problems.kappa + 1))[:, None]
    bounds = {"upper": Bound(rho**2), "printed lower": Bound(rho, lower=True)}
    found = count_violations(iterates(problems, optimal_rate(problems), 100), problems.kappa, bounds)
    assert found["upper"].broken == 0
    assert found["printed lower"].broken == found["printed lower"].iterations == 1000


def test_theorem_1_is_tight_with_the_square():
    """From the flattest eigenvector of one block, blockwise GD contracts by (1 - 1/kappa)^2 exactly."""
    values = float64([[[1.0, 4.0]]])
    problems = Quadratics(values[0, 0].diag()[None, None], values, float64([[[1.0, 0.0]]]))
    bounds = {"squared": Bound(float64([[0.75**2]])), "less": Bound(float64([[0.75**2 - 1e-9]]))}
    found = count_violations(iterates(problems, blockwise_rate(problems), 20), problems.kappa, bounds)
    assert (found["squared"].broken, found["less"].broken) == (0, 20)


def test_theorem_1_holds_on_the_cases():
    for number in (3, 4):
        found = check_theorem1(case(number, num_trials=20), 100)
        assert found["printed"].broken == found["squared"].broken == 0


def test_constants_by_hand():
    values = float64([[[1.0, 2.0], [10.0, 10.0]]])
    hessian = torch.stack([torch.diag(block) for block in values[0]])[None]
    problems = Quadratics(hessian, values, float64([[[3.0, -0.5], [1.0, 4.0]]]))
    known = constants(problems)  # |H w| = (3, 1), (10, 40); over 2 and 10
    assert known.c1.tolist() == [[0.5, 1.0]] and known.c2.tolist() == [[1.5, 4.0]]
    assert known.r.tolist() == [16.0] and known.r_corrected.tolist() == [64.0]


def test_theorem_2_printed_fails_and_corrected_holds():
    found = check_theorem2(counterexample(), 10)
    assert found["proof"].broken == found["proof"].iterations == 10
    assert found["corrected"].broken == found["sharp"].broken == 0
    found = check_theorem2(case(3, num_trials=50), 100)
    assert found["statement"].trials >= 45
    assert found["corrected"].broken == found["sharp"].broken == 0


def test_theorem_2_sharp_bound_is_reached():
    """On the counterexample the loss shrinks by (1 - C_11 / C_22)^2 = 0.81 in the end: nothing smaller would hold."""
    problems = counterexample()
    bounds = {"sharp": Bound(float64([[0.81]])), "less": Bound(float64([[0.81 - 1e-9]]))}
    found = count_violations(iterates(problems, float64([[1.0]]), 20, beta2=1.0), problems.kappa, bounds)
    assert (found["sharp"].broken, found["less"].broken) == (0, 19)  # the first step also ends the other block


def test_proposition_2_amplitude_is_half_the_rate():
    rates = float64([[0.01, 0.1]])
    low, high = amplitude(one_dimensional(float64([1.0, -0.3])), rates, 0.9, 2000)
    torch.testing.assert_close(low, (rates / 2).expand(2, 2), rtol=1e-9, atol=0)
    torch.testing.assert_close(high, (rates / 2).expand(2, 2), rtol=1e-9, atol=0)


def test_proposition_2_cycle_attracts_at_the_rate_of_its_linearisation():
    for beta2 in np.linspace(0.01, 0.99, 25):
        jacobian = np.array([[1.0, -1.0], [2 * (1 - beta2), 3 * beta2 - 2]])
        assert np.abs(np.linalg.eigvals(jacobian)).max() < 1
    beta2 = 0.5  # complex eigenvalues of modulus sqrt(0.5)
    problems = one_dimensional(float64([0.5005]))  # eta = 1, |w| = s to start with
    sizes = [step.log10_gradient_norm().item() for step in iterates(problems, float64([[1.0]]), 80, beta2=beta2)]
    distance = np.abs(10 ** np.array(sizes) - 0.5)
    early, late = distance[10:20].max(), distance[50:60].max()
    assert late / early == pytest.approx(0.5**20, rel=0.5)


def test_a_start_at_the_rate_stops_at_zero():
    *_, last = iterates(one_dimensional(float64([0.1])), float64([[0.1]]), 5, beta2=0.9)
    assert last.log10_gradient_norm().item() == -np.inf


def test_preconditioned_ratio_against_dense_eigenvalues():
    problems = case(3, num_trials=3)
    found = preconditioned_ratio(problems)
    for trial in range(3):
        for block in range(3):
            H, w = problems.hessian[trial, block].numpy(), problems.start[trial, block].numpy()
            values = np.sort(np.linalg.eigvals(np.diag(1 / np.abs(H @ w)) @ H).real)
            kappa = np.linalg.cond(H)
            assert found[trial, block].item() == pytest.approx(values[-1] / values[0] / kappa, rel=1e-8)


def test_iterations_are_those_of_the_simulation():
    problems = make_quadratics(sweep_block(100.0, 10.0), num_trials=4)
    gradient = (problems.hessian @ problems.start[..., None])[..., 0].abs()
    ones = torch.ones_like(gradient)
    adam_rate = constants(problems).c1.amin(1, keepdim=True)
    for rates, preconditioner, beta2 in (
        (optimal_rate(problems), ones, None),
        (blockwise_rate(problems)[..., 0], ones, None),
        (adam_rate, gradient, 1.0),
    ):
        counts = iterations(problems, rates, preconditioner, epsilon=1e-3)
        simulated = blockwise_rate(problems) if rates.shape[1] > 1 else rates
        steps = iterates(problems, simulated, int(counts.max()), beta2=beta2)
        losses = torch.stack([step.log_loss()[:, 0] for step in steps])
        reached = losses - losses[0] <= np.log(1e-3)
        for trial, count in enumerate(counts.tolist()):
            assert reached[count, trial] and not reached[count - 1, trial]


def test_best_rate_needs_no_more_iterations_than_any_other():
    problems = case(4, num_trials=20)
    found = measure(problems)
    assert bool((found["Adam (2), best rate"] <= 1.05 * found["Adam (2), the proof's rate"]).all())


def test_iterations_refuse_a_diverging_rate():
    problems = case(3)
    with pytest.raises(ValueError, match="shrink"):
        iterations(problems, float64([[1.0]]), torch.ones_like(problems.start))


def test_fit_finds_planted_exponents():
    rng = torch.Generator().manual_seed(0)
    kappa, block, r = (10 ** (4 * torch.rand(200, generator=rng, dtype=torch.float64)) for _ in range(3))
    exponents, explained = fit(1e6 * kappa**0.7 * block**1.1 * r**0.25, kappa, block, r)
    assert exponents == pytest.approx([0.7, 1.1, 0.25], abs=1e-9) and explained > 1 - 1e-12


def test_quantiles_and_verdicts():
    assert quantiles(float64([4.0, np.inf, 1.0, 2.0, 3.0]), (0.0, 0.5, 1.0)) == [1.0, 3.0, np.inf]
    assert [verdict(True), verdict(False, True), verdict(False)] == [REPRODUCED, PARTLY, NOT_REPRODUCED]
