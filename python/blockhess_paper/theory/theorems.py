"""Theorems 1 and 2: the upper bounds for blockwise gradient descent and Adam with beta_2 = 1, as printed and corrected.

Theorem 1, eta_l = 1 / lambda_{l,1}. An eigencomponent of block l shrinks by 1 - lambda / lambda_{l,1} and its loss by
the square of that, so the factor is max_l (1 - 1/kappa_l)^2; the printed max_l (1 - 1/kappa_l) holds as well.
(D_BGD must contain the 1 / eta_l: as printed, D_BGD^{-1} divides by the learning rates.)

Theorem 2. D = diag |H w^0|, C_{l,1} lambda_{l,1} <= D_{l,i} <= C_{l,2} lambda_{l,1}; here with the tightest constants,
C_{l,1} = min_i D_{l,i} / lambda_{l,1} and C_{l,2} = max_i D_{l,i} / lambda_{l,1}. In w~ = D^{1/2} w Adam is gradient
descent with A_l = D_l^{-1/2} H_l D_l^{-1/2}, whose eigenvalues lie in [1 / (C_{l,2} kappa_l), 1 / C_{l,1}]. Therefore:

- The statement's eta = min_l 1 / C_{l,1} does not fit the proof: descent needs eta < 2 / lambda_max(A),
  about 2 min_l C_{l,1}. Where C_{l,1} < 1 it usually diverges. The proof uses eta = min_l C_{l,1}.
- With that rate the proof bounds cost-to-go by progress (19):
  C_{l,2}^2 lambda_{l,1}^2 / (min_k C_{k,1}^2 lambda_{l,1} lambda_{l,d}) = kappa_l C_{l,2}^2 / min_k C_{k,1}^2. Step
  (20) replaces this by r kappa_l, r = max_l (C_{l,2} / C_{l,1})^2, as if every block had its own rate. What follows
  is r' = max_l C_{l,2}^2 / min_l C_{l,1}^2.
  A counterexample is H = I with two blocks of one element and w^0 = (1, 10): r = kappa_l = 1 predicts the minimum after
  one step, but eta = 1 leaves 0.9 of the second coordinate.
- Sharper: the components of A_l shrink by 1 - eta lambda, 0 <= eta lambda <= 1, so the factor is
  max_l (1 - min_k C_{k,1} / (C_{l,2} kappa_l))^2: linear in the constants where r' is quadratic.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess_paper.results import Claim, Result, verdict
from blockhess_paper.theory.bounds import Bound, Violations, count_violations
from blockhess_paper.theory.descent import blockwise_rate, iterates
from blockhess_paper.theory.quadratics import TITLES, Quadratics, case


@dataclass(frozen=True)
class Constants:
    """The tightest constants of Assumption 1, and r as printed and corrected.

    Attributes:
        c1, c2: (n_trials, L).
        r: (n_trials,) max_l (C_{l,2} / C_{l,1})^2, as printed.
        r_corrected: (n_trials,) max_l C_{l,2}^2 / min_l C_{l,1}^2.
    """

    c1: Tensor
    c2: Tensor
    r: Tensor
    r_corrected: Tensor


def constants(problems: Quadratics) -> Constants:
    """Return the constants of Assumption 1 for the trials' initial points.

    Source: Zhang et al. 2024, section 3.3.

    Example:
        >>> from blockhess_paper.theory.quadratics import make_quadratics
        >>> one_element_blocks = make_quadratics([[1.0], [1.0]])
        >>> constants(one_element_blocks).r.tolist()
        [1.0]
    """
    gradient = (problems.hessian @ problems.start[..., None])[..., 0].abs()
    relative = gradient / problems.eigenvalues[..., -1:]
    c1, c2 = relative.amin(-1), relative.amax(-1)
    return Constants(c1, c2, ((c2 / c1) ** 2).amax(1), (c2.amax(1) / c1.amin(1)) ** 2)


def check_theorem1(problems: Quadratics, num_steps: int) -> dict[str, Violations]:
    """Count violations of the printed and of the squared bound by blockwise gradient descent."""
    factor = (1 - 1 / problems.block_kappa).amax(1, keepdim=True)
    bounds = {"printed": Bound(factor), "squared": Bound(factor**2)}
    return count_violations(iterates(problems, blockwise_rate(problems), num_steps), problems.kappa, bounds)


def check_theorem2(problems: Quadratics, num_steps: int) -> dict[str, Violations]:
    """Count violations of the bounds of Theorem 2 by Adam with beta_2 = 1.

    Returns:
        Violations of "statement": printed rate min 1 / C_{l,1} and printed r; "proof": the proof's rate min C_{l,1} and
        printed r; "corrected": the proof's rate and r'; "sharp": the proof's rate and the bound linear in the
        constants.
    """
    known = constants(problems)
    proof_rate = known.c1.amin(1, keepdim=True)
    kappa = problems.block_kappa
    printed = Bound((1 - 1 / (known.r[:, None] * kappa)).amax(1, keepdim=True))
    bounds = {
        "proof": printed,
        "corrected": Bound((1 - 1 / (known.r_corrected[:, None] * kappa)).amax(1, keepdim=True)),
        "sharp": Bound(((1 - proof_rate / (known.c2 * kappa)) ** 2).amax(1, keepdim=True)),
    }
    statement_rate = (1 / known.c1).amin(1, keepdim=True)
    as_stated = iterates(problems, statement_rate, num_steps, beta2=1.0)
    as_proved = iterates(problems, proof_rate, num_steps, beta2=1.0)
    return {
        **count_violations(as_stated, problems.kappa, {"statement": printed}),
        **count_violations(as_proved, problems.kappa, bounds),
    }


def counterexample() -> Quadratics:
    """Return H = I, two blocks of one element, w^0 = (1, 10): with the printed r = 1, Theorem 2 predicts one step."""
    ones = torch.ones(1, 2, 1, dtype=torch.float64)
    return Quadratics(ones[..., None], ones, torch.tensor([[[1.0], [10.0]]], dtype=torch.float64))


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Check both theorems at every iteration of every trial of the four cases.

    Args:
        seed: seed of the trials.
        quick: few trials and iterations.
    """
    num_steps = 50 if quick else 5000
    trials = {1: 20, 2: 20, 3: 1000, 4: 1000}
    if quick:
        trials = dict.fromkeys(trials, 2)
    rows: list[list[str]] = []
    counts: dict[str, dict[str, list[int]]] = {}
    for number, num_trials in trials.items():
        problems = case(number, num_trials=num_trials, seed=seed)
        found = {f"Theorem 1, {key}": value for key, value in check_theorem1(problems, num_steps).items()}
        found |= {f"Theorem 2, {key}": value for key, value in check_theorem2(problems, num_steps).items()}
        for name, violations in found.items():
            rows.append([TITLES[number].split(":")[0], name, str(violations)])
            total = counts.setdefault(name, {"broken": [], "iterations": []})
            total["broken"].append(violations.broken)
            total["iterations"].append(violations.iterations)
    example = check_theorem2(counterexample(), 10)["proof"]

    def share(name: str) -> str:
        return f"{sum(counts[name]['broken']):,} of {sum(counts[name]['iterations']):,} iterations"

    def holds(name: str) -> bool:
        return sum(counts[name]["broken"]) == 0

    claims = (
        Claim(
            "Theorem 1: blockwise GD with 1/lambda_{l,1} contracts the loss by max_l (1 - 1/kappa_l).",
            f"broken in {share('Theorem 1, printed')}; so is the sharper bound with the square, in "
            f"{share('Theorem 1, squared')}.",
            verdict(holds("Theorem 1, printed")),
        ),
        Claim(
            "Theorem 2: Adam with beta_2 = 1 and eta = min_l 1/C_{l,1} contracts the loss by max_l (1 - 1/(r "
            "kappa_l)).",
            f"broken in {share('Theorem 2, statement')} (where C_{{l,1}} < 1 it mostly diverges). With the rate of its "
            f"proof, min_l C_{{l,1}}, and the printed r: in {share('Theorem 2, proof')}, and in {example} of the "
            "counterexample H = I, w^0 = (1, 10). With r' = max C_{l,2}^2 / min C_{l,1}^2: in "
            f"{share('Theorem 2, corrected')}; with the bound linear in the constants: in {share('Theorem 2, sharp')}.",
            verdict(holds("Theorem 2, statement")),
        ),
    )
    return Result(
        "theorems",
        "Theorems 1 and 2: upper bounds for blockwise GD and Adam with beta_2 = 1",
        {"seed": seed, "num_steps": num_steps, "trials": trials},
        claims,
        format_table(["case", "bound", "broken in"], rows, left=3),
        {"counts": counts, "counterexample_broken": example.broken, "counterexample_iterations": example.iterations},
    )
