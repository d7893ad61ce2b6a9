"""Figure 5: SGD and Adam on the MLP whose layer outputs are multiplied by c, at the best rate of a grid for every c.

The paper trains for one epoch of MNIST, 469 batches of 128. Here the same number of batches is drawn from a smaller
data set, over several epochs.

The paper's rates range from 1e-4 to 1e-1. SGD with rate eta at scale c is SGD with rate c^2 eta on the plain MLP
started from c times the weights (see mlp.py), so the lower end of the grid excludes the rates that SGD needs at large
c, but not those of Adam. SGD is therefore also run with four smaller rates; both results are reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from scipy.stats import spearmanr
from torch import Tensor

from blockhess._text import format_table
from blockhess_paper.results import ADAM_COLOR, GD_COLOR, Claim, Result, new_figure, verdict
from blockhess_paper.scaled_mlp.mlp import SCALES, Training, load_images, train

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The paper's range in half decades, and smaller rates for SGD.
RATES = tuple(10 ** (-4 + k / 2) for k in range(7))
SMALL_RATES = tuple(10 ** (-6 + k / 2) for k in range(4))

# Batches of 128 in one epoch of MNIST.
NUM_STEPS = 469
POINTS = 12

# Scales whose curves the paper shows.
DRAWN = (1, *range(8, 16))

# Accuracies that differ by at most this count as equal.
EQUAL = 0.02


def best(training: Training, columns: slice) -> tuple[Tensor, Tensor]:
    """Return the best last accuracy (n_scales,) over a slice of the rates, and the index of its rate in the grid."""
    value, index = training.accuracy[:, columns, -1].max(1)
    return value, index + (columns.start or 0)


def run(*, seed: int = 0, quick: bool = False, data: str | PathLike[str] | None = None, device: str = "cpu") -> Result:
    """Train all scales and rates with both optimizers.

    Args:
        seed: seed of weights and order of the images.
        quick: few scales, rates and steps.
        data: folder with idx files, instead of the shipped subset of Fashion-MNIST.
        device: of models and images.
    """
    images = load_images(data).to(device)
    scales = SCALES[::7] if quick else SCALES
    small, rates = (SMALL_RATES[:1], RATES[::3]) if quick else (SMALL_RATES, RATES)
    num_steps = 8 if quick else NUM_STEPS
    steps = {"num_steps": num_steps, "points": 2 if quick else POINTS, "seed": seed}
    runs = {
        "SGD": train(images, scales, [*small, *rates], "SGD", **steps),
        "Adam": train(images, scales, rates, "Adam", **steps),
    }
    return judge(runs, scales, small, rates, {**steps, "data": images.name})


def judge(
    runs: Mapping[str, Training],
    scales: Sequence[int],
    small: Sequence[float],
    rates: Sequence[float],
    settings: Mapping[str, Any],
) -> Result:
    """Judge the claims of Figure 5 by the trained models.

    Args:
        runs: "SGD" at the rates [*small, *rates], "Adam" at rates.
        scales: c of every row of the runs.
        small, rates: rates below the paper's grid, and on it.
        settings: settings of the result, with num_steps and data.
    """
    num_steps = settings["num_steps"]
    paper, everything = slice(len(small), None), slice(0, None)
    found = {
        "SGD": best(runs["SGD"], paper),
        "SGD, smaller rates too": best(runs["SGD"], everything),
        "Adam": best(runs["Adam"], everything),
    }
    grids = {"SGD": [*small, *rates], "SGD, smaller rates too": [*small, *rates], "Adam": list(rates)}
    rows = [
        [
            f"{c}",
            *(f"{value[k]:.3f} ({grids[name][int(index[k])]:.1e})" for name, (value, index) in found.items()),
            f"{int(runs['SGD'].diverged[k, paper].sum())} of {len(rates)}",
            f"{int(runs['Adam'].diverged[k].sum())} of {len(rates)}",
        ]
        for k, c in enumerate(scales)
    ]
    gap = found["Adam"][0] - found["SGD"][0]
    gap_small = found["Adam"][0] - found["SGD, smaller rates too"][0]
    rank = float(spearmanr(scales, gap.numpy()).statistic)
    large = [k for k, c in enumerate(scales) if c >= 8]
    no_rate = [c for k, c in enumerate(scales) if bool(runs["SGD"].diverged[k, paper].all())]
    edge = [c for k, c in enumerate(scales) if int(found["SGD, smaller rates too"][1][k]) == 0]
    leads = (
        f"Adam's lead is {gap[0]:.3f} at c = 1, {gap[large].mean():.3f} on average over c >= 8, {gap[-1]:.3f} at c = 15"
    )
    claims = (
        Claim(
            "Section 2.4: with the standard MLP (c = 1) SGD converges as fast as Adam.",
            f"test accuracy {found['SGD'][0][0]:.3f} with SGD, {found['Adam'][0][0]:.3f} with Adam after {num_steps} "
            "steps.",
            verdict(bool(gap[0] < EQUAL)),
        ),
        Claim(
            "Figure 5 (c): the gap between Adam and SGD grows with c.",
            f"{leads}; rank correlation of lead and c {rank:.2f}."
            + (f" No rate of SGD's grid stays finite for c = {no_rate}." if no_rate else ""),
            verdict(
                rank > 0.5 and bool(gap[large].mean() - gap[0] > EQUAL), rank > 0.5 or bool(gap[large].mean() > EQUAL)
            ),
        ),
        Claim(
            "Figure 5 (c), implied: it is heterogeneity, not the grid of rates, that hampers SGD at large c.",
            f"with four rates below the paper's grid, from {min(small):g}, Adam's lead over c >= 8 is "
            f"{gap_small[large].mean():.3f} on average instead of {gap[large].mean():.3f}; SGD's best rate is then "
            f"the smallest of all for c = {edge or 'none'}.",
            verdict(bool(gap_small[large].mean() > gap[large].mean() / 2), bool(gap_small[large].mean() > EQUAL)),
        ),
    )
    return Result(
        "fig5",
        f"Figure 5: SGD and Adam on the scaled MLP, {settings['data']}, {num_steps} steps",
        {**settings, "scales": scales, "rates": rates, "smaller rates of SGD": small},
        claims,
        "best test accuracy (its rate); rates of the paper's grid that ended in NaN or infinity\n"
        + format_table(["c", *found, "SGD diverged", "Adam diverged"], rows),
        {"gap": gap.tolist(), "gap with smaller rates": gap_small.tolist(), "rank correlation": rank},
        {f"{key} {name}": getattr(t, key) for name, t in runs.items() for key in ("steps", "accuracy", "diverged")},
        _draw(runs, found, scales),
    )


def _draw(runs: Mapping[str, Training], found: Mapping[str, tuple[Tensor, Tensor]], scales: Sequence[int]) -> Figure:
    from matplotlib import colormaps

    figure = new_figure(13.0, 4.0)
    panels = figure.subplots(1, 3, sharey=True)
    colors = colormaps["viridis"].resampled(max(scales) + 1)
    for panel, letter, name in zip(panels, "ab", ("Adam", "SGD")):
        for k, c in enumerate(scales):
            if c in DRAWN:
                accuracy = runs[name].accuracy[k, found[name][1][k]].tolist()
                panel.plot(runs[name].steps.tolist(), accuracy, color=colors(c), label=f"c = {c}")
        panel.set_title(f"({letter}) Training curves of {name}", fontsize="medium")
        panel.set_xlabel("iteration")
    panels[0].set_ylabel("test accuracy")
    panels[0].legend(frameon=False, fontsize="small", ncols=2)
    for name, color, style in (
        ("Adam", ADAM_COLOR, "^-"),
        ("SGD", GD_COLOR, "o-"),
        ("SGD, smaller rates too", GD_COLOR, "o--"),
    ):
        fill = "none" if style.endswith("--") else "full"
        panels[2].plot(scales, found[name][0].tolist(), style, color=color, label=name, fillstyle=fill)
    panels[2].set_title("(c) Final test accuracy at the best rate", fontsize="medium")
    panels[2].set_xlabel("degree of block heterogeneity c")
    panels[2].legend(frameon=False, fontsize="small")
    for panel in panels:
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    return figure
