"""Figure 3: spectra of four blocks of every network at initialization, divided by their 10th largest eigenvalue.

The paper's blocks are the first four convolutions of a CNN, and an embedding, query, value and MLP matrix of a
Transformer. It states that the four spectra of a CNN are similar and those of a Transformer are not. Measured here: the
mean JS distance over the six pairs of normalized spectra, with one sigma, 1% of the range of all four.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from blockhess._text import format_table
from blockhess.analysis.axes import Axis
from blockhess.analysis.density import default_sigma, node_grid, smooth
from blockhess.spectra import Spectra
from blockhess_paper.networks.initial_spectra import Subject, measure_networks, spectra_settings
from blockhess_paper.networks.networks import NETWORKS, Selection
from blockhess_paper.results import Claim, Result, new_figure, verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The paper divides by the 10th largest eigenvalue.
TENTH = 10

# "Largely different": this many times the JS distance of the most heterogeneous CNN.
CLEAR = 2.0

# The figure does not show GPT2-nano.
SHOWN = ("resnet18", "vgg16", "gpt2", "bert", "vit-base")


def four_blocks(name: str, names: Sequence[str]) -> list[str]:
    """Return the paper's four blocks of a network, or the corresponding ones of a shallower network.

    Args:
        name: a key of NETWORKS; other networks get their first four blocks.
        names: names of all blocks, as in Figure 4.

    Example:
        >>> four_blocks("vgg16", ["features.0", "features.2", "features.5", "features.7", "features.10"])
        ['features.0', 'features.2', 'features.5', 'features.7']
    """

    def layer(part: str, number: int) -> str:
        owned = [block for block in names if block.endswith(part)]
        return owned[min(number, len(owned)) - 1]

    if name == "gpt2":
        # Figure 4 has layers 1, 4, 8 and 12; its second replaces layer 3.
        return [names[0], layer(".attn.wq", 2), layer(".attn.wv", 2), layer(".mlp.c_fc", 2)]
    if name == "gpt2-nano":
        return [names[0], layer(".attn.c_attn", 3), layer(".attn.c_attn", 6), layer(".mlp.c_proj", 3)]
    if name == "bert":
        return [names[0], layer(".query", 2), layer(".value", 2), layer(".fc1", 3)]
    if name == "vit-base":
        return [names[0], layer(".attn.qkv", 1), layer(".attn.qkv", 2), layer(".mlp.fc1", 2)]
    return list(names[:4])


def run(*, seed: int = 0, quick: bool = False, folder: Path, selection: Selection | None = None) -> Result:
    """Plot the spectra of four blocks of every network and measure how much they differ.

    Args:
        seed, quick, folder, selection: see table1.run; no model means the five networks of the figure.
    """
    selection = selection or Selection()
    subjects = measure_networks(folder, selection, SHOWN, seed=seed, quick=quick)
    chosen = {s.title: four_blocks(s.name, s.spectra.names) for s in subjects}
    distances = {}
    rows = []
    for s in subjects:
        blocks = [b for b in chosen[s.title] if b in s.spectra.comparable_blocks(Axis(normalize=TENTH))]
        js0 = s.spectra.js0(blocks=blocks, axis=Axis(normalize=TENTH)) if len(blocks) > 1 else None
        distances[s.title] = float(js0) if js0 else float("nan")
        tenth = s.spectra.kth_eigenvalue(TENTH)[0][s.spectra.rows(chosen[s.title])]
        low, high = (end[s.spectra.rows(chosen[s.title])] / tenth for end in s.spectra.eigenvalue_range())
        for row, block in enumerate(chosen[s.title]):
            rows.append([s.title, block, f"{tenth[row]:.3g}", f"{low[row]:.3g}", f"{high[row]:.3g}"])
        rows[-1].append(f"{distances[s.title]:.3f}")
    return Result(
        "fig3",
        f"Figure 3: spectra of four blocks of every network, scale {selection.scale!r}",
        spectra_settings(subjects, seed, selection),
        _claims(subjects, distances),
        "eigenvalues over the block's 10th largest; JS: mean distance between the four, base 2, without blocks whose\n"
        "10th largest is negative\n"
        + format_table(
            ["network", "block", "10th", "smallest / 10th", "largest / 10th", "JS"],
            [[*row, ""][:6] for row in rows],
            left=2,
        ),
        {"js distance": distances, "blocks": chosen},
        figure=_draw(subjects, chosen),
    )


def _claims(subjects: Sequence[Subject], distances: Mapping[str, float]) -> tuple[Claim, ...]:
    if not {s.name for s in subjects} >= set(SHOWN):
        return ()
    claims = []
    for policy in ("eval", "batch"):
        here = [s for s in subjects if s.policy in (policy, "none")]
        # NaN means that fewer than two blocks can be normalized.
        known = [s for s in here if not math.isnan(distances[s.title])]
        cnn = max(distances[s.title] for s in known if not NETWORKS[s.name][2])
        transformers = [distances[s.title] for s in known if NETWORKS[s.name][2]]
        values = ", ".join(f"{distances[s.title]:.3f} ({s.title})" for s in here)
        claims.append(
            Claim(
                f"Figure 3: spectra are similar among a CNN's blocks, different in a Transformer (BatchNorm {policy}).",
                f"mean JS distance of the four, each over its 10th largest eigenvalue: {values}.",
                verdict(min(transformers) >= CLEAR * cnn, max(transformers) >= CLEAR * cnn),
            )
        )
    return tuple(claims)


def _draw(subjects: Sequence[Subject], chosen: Mapping[str, list[str]]) -> Figure:
    """Plot one column of four panels per network: log density of the eigenvalues over the 10th largest."""
    figure = new_figure(3.0 * len(subjects), 7.0, dpi=100)
    panels = figure.subplots(4, len(subjects), squeeze=False, sharex="col")
    for column, subject in enumerate(subjects):
        for line, block in enumerate(chosen[subject.title]):
            panel = panels[line][column]
            _spectrum(panel, subject.spectra, block)
            panel.set_title(block, fontsize="small", loc="left", pad=2)
        panels[3][column].set_xlabel(subject.title, fontsize="medium")
    figure.supylabel("density")
    figure.suptitle("Spectra at initialization, eigenvalues divided by the block's 10th largest", fontsize="large")
    return figure


def _spectrum(panel: Axes, spectra: Spectra, block: str) -> None:
    row = spectra.rows([block])[0]
    tenth = float(spectra.kth_eigenvalue(TENTH)[0][row])
    nodes, weights = (part[row][None] for part in spectra.merged)
    if not tenth > 0:
        tenth = 1.0
    sigma = default_sigma(nodes / tenth)
    grid = node_grid(nodes / tenth, sigma)
    panel.semilogy(grid.numpy(), smooth(nodes / tenth, weights, grid, sigma)[0].clamp(min=1e-11).numpy(), linewidth=0.8)
    panel.set_ylim(1e-11, 1e2)
