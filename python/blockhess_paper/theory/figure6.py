"""Figures 6 and 7: eigenvalues of the four blocks of case 1 (a Transformer's spectra) and case 2 (a CNN's).

Both report the condition numbers of the blocks, and how much their distributions differ: the mean Jensen-Shannon
distance at one sigma.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess.analysis.jensen_shannon import js_matrix
from blockhess_paper.results import Claim, Result, new_figure, quantiles, verdict
from blockhess_paper.theory.block_spectra import GPT_BLOCKS, RESNET_BLOCKS
from blockhess_paper.theory.quadratics import KAPPA, TITLES, case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Width of the Gaussian that smooths the eigenvalues, whose range is 1,999.
SIGMA = 20.0

BLOCK_NAMES = {
    1: ("embedding", "3rd query", "3rd value", "3rd MLP (fc)"),
    2: ("1st convolution", "2nd convolution", "3rd convolution", "4th convolution"),
}
MEASURED = {1: GPT_BLOCKS, 2: RESNET_BLOCKS}


def heterogeneity(eigenvalues: Tensor) -> Tensor:
    """Return the mean Jensen-Shannon distance between the blocks' eigenvalues, in [0, 1], (n_trials,).

    Args:
        eigenvalues: (n_trials, L, d).

    Example:
        >>> heterogeneity(torch.ones(1, 2, 3, dtype=torch.float64)).tolist()
        [0.0]
    """
    n_blocks, d = eigenvalues.shape[1:]
    weights = torch.full((n_blocks, d), 1 / d, dtype=torch.float64)
    sums = [js_matrix(trial.contiguous(), weights, sigma=SIGMA).sum() for trial in eigenvalues]
    return torch.stack(sums) / (n_blocks * (n_blocks - 1))


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Figure 6: draw case 1 and measure how heterogeneous its blocks are.

    Args:
        seed: seed of the trials; the figure shows the first trial.
        quick: fewer trials.
    """
    return histograms(1, seed=seed, num_trials=2 if quick else 20)


def run_figure7(*, seed: int = 0, quick: bool = False) -> Result:
    """Figure 7: draw case 2 and measure how homogeneous its blocks are. Args: see run."""
    return histograms(2, seed=seed, num_trials=2 if quick else 20)


def histograms(number: int, *, seed: int, num_trials: int) -> Result:
    """Return the histograms of case 1 (Figure 6) or 2 (Figure 7).

    Args:
        number: the case.
        seed: seed of the trials; the figure shows the first trial.
        num_trials: number of trials.
    """
    problems = {n: case(n, num_trials=num_trials, seed=seed) for n in (1, 2)}
    differ = {n: heterogeneity(p.eigenvalues) for n, p in problems.items()}
    own = problems[number]
    kappa_error = float((torch.linalg.eigvalsh(own.hessian) / own.eigenvalues - 1).abs().max())
    rows = [
        [
            f"H_{l + 1}",
            BLOCK_NAMES[number][l],
            MEASURED[number][l],
            f"{own.eigenvalues[0, l, 0]:.4g}",
            f"{own.eigenvalues[0, l].median():.4g}",
            f"{own.eigenvalues[0, l, -1]:.4g}",
            *(f"{value:.4g}" for value in quantiles(own.block_kappa[:, l])),
        ]
        for l in range(own.eigenvalues.shape[1])
    ]
    mean = {n: float(value.mean()) for n, value in differ.items()}
    both = f"{mean[1]:.3f} in case 1, {mean[2]:.3f} in case 2 (mean of {num_trials} trials)"
    claims = (
        Claim(
            f"Section 3.2: case {number} has eigenvalues in [1, 2000] and condition number 2000.",
            f"condition number {own.kappa.min():.6g} to {own.kappa.max():.6g} over {num_trials} trials; the "
            f"eigenvalues of the rotated blocks agree with those drawn within {kappa_error:.1g}.",
            verdict(bool(((own.kappa / KAPPA - 1).abs() < 1e-9).all()) and kappa_error < 1e-9),
        ),
        Claim(
            "Figures 6 and 7: the blocks are heterogeneous in case 1 and homogeneous in case 2.",
            f"mean Jensen-Shannon distance between blocks {both}, with one shift and one scale for all blocks and "
            "spectra that stand in for GPT-2's and ResNet18's.",
            verdict(mean[1] > 2 * mean[2], mean[1] > mean[2]),
        ),
    )
    return Result(
        f"fig{number + 5}",
        f"Figure {number + 5}: eigenvalues of the blocks of case {number}",
        {"seed": seed, "num_trials": num_trials, "sigma": SIGMA},
        claims,
        "eigenvalues of the first trial, and kappa_l over all\n"
        + format_table(
            ["", "block", "measured block", "min", "median", "max", "kappa_l 10%", "50%", "90%"], rows, left=3
        ),
        {"heterogeneity": mean, "kappa_l": own.block_kappa.median(0).values.tolist()},
        {"eigenvalues": own.eigenvalues},
        _draw(own.eigenvalues[0], BLOCK_NAMES[number], number),
    )


def _draw(eigenvalues: Tensor, names: Sequence[str], number: int) -> Figure:
    figure = new_figure(11.0, 2.9)
    panels = figure.subplots(1, len(eigenvalues), sharey=True)
    bins = torch.linspace(0, KAPPA, 41).tolist()
    for l, (panel, values, name) in enumerate(zip(panels, eigenvalues, names)):
        panel.hist(values.tolist(), bins=bins, color="#08519c")
        panel.set_title(f"({'abcd'[l]}) H_{l + 1}: {name}", fontsize="medium")
        panel.set_yscale("log")  # otherwise the single eigenvalue that determines the condition number is invisible
        panel.set_xlabel("eigenvalue")
        panel.set_xlim(0, KAPPA)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylim(0.7, 130)
    panels[0].set_ylabel("eigenvalues, of 100")
    figure.suptitle(f"{TITLES[number]} (one shift and scale for all blocks, condition number 2000)", fontsize="medium")
    return figure
