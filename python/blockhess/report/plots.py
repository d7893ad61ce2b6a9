"""Pictures of spectra: log-densities block by block (the paper's Figure 3) and the heat map of js_matrix (Figure 4).

Every function returns a matplotlib Figure of its own, free of pyplot and of any display; matplotlib is imported on
first use. Colors stay distinct for color-blind readers and in gray print.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blockhess import _checks
from blockhess.analysis.axes import Axis, as_axis
from blockhess.analysis.comparison import compare
from blockhess.analysis.density import check_sigma_in_range, default_sigma, node_grid, smooth
from blockhess.analysis.errors.bands import density_band
from blockhess.analysis.errors.error_bars import resolved_sigma
from blockhess.analysis.errors.intervals import check_confidence
from blockhess.analysis.jensen_shannon import BATCHNORM_POLICIES, KINDS, largest_value
from blockhess.analysis.selection import distributions, normalizable, resolved_axis
from blockhess.results.data import SpectraData
from blockhess.results.files import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINE, AREA, QUIET, FAINT = "#08519c", "#9ecae1", "#555555", "#cccccc"
DARK, LIGHT = "#f16913", "#fdd0a2"

# Panels of plot_density, in inches, and how many stand side by side at most.
PANEL_WIDTH, PANEL_HEIGHT, MOST_COLUMNS = 2.8, 1.45, 5

# The heat map writes the values into its cells up to the first number of blocks, and every name up to the second.
MOST_VALUES, MOST_LABELS = 14, 150

# Of a figure whose width is given: panels are so wide at least, and labels stand so far apart, in inches; names beside
# a heat map take this share of the width at most, and its color bar so many inches.
LEAST_PANEL, LABEL_PITCH, NAMES_SHARE, BAR = 1.7, 0.1, 0.35, 0.95

# Letters of names in points, at most, and how wide they are on average, as a share of that.
FONT, LETTER = 8.0, 0.55

# A cell that holds a value is so wide at least, in inches.
LEAST_CELL = 0.3

MISSING = 'pictures need matplotlib; type: pip install "blockhess[plot]"'


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches, free of any display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(MISSING) from None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def save_figure(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    """Write a figure to a file in the format of its suffix, unless path is None, and return it.

    Fonts are embedded: as TrueType in PDF and PostScript, which publishers ask for, as outlines in SVG.

    Raises:
        ValueError: the suffix is no picture format, or the file cannot be written.
    """
    if path is not None:
        formats = figure.canvas.get_supported_filetypes()
        if Path(path).suffix.lower().removeprefix(".") not in formats:
            raise ValueError(f"plot: path must end in one of .{', .'.join(sorted(formats))}, got {path}")
        from matplotlib import rc_context

        with rc_context({"pdf.fonttype": 42, "ps.fonttype": 42, "svg.fonttype": "path"}):
            figure.savefig(check_writable(path))
    return figure


def plot_density(
    spectra: SpectraData,
    blocks: Sequence[str] | None = None,
    sigma: float | None = None,
    share_x: bool = False,
    confidence: float | None = 0.95,
    axis: str | Axis = "linear",
    width: float | None = None,
) -> Figure:
    """Draw the log-density of every block in a panel of its own.

    The height is density x sigma sqrt(2 pi): a lone eigenvalue stands as high as its share of the spectrum. Panels
    with axes of their own are blurred in proportion to them, which suits pictures, never comparisons.

    Args:
        spectra: what to draw.
        blocks: names, in order; None means all that can be normalized.
        sigma: width of the Gaussian on the axis, one for all blocks; None means what each block's nodes resolve, or
            DEFAULT_RELATIVE_SIGMA of the range of all of them with share_x.
        share_x: one axis of eigenvalues for all panels; otherwise each spans its own block.
        confidence: of the error bands: dark what the random probes, light what probes and steps leave open, see
            Spectra.density_band. None means no bands; blocks with one probe, and those written out, have none.
        axis: see Spectra.js_matrix.
        width: of the figure in inches, which then has no title: for a column of a journal. None means what fits.

    Returns:
        Figure.

    Raises:
        ValueError: a name is unknown, none is given, or sigma breaks its rule.
        ImportError: matplotlib is missing.

    Source: Zhang et al. 2024, Figure 3.

    Example:
        >>> plot_density(spectra, sigma=0.01).savefig("density.png")
    """
    axis = as_axis("plot_density", axis)
    names = normalizable(spectra, axis) if blocks is None else _checks.names(blocks)
    where = resolved_axis("plot_density", spectra, names, axis)
    rows = spectra.rows(names)
    nodes, weights = distributions(spectra, names, where)
    # Heights below a tenth of one eigenvalue's share are no information.
    floor = 0.1 / max(10, *(spectra.dims[row] for row in rows))

    columns = min(MOST_COLUMNS, math.ceil(math.sqrt(len(rows) / 2)))
    panel_height = PANEL_HEIGHT
    if width is not None:
        columns = max(1, min(len(rows), int(width / LEAST_PANEL)))
        panel_height = min(PANEL_HEIGHT, 0.6 * width / columns)
    lines = math.ceil(len(rows) / columns)
    figure = new_figure(width or max(5.6, PANEL_WIDTH * columns + 0.3), panel_height * lines + 1.1)
    panels = figure.subplots(lines, columns, squeeze=False, sharey=True, sharex=share_x)
    if sigma is not None:
        widths = [check_sigma_in_range("plot_density", sigma, nodes)] * len(rows)
        blur = f"sigma {sigma:.3g}"
    elif share_x:
        widths = [default_sigma(nodes)] * len(rows)
        blur = f"sigma {widths[0]:.3g}"
    else:
        widths = resolved_sigma(spectra, names, where).tolist()
        blur = "about each block's range / steps, for pictures only"
    for panel, row, x, w, one in zip(panels.flatten(), rows, nodes, weights, widths):
        _draw_density(panel, spectra.names[row], x, w, one)
        if confidence is not None:
            _draw_bands(panel, spectra, row, node_grid(x, one), one, confidence, where)
    for panel in panels.flatten()[len(rows) :]:
        panel.remove()

    first = panels[0, 0]
    first.set_yscale("log")
    first.set_ylim(floor, 2.0)
    first.yaxis.get_major_locator().set_params(numticks=5)
    first.minorticks_off()
    if share_x:
        _span(first, float(nodes.min()), float(nodes.max()), max(widths))
    model, policy = spectra.provenance.get("model"), spectra.provenance.get("batchnorm")
    title = f"Hessian spectra of the parameter blocks{f' of {model}' if model else ''}"
    title += f", {BATCHNORM_POLICIES[policy]}" if policy in ("eval", "batch") else ""
    if width is None:
        figure.suptitle(textwrap.fill(title, int(8 * figure.get_figwidth())), fontweight="bold", fontsize="large")
    what = "eigenvalue" if where == Axis() else textwrap.fill(str(where), int(10 * figure.get_figwidth()))
    below = f"{what} (gray line: 0)\nblurred by Gaussians of {blur}"
    if confidence is not None:
        below += f"\n{100 * confidence:g} % bands: dark from the random probes, light with what the steps leave open"
    figure.supxlabel(below, fontsize="medium")
    figure.supylabel("share of eigenvalues", fontsize="medium")
    return figure


def _draw_density(panel: Axes, name: str, nodes: Tensor, weights: Tensor, sigma: float) -> None:
    grid = node_grid(nodes, sigma)
    height = smooth(nodes[None], weights[None], grid, sigma)[0] * (sigma * math.sqrt(2 * math.pi))
    panel.axvline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    panel.fill_between(grid.numpy(), height.numpy(), 1e-300, color=AREA, linewidth=0)
    panel.plot(grid.numpy(), height.numpy(), color=LINE, linewidth=0.9)
    if not bool((weights > 0).any()):
        panel.text(0.5, 0.5, "not finite", transform=panel.transAxes, ha="center", color=QUIET)

    _span(panel, float(nodes.min()), float(nodes.max()), sigma)
    panel.tick_params(labelsize="x-small", colors=QUIET)
    panel.set_title(_shorten(name, 40), fontsize="small", loc="left", pad=3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_bands(
    panel: Axes, spectra: SpectraData, row: int, grid: Tensor, sigma: float, confidence: float, axis: Axis
) -> None:
    """Shade the error bands of the density that _draw_density drew; a block written out has none but rounding's."""
    check_confidence("plot_density", confidence)
    if spectra.quadrature.is_exact(row) or int((spectra.quadrature.steps[:, row] > 0).sum()) < 2:
        return
    band = density_band(spectra.quadrature, [row], grid, sigma, confidence, axis)
    x, height = band.x.numpy(), sigma * math.sqrt(2 * math.pi)
    for lower, upper, color in ((band.total_lower, band.total_upper, LIGHT), (band.lower, band.upper, DARK)):
        low, high = (height * edge[0].clamp(min=1e-300 / height).numpy() for edge in (lower, upper))
        panel.fill_between(x, low, high, color=color, linewidth=0, zorder=1.5)


def _span(panel: Axes, low: float, high: float, sigma: float) -> None:
    """Show the eigenvalues from low to high, and label these two, to a hundredth of what is between them."""
    # A block with a single eigenvalue shows as what it is, a narrow peak.
    spread = high - low > 10 * sigma
    reach = 6 * sigma if spread else 50 * sigma
    panel.set_xlim(low - reach, high + reach)
    ticks = [low, high] if spread else [low]
    places = math.ceil(2 - math.log10(high - low)) if spread else 300
    panel.set_xticks(ticks, [_brief(round(tick, places) + 0.0) for tick in ticks])  # + 0.0: no -0


def _brief(value: float) -> str:
    """Two digits, without the zeros that pad an exponent."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{value:.2g}" if -3 <= int(exponent) <= 3 or value == 0 else f"{mantissa}e{int(exponent)}"


def plot_heatmap(
    spectra: SpectraData, vmax: float | None = None, width: float | None = None, **comparison: Any
) -> Figure:
    """Draw the matrix of Jensen-Shannon values between all pairs of blocks.

    Args:
        spectra: what to compare.
        vmax: where the colors end; None means the largest possible value of the kind, so that pictures of different
            models compare at a glance.
        width: of the figure in inches, which then has no title: for a column of a journal. None means what fits.
        comparison: kind, base, sigma, axis, blocks of Spectra.js_matrix.

    Returns:
        Figure.

    Raises:
        ValueError: an argument of the comparison breaks its rule.
        ImportError: matplotlib is missing.

    Source: Zhang et al. 2024, Figure 4.

    Example:
        >>> plot_heatmap(spectra, kind="divergence").savefig("heatmap.png")
    """
    if vmax is not None and not vmax > 0:
        raise ValueError(f"plot_heatmap: vmax must be positive, got {vmax}")
    matrix, js0 = compare(spectra, **comparison)
    n = len(js0.blocks)
    pairs = matrix[~torch.eye(n, dtype=torch.bool)]
    if vmax is None:
        vmax = largest_value(js0.kind, js0.base)

    longest = min(40, max(map(len, js0.blocks)))
    side, most_labels = min(12.0, max(4.8, 0.2 * n)), MOST_LABELS
    caption_width = side
    if width is not None:
        longest = min(longest, 24, int(NAMES_SHARE * width * 72 / (LETTER * FONT)))
        caption_width = width - LETTER * FONT / 72 * longest
        side = caption_width - BAR
        most_labels = int(side / LABEL_PITCH)
    font = min(FONT, 0.78 * 72 * side / min(n, most_labels))
    margin = LETTER * font / 72 * longest
    side = side if width is None else width - margin - BAR
    found = f"pairs from {float(pairs.min()):.2g} to {float(pairs.max()):.2g}"
    caption = textwrap.wrap(f"{js0}; {found}", int(14 * caption_width))
    model = spectra.provenance.get("model")
    title = textwrap.wrap(f"Block spectra{f' of {model}' if model else ''}, compared", int(8 * side))
    title = title if width is None else []
    figure = new_figure(width or side + margin + 1.2, side + margin + 0.16 * len(caption) + 0.2 * len(title) + 0.4)
    axes = figure.subplots()
    image = axes.imshow(matrix.numpy(), cmap="viridis", vmin=0.0, vmax=vmax, interpolation="nearest")

    shown = range(0, n, math.ceil(n / most_labels))
    labels = [_shorten(js0.blocks[i], longest) for i in shown]
    axes.set_xticks(list(shown), labels, rotation=90, fontsize=font)
    axes.set_yticks(list(shown), labels, fontsize=font)
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    if n <= MOST_VALUES and side / n >= LEAST_CELL:
        for i in range(n):
            for j in range(n):
                dark = float(matrix[i, j]) < 0.6 * vmax
                text = f"{float(matrix[i, j]):.2g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=font, color="white" if dark else "black")

    # Placed by the matrix, which an equal aspect makes smaller than its cell of the figure.
    bar = figure.colorbar(image, cax=axes.inset_axes((1 + 0.08 / side, 0.1, 0.12 / side, 0.8)))
    kind = textwrap.fill(f"{KINDS[js0.kind]}, base {js0.base:.3g}", max(16, int(12 * side)))
    bar.set_label(kind, fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)
    below = axes.set_title("\n".join(caption), fontsize="small", loc="left")
    axes.annotate(
        "\n".join(title),
        xy=(0, 1),
        xycoords=below,
        xytext=(0, 4),
        textcoords="offset points",
        fontweight="bold",
        fontsize="large",
        annotation_clip=False,
    )
    return figure


def _shorten(name: str, length: int) -> str:
    """Keep both ends of a long name, which tell the layer and the parameter."""
    return name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}"
