"""Proposition 1: the lower bound for gradient descent, as printed and as its example gives it.

The proof takes H = diag(L, mu), w^0 = (sqrt(mu / L), sqrt(L / mu)). With a = |1 - eta L|, b = |1 - eta mu|,

    L(w^t) = 1/2 (mu a^{2t} + L b^{2t}),

while the paper's (10) has a^t and b^t: it omits that (1 - eta H) enters the loss squared. Consequences:

- At eta = 2 / (mu + L), a = b = rho = 1 - 2 / (kappa + 1), and L(w^{t+1}) = rho^2 L(w^t) < rho L(w^t): the printed
  bound (4), L(w^{t+1}) >= rho L(w^t) "for any eta", fails in every iteration. It fails for every other example too:
  at this rate L(w^{t+1}) <= rho^2 L(w^t) for every H of condition number kappa.
- Corrected: L(w^{t+1}) >= rho^2 L(w^t) for every eta and t. For R_t = L(w^{t+1}) / L(w^t), R_t <= R_{t+1} by
  Cauchy-Schwarz (L(w^t) is a t-th moment of a measure on {a^2, b^2}), and R_0 = (mu a^2 + L b^2) / (mu + L) is smallest
  at eta = 2 / (mu + L), where it is rho^2.

The complexity is still O(kappa log(1 / epsilon)), with kappa / 4 instead of the kappa / 2 that follows from (4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess_paper.results import Claim, Result, verdict
from blockhess_paper.theory.bounds import Bound, count_violations
from blockhess_paper.theory.descent import iterates
from blockhess_paper.theory.quadratics import Quadratics

KAPPAS = (10.0, 100.0, 2000.0)

# Learning rates as multiples of 2 / (mu + L).
MULTIPLES = (0.01, 0.1, 0.25, 0.5, 0.6, 0.75, 0.9, 0.99, 1.0, 1.001, 1.01, 1.1)


def example(kappas: Tensor) -> Quadratics:
    """Return the proof's two-dimensional problem, mu = 1 and L = kappa, one trial per condition number."""
    largest, smallest = kappas.double(), torch.ones_like(kappas, dtype=torch.float64)
    eigenvalues = torch.stack([largest, smallest], 1)[..., None]  # (n_trials, 2, 1)
    start = torch.stack([1 / largest.sqrt(), largest.sqrt()], 1)[..., None]
    return Quadratics(eigenvalues[..., None], eigenvalues, start)


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Count violations of both bounds over condition numbers, learning rates and iterations.

    Args:
        seed: unused; the example has no randomness.
        quick: fewer iterations.
    """
    num_steps = 100 if quick else 5000
    problems = example(torch.tensor(KAPPAS))
    rates = 2 / (1 + problems.kappa[:, None]) * torch.tensor(MULTIPLES, dtype=torch.float64)
    rho = 1 - 2 / (problems.kappa + 1)
    names = ("printed", "corrected")
    rows, printed, corrected = [], 0, 0
    for column, multiple in enumerate(MULTIPLES):
        bounds = dict(zip(names, (Bound(rho[:, None], lower=True), Bound(rho[:, None] ** 2, lower=True))))
        found = count_violations(iterates(problems, rates[:, column : column + 1], num_steps), problems.kappa, bounds)
        rows.append([f"{multiple:g}", *(f"{found[name].broken:,} of {found[name].iterations:,}" for name in names)])
        printed, corrected = printed + found["printed"].broken, corrected + found["corrected"].broken
    total = len(MULTIPLES) * len(KAPPAS) * num_steps
    claim = Claim(
        "Proposition 1: for any eta, L(w^{t+1}) >= (1 - 2/(kappa+1)) L(w^t) on the proof's example.",
        f"broken in {printed:,} of {total:,} iterations (at eta = 2/(mu+L) in all of them); with the square that its "
        f"proof loses, (1 - 2/(kappa+1))^2, in {corrected:,}. The order kappa of the complexity is not affected.",
        verdict(printed == 0),
    )
    return Result(
        "prop1",
        "Proposition 1: the lower bound for gradient descent",
        {"kappas": KAPPAS, "num_steps": num_steps, "rate_multiples": MULTIPLES},
        (claim,),
        format_table(["rate (mu + L) / 2", "breaks the printed bound", "breaks the corrected bound"], rows),
        {"printed": printed, "corrected": corrected, "iterations": total},
    )
