"""Figure 8: gradient norms of GD and Adam (beta_1 = 0) on the four quadratic cases, all of condition number 2000.

GD uses the rate 2 / (mu + L); Adam, for every trial, the rate of a grid with the smallest last gradient norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess_paper.results import ADAM_COLOR, ADAM_ONE_COLOR, GD_COLOR, Claim, Result, new_figure, quantiles, verdict
from blockhess_paper.theory.descent import RateSearch, blockwise_rate, iterates, optimal_rate, search_rate
from blockhess_paper.theory.quadratics import TITLES, Quadratics, case

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_STEPS = 5000
NUM_TRIALS = {1: 20, 2: 20, 3: 1000, 4: 1000}

# Adam's grid, three rates per decade.
RATES = torch.logspace(-4, 1, 16, dtype=torch.float64)

BETA2 = {"Adam, beta2 = 0.999": 0.999, "Adam, beta2 = 1": 1.0}
COLORS = {"GD": GD_COLOR, "Adam, beta2 = 0.999": ADAM_COLOR, "Adam, beta2 = 1": ADAM_ONE_COLOR}

SHARES = (0.1, 0.5, 0.9)

# GD "largely lags behind" if it gains at most half as many decades as the better Adam; "on par" from 4/5 of them.
LAGS, ON_PAR = 0.5, 0.8


def curve(problems: Quadratics, rates: Tensor, num_steps: int, beta2: float | None) -> Tensor:
    """Return log10 of gradient norms over the first, (num_steps + 1, n_trials), at one rate per trial (and block)."""
    norms = [step.log10_gradient_norm()[:, 0] for step in iterates(problems, rates, num_steps, beta2=beta2)]
    return torch.stack(norms) - norms[0]


def curves(problems: Quadratics, searches: Mapping[str, RateSearch], num_steps: int) -> dict[str, Tensor]:
    """Return the curves of GD, blockwise GD and every Adam at its best rates."""
    found = {
        "GD": curve(problems, optimal_rate(problems), num_steps, None),
        "blockwise GD": curve(problems, blockwise_rate(problems), num_steps, None),
    }
    for name, search in searches.items():
        found[name] = curve(problems, search.best, num_steps, BETA2[name])
    return found


def run(*, seed: int = 0, quick: bool = False) -> Result:
    """Run all optimizers on all cases.

    Args:
        seed: seed of the trials.
        quick: few trials, rates and iterations.
    """
    num_steps = 60 if quick else NUM_STEPS
    rates = RATES[::4] if quick else RATES
    trials = dict.fromkeys(NUM_TRIALS, 2) if quick else NUM_TRIALS
    rows, notes, claims, numbers, arrays = [], [], [], {}, {}
    for number, num_trials in trials.items():
        problems = case(number, num_trials=num_trials, seed=seed)
        searches = {name: search_rate(problems, rates, num_steps, beta2=beta2) for name, beta2 in BETA2.items()}
        found = curves(problems, searches, num_steps)
        final = {name: quantiles(norms[-1], SHARES) for name, norms in found.items()}
        lowest = {name: quantiles(norms.amin(0), SHARES) for name, norms in found.items()}
        for name, norms in found.items():
            ordered = norms.sort(1).values
            index = [round(share * (num_trials - 1)) for share in SHARES]
            arrays[f"case{number} {name}"] = ordered[:, index]
            best = f"{searches[name].best.median():.3g}" if name in searches else ""
            rows.append([f"case {number}", name, best, *(f"{v:.1f}" for v in final[name]), f"{lowest[name][1]:.1f}"])
        for name, search in searches.items():
            notes.append(
                f"case {number}, {name}: {int(search.converged.sum())} of {num_trials} trials have a rate that "
                f"converges; in {int(search.at_edge.sum())} the best is at an end of the grid."
            )
        numbers[f"case {number}"] = {"final": final, "lowest": lowest}
        claims.append(_compare(number, final, float((problems.kappa / problems.block_kappa.amax(1)).median())))
    bounce = {
        n: numbers[f"case {n}"]["final"]["Adam, beta2 = 0.999"][1]
        - numbers[f"case {n}"]["lowest"]["Adam, beta2 = 0.999"][1]
        for n in (3, 4)
    }
    claims.append(
        Claim(
            "Figure 8 (c), section 3.3: with beta_2 < 1 the iterates of Adam converge to near-optimal and bounce back.",
            f"between its lowest and its last gradient norm Adam with beta2 = 0.999 rises by {bounce[3]:.1f} decades "
            f"in case 3 and {bounce[4]:.1f} in case 4 (difference of medians), at rates that were chosen for the "
            "smallest last one.",
            verdict(bounce[3] >= 1, bounce[4] >= 1),
        )
    )
    return Result(
        "fig8",
        f"Figure 8: gradient norms over {num_steps} iterations",
        {"seed": seed, "num_steps": num_steps, "trials": trials, "rates": rates.tolist()},
        tuple(claims),
        "log10 of the last gradient norm over the first; median of the lowest on the way\n"
        + format_table(["case", "optimizer", "rate", "10%", "median", "90%", "lowest"], rows, left=2)
        + "\n\n"
        + "\n".join(notes),
        numbers,
        arrays,
        _draw(arrays, trials),
    )


def _compare(number: int, final: Mapping[str, list[float]], gap: float) -> Claim:
    """Judge GD against both Adams by the medians of the last gradient norms; gap is kappa / max kappa_l."""
    decades = {name: -values[1] for name, values in final.items()}
    share = decades["GD"] / max(decades[name] for name in BETA2)
    measured = f"GD gains {decades['GD']:.1f} decades, " + ", ".join(f"{name} {decades[name]:.1f}" for name in BETA2)
    measured += f", blockwise GD {decades['blockwise GD']:.1f} (medians); kappa / max kappa_l is {gap:.3g}."
    if number in (1, 3):
        paper = f"Figure 8, case {number} (heterogeneous): GD largely lags behind Adam."
        return Claim(paper, measured, verdict(share <= LAGS, share <= ON_PAR))
    paper = f"Figure 8, case {number} (homogeneous): GD is on par with Adam or better."
    return Claim(paper, measured, verdict(share >= ON_PAR, share >= LAGS))


def _draw(arrays: Mapping[str, Tensor], trials: Mapping[int, int]) -> Figure:
    figure = new_figure(13.0, 3.6)
    panels = figure.subplots(1, 4)
    for panel, letter, number in zip(panels, "abcd", trials):
        for name, color in COLORS.items():
            low, median, high = arrays[f"case{number} {name}"].T.tolist()
            steps = range(len(median))
            panel.fill_between(steps, low, high, color=color, alpha=0.25, linewidth=0)
            panel.plot(steps, median, color=color, label=name.replace("beta2", "β2"))
        panel.set_title(f"({letter}) {TITLES[number]}", fontsize="small")
        panel.set_xlabel("iteration")
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("log10 of gradient norm over the first")
    panels[0].legend(frameon=False, fontsize="small")
    figure.suptitle("Medians over the trials, 10% to 90% shaded; condition number 2000 in all cases", fontsize="medium")
    return figure
