"""Proposition 2: the limit cycle of Adam with beta_2 < 1 and a constant rate, on L(w) = w^2 / 2.

    w_{t+1} = w_t - eta w_t / s_t,    s_t^2 = beta_2 s_{t-1}^2 + (1 - beta_2) w_t^2

The cycle is w = +-eta/2, where |w| is constant, so s = eta/2 and w -> w - 2 w = -w. Its loss is eta^2 / 8 > 0.
It is attracting: with w_t = (-1)^t (eta/2) (1 + x_t) and s_t^2 = (eta^2/4) (1 + y_t), to first order

    x' = x - y,    y' = 2 (1 - beta_2) x + (3 beta_2 - 2) y,

with determinant beta_2 and trace 3 beta_2 - 1, which lies strictly between -(1 + beta_2) and 1 + beta_2: both
eigenvalues are inside the unit circle for every beta_2 in (0, 1), and where they are complex (beta_2 > 1/9) the
distance shrinks by sqrt(beta_2) per step. So the amplitude is eta / 2 for every beta_2. Exceptions are possible: w_0 =
+-eta stops at 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess_paper.results import Claim, Result, new_figure, quantiles, verdict
from blockhess_paper.theory.descent import iterates
from blockhess_paper.theory.quadratics import Quadratics

BETA2 = (0.9, 0.99, 0.999)
RATES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)

# Reaching the cycle takes about |w_0| / eta steps of at most about eta, then some time constants 1 / (1 - beta_2) of s.
STEPS_TIMES_RATE, TIME_CONSTANTS = 10, 80

# The amplitude is measured over this many last steps.
WINDOW = 100


def one_dimensional(start: Tensor) -> Quadratics:
    """Return L(w) = w^2 / 2 from every start (n_trials,)."""
    ones = torch.ones(len(start), 1, 1, dtype=torch.float64)
    return Quadratics(ones[..., None], ones, start.double()[:, None, None])


def amplitude(problems: Quadratics, rates: Tensor, beta2: float, num_steps: int) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest |w| over the last WINDOW steps, (n_trials, n_rates) each.

    Example:
        >>> low, high = amplitude(one_dimensional(torch.ones(1)), torch.tensor([[0.01]]), 0.9, 1000)
        >>> round(low.item(), 6), round(high.item(), 6)
        (0.005, 0.005)
    """
    low = high = None
    for t, step in enumerate(iterates(problems, rates, num_steps, beta2=beta2)):
        if t > num_steps - WINDOW:
            size = 10 ** step.log10_gradient_norm()  # |gradient| = |w|
            low = size if low is None else torch.minimum(low, size)
            high = size if high is None else torch.maximum(high, size)
    assert low is not None and high is not None
    return low, high


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Measure the amplitude over learning rates, beta_2 and random starts.

    Args:
        seed: seed of the starts.
        quick: fewer starts and only the smallest beta_2.
    """
    generator = torch.Generator().manual_seed(seed)
    problems = one_dimensional(torch.randn(5 if quick else 100, generator=generator, dtype=torch.float64))
    rates = torch.tensor([RATES], dtype=torch.float64)
    figure = new_figure(6.0, 4.0)
    axes = figure.subplots()
    rows, worst = [], 0.0
    arrays: dict[str, Tensor] = {}
    for beta2, marker in zip(BETA2[:1] if quick else BETA2, "os^"):
        num_steps = round(TIME_CONSTANTS / (1 - beta2) + STEPS_TIMES_RATE / min(RATES))
        low, high = amplitude(problems, rates, beta2, num_steps)
        arrays |= {f"lowest_{beta2:g}": low, f"highest_{beta2:g}": high}
        worst = max(worst, float((torch.stack([low, high]) / rates - 0.5).abs().max()))
        for column, rate in enumerate(RATES):
            relative = torch.cat([low[:, column], high[:, column]]) / rate
            rows.append(
                [f"{beta2:g}", f"{rate:g}", *(f"{value:.9f}" for value in quantiles(relative, (0.0, 0.5, 1.0)))]
            )
        axes.plot(RATES, high.median(0).values.tolist(), marker, fillstyle="none", label=f"measured, beta2 = {beta2:g}")
    axes.plot(RATES, [rate / 2 for rate in RATES], "-", color="#555555", zorder=0, label="eta / 2")
    axes.set(xscale="log", yscale="log", xlabel="learning rate eta", ylabel="amplitude |w| of the cycle")
    axes.set_title("Adam with beta2 < 1 on w²/2 ends in a cycle of amplitude eta/2", fontsize="medium")
    axes.legend(frameon=False)
    claim = Claim(
        "Proposition 2: with beta_2 < 1 and a constant rate Adam ends in a limit cycle, and the loss stays above 0.",
        f"every start ends in w = +-eta/2, within {worst:.1g} eta, for beta_2 in {BETA2[: 1 if quick else 3]} and "
        f"rates from {min(RATES):g} to {max(RATES):g}; the cycle attracts for every beta_2 in (0, 1), and its loss is "
        "eta^2/8.",
        verdict(worst < 1e-3, bool(worst < 0.5)),
    )
    return Result(
        "prop2",
        "Proposition 2: the limit cycle of Adam with beta_2 < 1",
        {"seed": seed, "rates": RATES, "starts": problems.start.shape[0], "beta2": BETA2},
        (claim,),
        "|w| / eta over the last steps of all starts\n"
        + format_table(["beta2", "eta", "lowest", "median", "highest"], rows),
        {"worst": worst},
        arrays,
        figure,
    )
