"""Figures for papers: spectra, heat map, JS0 over checkpoints.

Widths are those of journal columns, font sizes 6 to 9 points; there are no titles. Fonts are embedded, PNG has 600 dpi.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockhess.analysis import comparison
from blockhess.analysis.selection import comparable_blocks
from blockhess.report.html.contents import COMPARISONS
from blockhess.report.plots import MISSING, drawable, new_figure, plot_density, plot_heatmap, save_figure
from blockhess.results.data import SpectraData
from blockhess.results.files import check_writable
from blockhess_ext.arguments import choice

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("pdf", "svg", "png")

# Widths of one, one and a half and two journal columns in inches: 89, 120 and 183 mm.
SINGLE, MIDDLE, DOUBLE = 3.5, 4.7, 7.2

# Panels of a full page of width DOUBLE.
MOST_PANELS = 24

# Distinct for color-blind readers: Okabe and Ito 2008.
COLORS = ("#0072b2", "#d55e00", "#009e73")

STYLE: dict[Any, float] = {"font.size": 8.5, "savefig.dpi": 600, "axes.linewidth": 0.6}


def write(results: Sequence[SpectraData], stem: Path, suffix: str, labels: Sequence[str]) -> list[Path]:
    """Write the figures of the last result, and of JS0 over all results: STEM_spectra, STEM_heatmap, STEM_js0.

    Args:
        results: at least one.
        stem: path and common part of the file names.
        suffix: one of FORMATS.
        labels: names of the results.

    Returns:
        paths; there is no heat map without two comparable blocks, and no figure of JS0 without two results.

    Raises:
        ValueError: the suffix is unknown, or a file cannot be written.
        ImportError: matplotlib is missing.

    Example:
        >>> write([spectra], Path("gpt"), "pdf", ["gpt"])
        [PosixPath('gpt_spectra.pdf'), PosixPath('gpt_heatmap.pdf')]
    """
    choice("format", suffix, FORMATS, op="figures")
    check_writable(stem.with_name(f"{stem.name}_spectra.{suffix}"))  # before the work
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ImportError(MISSING) from None
    spectra = results[-1]
    paths = []
    with rc_context(STYLE):
        figures = {"spectra": plot_density(spectra, shown(spectra), width=DOUBLE)}
        if len(comparable_blocks(spectra)) >= 2:
            figures["heatmap"] = plot_heatmap(spectra, width=MIDDLE)
        if len(results) > 1:
            figures["js0"] = plot_js0(results, labels)
        for name, figure in figures.items():
            paths.append(stem.with_name(f"{stem.name}_{name}.{suffix}"))
            save_figure(figure, paths[-1])
    return paths


def shown(spectra: SpectraData) -> list[str]:
    """Return the blocks of a figure that fits on a page: all, or MOST_PANELS at regular intervals."""
    names = spectra.names
    count = min(len(names), MOST_PANELS)
    return [names[i * len(names) // count] for i in range(count)]


def plot_js0(results: Sequence[SpectraData], labels: Sequence[str], width: float = SINGLE) -> Figure:
    """Draw JS0 of every result, for the comparisons of the HTML page.

    Args:
        results: results of one model, in order.
        labels: names of the results, shown unless the training steps of all are known.
        width: width of the figure in inches.

    Example:
        >>> plot_js0([spectra, trained], ["at initialization", "trained"]).savefig("js0.pdf")
    """
    figure = new_figure(width, 0.7 * width)
    axes = figure.subplots()
    steps = [spectra.provenance.get("step") for spectra in results]
    known = all(isinstance(step, int | float) for step in steps)
    positions: list[Any] = steps if known else list(range(len(results)))
    for (title, options), marker, color in zip(COMPARISONS.items(), "osv", COLORS):
        points = [
            (x, comparison.js0(spectra, **options).value)
            for x, spectra in zip(positions, results)
            if len(comparable_blocks(spectra, options["axis"])) >= 2
        ]
        if points:
            style: dict[str, Any] = {
                "marker": marker,
                "color": color,
                "markersize": 3.5,
                "linewidth": 1.2,
                "clip_on": False,
            }
            axes.plot(*zip(*points), label=title, **style)
    if not known:
        axes.set_xticks(positions, [*map(drawable, labels)], rotation=20, ha="right")
    axes.set_xlabel("training step" if known else "checkpoint")
    axes.set_ylabel("JS0")
    axes.set_ylim(bottom=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize="small")
    return figure
