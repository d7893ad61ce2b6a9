"""Table 2: measured iterations of GD, blockwise GD and Adam over kappa, max kappa_l and r.

    L = 3 blocks of eigenvalues s_l {1, sqrt(kappa_b), kappa_b},  s = (1, sqrt(kappa / kappa_b), kappa / kappa_b)

so that kappa_b = max kappa_l ranges from 2 (narrow blocks far apart) to kappa (equal blocks). The number of iterations
N until the loss is epsilon times the first is fitted by log N = a + b log kappa + c log max kappa_l + d log r over all
problems; Table 2 states (b, c, d) = (1, 0, 0) for GD, (0, 1, 0) for blockwise GD and, as an upper bound, (0, 1, 1) for
Adam with beta_2 = 1.

With a fixed preconditioner D these methods are linear, so the loss is known in closed form:

    L(w^t) = 1/2 sum_i a_i (1 - eta a_i)^{2t} c_i^2

with the eigenvalues a_i of A_l = D^{-1/2} H_l D^{-1/2} and the coordinates c_i of D^{1/2} w^0 in its eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess_paper.results import ADAM_ONE_COLOR, GD_COLOR, Claim, Result, new_figure, verdict
from blockhess_paper.theory.descent import blockwise_rate, optimal_rate
from blockhess_paper.theory.proposition2 import amplitude, one_dimensional
from blockhess_paper.theory.quadratics import Quadratics, make_quadratics
from blockhess_paper.theory.theorems import constants

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EPSILON = 1e-8
KAPPAS = tuple(10 ** (1 + k / 2) for k in range(9))  # 10 .. 1e5
NUM_TRIALS = 200

# Upper end of the bisection, above all iterations of the sweep.
MOST_ITERATIONS = 2**60


def sweep_block(kappa: float, block_kappa: float) -> list[list[float]]:
    """Return the eigenvalues of the three blocks of the sweep.

    Example:
        >>> sweep_block(400.0, 4.0)
        [[1.0, 2.0, 4.0], [10.0, 20.0, 40.0], [100.0, 200.0, 400.0]]
    """
    gap = kappa / block_kappa
    return [[s, s * math.sqrt(block_kappa), s * block_kappa] for s in (1.0, math.sqrt(gap), gap)]


def iterations(problems: Quadratics, rates: Tensor | None, preconditioner: Tensor, epsilon: float = EPSILON) -> Tensor:
    """Return the smallest t with L(w^t) <= epsilon L(w^0) for w^{t+1} = w^t - eta D^{-1} H w^t.

    Args:
        problems: the trials.
        rates: (n_trials, 1 or L); None means the best of each trial, 2 / (smallest + largest eigenvalue of D^{-1} H).
        preconditioner: (n_trials, L, d), the diagonal of D.
        epsilon: final loss over the first.

    Returns:
        (n_trials,) int64.

    Raises:
        ValueError: a trial diverges at its rate.

    Example:
        >>> from blockhess_paper.theory.quadratics import case
        >>> problems = case(3)
        >>> iterations(problems, optimal_rate(problems), torch.ones_like(problems.start)).item() > 1000
        True
    """
    root = preconditioner.sqrt()
    a, vectors = torch.linalg.eigh(problems.hessian / (root[..., None] * root[..., None, :]))
    c = (vectors.mT @ (root * problems.start)[..., None])[..., 0]
    if rates is None:
        rates = 2 / (a.amin((1, 2)) + a.amax((1, 2)))[:, None]
    shrink = (1 - rates[..., None] * a).abs().flatten(1)
    if bool((shrink >= 1).any()):
        raise ValueError(f"iterations: rates must make every component shrink, got a factor of {shrink.max().item():g}")
    share = (a * c**2).flatten(1)
    share = share / share.sum(1, keepdim=True)
    low = torch.zeros(len(share), dtype=torch.int64)  # L(w^low) > epsilon L(w^0) >= L(w^high)
    high = torch.full_like(low, MOST_ITERATIONS)
    while bool((high - low > 1).any()):
        middle = (low + high) // 2
        reached = (share * shrink ** (2 * middle[:, None])).sum(1) <= epsilon
        high, low = torch.where(reached, middle, high), torch.where(reached, low, middle)
    return high


def measure(problems: Quadratics) -> dict[str, Tensor]:
    """Return the iterations (n_trials,) of every optimizer, of Adam at the rate of the proof and at the best."""
    gradient = (problems.hessian @ problems.start[..., None])[..., 0].abs()
    ones = torch.ones_like(gradient)
    return {
        "GD": iterations(problems, optimal_rate(problems), ones),
        "blockwise GD": iterations(problems, blockwise_rate(problems)[..., 0], ones),
        "Adam (2), the proof's rate": iterations(problems, constants(problems).c1.amin(1, keepdim=True), gradient),
        "Adam (2), best rate": iterations(problems, None, gradient),
    }


def fit(counts: Tensor, kappa: Tensor, block_kappa: Tensor, r: Tensor) -> tuple[list[float], float]:
    """Return the exponents (b, c, d) of kappa, max kappa_l and r, and the share of the variance of log N explained."""
    columns = [torch.ones_like(kappa), kappa.log(), block_kappa.log(), r.log()]
    design = torch.stack(columns, 1).numpy()
    target = counts.double().log().numpy()
    solution = np.linalg.lstsq(design, target, rcond=None)[0]
    explained = 1 - float(np.var(target - design @ solution) / np.var(target))
    return [float(value) for value in solution[1:]], explained


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Sweep kappa and max kappa_l, count iterations and fit exponents.

    Args:
        seed: seed of the trials.
        quick: few trials and condition numbers.
    """
    kappas, num_trials = (KAPPAS[:3], 10) if quick else (KAPPAS, NUM_TRIALS)
    counts: dict[str, list[Tensor]] = {}
    known: dict[str, list[Tensor]] = {"kappa": [], "max kappa_l": [], "r": []}
    for k, kappa in enumerate(kappas):
        for step, block_kappa in enumerate((2.0, *kappas[: k + 1])):
            problems = make_quadratics(
                sweep_block(kappa, block_kappa), num_trials=num_trials, seed=seed + 100 * k + step
            )
            for name, found in measure(problems).items():
                counts.setdefault(name, []).append(found)
            known["kappa"].append(problems.kappa)
            known["max kappa_l"].append(problems.block_kappa.amax(1))
            known["r"].append(constants(problems).r)
    every = {name: torch.cat(parts) for name, parts in known.items()}
    fits = {
        name: fit(torch.cat(parts), every["kappa"], every["max kappa_l"], every["r"]) for name, parts in counts.items()
    }
    low, high = amplitude(one_dimensional(torch.ones(1)), torch.tensor([[0.01]]), 0.9, 2000)

    def near(name: str, wanted: tuple[float, float, float]) -> bool:
        return all(abs(found - exponent) < 0.1 for found, exponent in zip(fits[name][0], wanted))

    def fitted(name: str) -> str:
        b, c, d = fits[name][0]
        return f"N ~ kappa^{b:.2f} (max kappa_l)^{c:.2f} r^{d:.2f}"

    adam = {name: value[0] for name, value in fits.items() if name.startswith("Adam")}
    bounded = [abs(b) < 0.1 and c < 1.1 and d < 0.6 for b, c, d in adam.values()]
    claims = (
        Claim("Table 2: GD needs O(kappa) iterations.", fitted("GD"), verdict(near("GD", (1, 0, 0)))),
        Claim(
            "Table 2: blockwise GD needs O(max kappa_l).",
            fitted("blockwise GD"),
            verdict(near("blockwise GD", (0, 1, 0))),
        ),
        Claim(
            "Table 2: Adam with beta_2 = 1 needs O(r max kappa_l), independent of kappa.",
            "; ".join(f"{name}: {fitted(name)}" for name in adam)
            + ". Of the bound's r at most the root counts: see the bound that is linear in C_{l,2} / C_{l,1} "
            "(theorems).",
            verdict(all(bounded), any(bounded)),
        ),
        Claim(
            "Table 2: Adam with beta_2 < 1 does not converge.",
            f"on w^2/2 with eta = 0.01, beta_2 = 0.9 it stays at |w| from {low.item():.6f} to {high.item():.6f}.",
            verdict(low.item() > 0),
        ),
    )
    rows = [
        [name, *(f"{value:.3f}" for value in exponents), f"{share:.4f}"] for name, (exponents, share) in fits.items()
    ]
    return Result(
        "table2",
        "Table 2: measured complexities",
        {"seed": seed, "epsilon": EPSILON, "kappas": kappas, "trials_per_problem": num_trials},
        claims,
        f"N ~ kappa^b (max kappa_l)^c r^d, fitted over {len(every['kappa']):,} problems\n"
        + format_table(["optimizer", "b", "c", "d", "explained"], rows),
        {name: {"exponents": exponents, "explained": share} for name, (exponents, share) in fits.items()},
        {**every, **{f"N {name}": torch.cat(parts) for name, parts in counts.items()}},
        _draw(counts, known),
    )


def _draw(counts: Mapping[str, list[Tensor]], known: Mapping[str, list[Tensor]]) -> Figure:
    """Plot median iterations over kappa at the smallest max kappa_l, and over max kappa_l at the largest kappa."""
    figure = new_figure(9.0, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    kappa = [float(value[0]) for value in known["kappa"]]
    block = [float(value[0]) for value in known["max kappa_l"]]
    heterogeneous = [i for i, value in enumerate(block) if value < 3]
    largest = [i for i, value in enumerate(kappa) if value > 0.99 * max(kappa)]
    styles = {"GD": (GD_COLOR, "o-"), "blockwise GD": ("#555555", "s-")}
    for name, parts in counts.items():
        color, style = styles.get(name, (ADAM_ONE_COLOR, "^-" if "best" in name else "v--"))
        for panel, chosen, axis in ((left, heterogeneous, kappa), (right, largest, block)):
            medians = [float(parts[i].double().median()) for i in chosen]
            panel.plot([axis[i] for i in chosen], medians, style, color=color, label=name, markersize=4)
    left.set(
        xscale="log", yscale="log", xlabel="kappa (max kappa_l = 2)", ylabel=f"iterations to {EPSILON:g} of the loss"
    )
    right.set(xscale="log", xlabel=f"max kappa_l (kappa = {max(kappa):.0e})")
    left.legend(frameon=False, fontsize="small")
    return figure
