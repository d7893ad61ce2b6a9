"""Figure 4: the matrix of JS distances between the blocks of every network at initialization.

The paper's color bars end at 3.0, while its means of the same matrices reach 286 (Table 1), so either the bars are
saturated or they show another quantity; a Jensen-Shannon distance (base 2) is at most 1. Shown here is the distance
with one sigma per network, 1% of the range of its blocks, and one color scale for all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from blockhess._text import format_table
from blockhess_paper.networks.initial_spectra import Subject, measure_networks, spectra_settings
from blockhess_paper.networks.networks import NETWORKS, Selection
from blockhess_paper.results import Claim, Result, new_figure, quantiles, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# "Significantly smaller": the smallest median of a Transformer is this many times the largest of a CNN.
CLEAR = 2.0

MOST_COLUMNS = 4


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Compare the blocks of every network pair by pair.

    Args:
        seed, quick, folder, selection: see table1.run.
    """
    selection = selection or Selection()
    subjects = measure_networks(folder, selection, seed=seed, quick=quick)
    compared = {s.title: s.spectra.compare(axis="linear") for s in subjects}
    pairs = {title: _pairs(matrix) for title, (matrix, _) in compared.items()}
    spread = {title: quantiles(found, (0.1, 0.5, 0.9, 1.0)) for title, found in pairs.items()}
    names = {s.title: s.spectra.comparable_blocks("linear") for s in subjects}
    rows = [
        [
            title,
            len(compared[title][0]),
            *(f"{value:.3f}" for value in spread[title]),
            f"{compared[title][1].sigma:.2g}",
        ]
        for title in compared
    ]
    return Result(
        "fig4",
        f"Figure 4: JS distance between the blocks of every network, scale {selection.scale!r}",
        spectra_settings(subjects, seed, selection),
        _claims(subjects, spread),
        "JS distance, base 2, over pairs of different blocks\n"
        + format_table(
            ["network", "blocks", "10%", "median", "90%", "largest", "sigma"], [list(map(str, row)) for row in rows]
        ),
        {"quantiles 10%, 50%, 90%, 100%": spread, "blocks": names},
        {title: matrix for title, (matrix, _) in compared.items()},
        _draw(subjects, {title: matrix for title, (matrix, _) in compared.items()}),
    )


def _pairs(matrix: Tensor) -> Tensor:
    return matrix[torch.ones_like(matrix, dtype=torch.bool).triu(1)]


def _claims(subjects: Sequence[Subject], spread: dict[str, list[float]]) -> tuple[Claim, ...]:
    if {s.name for s in subjects} != set(NETWORKS):
        return ()
    claims = []
    for policy in ("eval", "batch"):
        of = {
            kind: {
                s.title: spread[s.title][1]
                for s in subjects
                if s.policy in (policy, "none") and NETWORKS[s.name][2] == kind
            }
            for kind in (False, True)
        }
        cnn, transformer = max(of[False].values()), min(of[True].values())
        values = ", ".join(f"{value:.3f} ({title})" for part in of.values() for title, value in part.items())
        claims.append(
            Claim(
                f"Figure 4: JS distances in CNNs are significantly smaller than in Transformers (BatchNorm {policy}).",
                f"median pair: {values}.",
                verdict(transformer >= CLEAR * cnn, max(of[True].values()) >= CLEAR * cnn),
            )
        )
    return tuple(claims)


def _draw(subjects: Sequence[Subject], matrices: dict[str, Tensor]) -> Figure:
    columns = min(MOST_COLUMNS, len(subjects))
    lines = math.ceil(len(subjects) / columns)
    figure = new_figure(4.4 * columns, 4.2 * lines, dpi=110)
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for panel, subject in zip(panels, subjects):
        image = panel.imshow(
            matrices[subject.title].numpy(), cmap="viridis", vmin=0.0, vmax=1.0, interpolation="nearest"
        )
        names = subject.spectra.comparable_blocks("linear")
        panel.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
        panel.set_yticks(range(len(names)), names, fontsize=5)
        panel.set_title(subject.title, fontsize="medium")
    for panel in panels[len(subjects) :]:
        panel.remove()
    figure.colorbar(
        image, ax=panels[: len(subjects)].tolist(), shrink=0.7, label="JS distance, base 2 (the paper's bars: 0 to 3)"
    )
    return figure
