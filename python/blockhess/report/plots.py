"""Plots of spectra: log-densities of the blocks (Figure 3 of the paper) and heat map of js_matrix (Figure 4).

Every function returns a new matplotlib Figure, without pyplot and any display; matplotlib is imported on first use.
Colors are distinct for color-blind readers and in grayscale.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from blockhess._text import printable
from blockhess.analysis.axes import Axis, as_axis
from blockhess.analysis.comparison import compare
from blockhess.analysis.density import check_sigma_in_range, default_sigma, node_grid, smooth
from blockhess.analysis.errors.bands import density_band
from blockhess.analysis.errors.error_bars import resolved_sigma
from blockhess.analysis.errors.intervals import check_confidence
from blockhess.analysis.errors.steps import exact
from blockhess.analysis.jensen_shannon import BATCHNORM_POLICIES, KINDS, largest_value
from blockhess.analysis.selection import comparable_blocks, distributions, normalizable, quadrature_for, resolved_axis
from blockhess.problem.blocks import ZERO_NOTE
from blockhess.results.data import SpectraData
from blockhess.results.files import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.image import AxesImage

LINE, AREA, QUIET, FAINT = "#08519c", "#9ecae1", "#555555", "#cccccc"
DARK, LIGHT = "#f16913", "#fdd0a2"

# Size of the panels of plot_density in inches, and largest number of columns.
PANEL_WIDTH, PANEL_HEIGHT, MOST_COLUMNS = 2.8, 1.45, 5

# Height of a row of the panel of all blocks, largest height of all rows, and height of its texts, in inches; largest
# number of labeled powers of ten on either side of zero, and number of points along the axis.
ROW_HEIGHT, MOST_ROWS_HEIGHT, TEXT_HEIGHT, MOST_POWERS, SHARED_POINTS = 0.12, 10.0, 0.75, 4, 800

# Width of a model among others, in inches.
MODEL_WIDTH = 6.4

# Largest numbers of blocks for which the heat map shows values and all names, and least width of a cell with a value.
MOST_VALUES, MOST_LABELS, LEAST_CELL = 14, 150, 0.3

# For figures of given width, in inches: least width of a panel, least distance of labels, largest share of the width
# for the names beside a heat map, width for its color bar.
LEAST_PANEL, LABEL_PITCH, NAMES_SHARE, BAR = 1.7, 0.1, 0.35, 0.95

# Largest font size of names in points, and mean width of a letter relative to it.
FONT, LETTER = 8.0, 0.55

MISSING = 'plots need matplotlib; type: pip install "blockhess[plot]"'


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of this size in inches, without a display."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(MISSING) from None
    return Figure(figsize=(width, height), layout="constrained", dpi=150)


def save_figure(figure: Figure, path: str | PathLike[str] | None) -> Figure:
    """Write a figure to a file in the format of its suffix, unless path is None, and return it.

    Fonts are embedded, as TrueType in PDF and PostScript, as publishers require, and as outlines in SVG.

    Raises:
        ValueError: the suffix is not an image format, or the file cannot be written.
    """
    if path is not None:
        formats = figure.canvas.get_supported_filetypes()
        if Path(path).suffix.lower().removeprefix(".") not in formats:
            raise ValueError(f"plot: path must end in one of .{', .'.join(sorted(formats))}, got {printable(path)}")
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
    axis: str | Axis | None = None,
    width: float | None = None,
) -> Figure:
    """Draw the log-density of every block: all blocks in one panel, one row each, and one panel per block.

    The rows share the signed-log axis of js_matrix, so that flat and sharp blocks can be compared. The panels show
    each block on its own linear axis, with error bands. The height is density x sigma sqrt(2 pi): that of an isolated
    eigenvalue is its share of the spectrum.

    Args:
        blocks: names, in order; None means all that can be normalized.
        sigma: standard deviation of the Gaussian on the axis, the same for all blocks; None means resolved_sigma, or
            default_sigma of the blocks with share_x.
        share_x: whether panels share the axis of eigenvalues; otherwise it spans the eigenvalues of the block.
        confidence: probability of the error bands, dark for the random probes, light for probes and steps, see
            Spectra.density_band. None means no bands; blocks with one probe, and exact ones, have none.
        axis: axis of the panels, see Spectra.js_matrix; None means linear. An axis that is given, a single block, or
            share_x means panels only.
        width: width of the figure in inches, which then has no title; None means a width that fits.

    Raises:
        ValueError: a block cannot be normalized, or sigma exceeds the range of the nodes.
        ImportError: matplotlib is missing.

    Source: Zhang et al. 2024, Figure 3.

    Example:
        >>> plot_density(spectra, sigma=0.01).savefig("density.png")
    """
    given, axis = axis, as_axis("plot_density", "linear" if axis is None else axis)
    blocks = normalizable(spectra, axis) if blocks is None else blocks
    axis = resolved_axis("plot_density", spectra, blocks, axis)
    rows = spectra.rows(blocks)
    nodes, weights = _drawn(spectra, blocks, axis)
    # A tenth of the share of one eigenvalue.
    floor = 0.1 / max(10, *(spectra.dims[row] for row in rows))

    columns = min(MOST_COLUMNS, math.ceil(math.sqrt(len(rows) / 2)))
    panel_height = PANEL_HEIGHT
    if width is not None:
        columns = max(1, min(len(rows), int(width / LEAST_PANEL)))
        panel_height = min(PANEL_HEIGHT, 0.43 * width / columns)
    lines = math.ceil(len(rows) / columns)
    is_shared = given is None and not share_x and len(rows) >= 2
    heights = [min(ROW_HEIGHT * len(rows), MOST_ROWS_HEIGHT) + TEXT_HEIGHT if is_shared else 0.0]
    heights += [panel_height * lines + 1.1]
    figure = new_figure(width or max(5.6, PANEL_WIDTH * columns + 0.3), sum(heights))
    lower: Any = figure
    if is_shared:
        upper, lower = figure.subfigures(2, 1, height_ratios=heights)  # type: ignore[misc]
    panels = lower.subplots(lines, columns, squeeze=False, sharey=True, sharex=share_x)
    if sigma is not None:
        sigmas = [check_sigma_in_range("plot_density", sigma, nodes)] * len(rows)
    elif share_x:
        sigmas = [default_sigma(nodes)] * len(rows)
    else:
        sigmas = resolved_sigma(spectra, blocks, axis).tolist()
    for panel, row, x, w, block_sigma in zip(panels.flatten(), rows, nodes, weights, sigmas):
        _draw_density(panel, spectra, row, x, w, block_sigma)
        if confidence is not None and bool(w.any()):
            _draw_bands(panel, spectra, row, node_grid(x, block_sigma), block_sigma, confidence, axis)
    for panel in panels.flatten()[len(rows) :]:
        panel.remove()

    first = panels[0, 0]
    first.set_yscale("log")
    first.set_ylim(floor, 2.0)
    first.yaxis.get_major_locator().set_params(numticks=5)
    first.minorticks_off()
    if share_x:
        _set_range(first, float(nodes.min()), float(nodes.max()), max(sigmas))
    if is_shared:
        _draw_shared(upper, spectra, blocks, floor, figure.get_figwidth())
    model, policy = spectra.provenance.get("model"), spectra.provenance.get("batchnorm")
    title = f"Hessian spectra of the parameter blocks{f' of {model}' if model else ''}"
    title += f", {BATCHNORM_POLICIES[policy]}" if policy in ("eval", "batch") else ""
    if width is None:
        figure.suptitle(textwrap.fill(title, int(8 * figure.get_figwidth())), fontweight="bold", fontsize="large")
    label = "eigenvalue" if axis == Axis() else textwrap.fill(str(axis), int(10 * figure.get_figwidth()))
    common = sigma is not None or share_x
    text = f"sigma {sigmas[0]:.3g}" if common else "sigma about range / steps of each block, for plots only"
    label += f" (gray line: 0)\nsmoothed with {text}"
    if confidence is not None:
        label += f"\n{100 * confidence:g} % bands: dark for the random probes, light for probes and steps"
    lower.supxlabel(label, fontsize="medium")
    lower.supylabel("share of eigenvalues", fontsize="medium")
    return figure


def _drawn(spectra: SpectraData, blocks: Sequence[str], axis: Axis) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of the blocks on an axis; weights are 0 for blocks whose nodes are noise."""
    nodes, weights = distributions(spectra, blocks, axis)
    noise = torch.tensor([name in spectra.noise_blocks for name in blocks], device="cpu")
    return nodes, weights.masked_fill(noise[:, None], 0.0)


def _draw_shared(figure: SubFigure, spectra: SpectraData, blocks: Sequence[str], floor: float, width: float) -> None:
    """Draw the densities of all blocks as rows of an image, on the signed-log axis and with the sigma of js_matrix."""
    from matplotlib.colors import LogNorm

    comparable = [name for name in blocks if name in comparable_blocks(spectra)]
    axis = resolved_axis("plot_density", spectra, comparable or blocks, "asinh")
    nodes, weights = _drawn(spectra, blocks, axis)
    sigma = default_sigma(distributions(spectra, comparable or blocks, axis)[0])
    low, high = float(nodes.min()) - 4 * sigma, float(nodes.max()) + 4 * sigma
    # At least the resolution of a Gaussian, so that a lone eigenvalue is seen.
    points = torch.linspace(
        low, high, max(SHARED_POINTS, math.ceil(2 * (high - low) / sigma)), dtype=torch.float64, device="cpu"
    )
    height = smooth(nodes, weights, points, sigma) * (sigma * math.sqrt(2 * math.pi))

    axes = figure.subplots()
    n = len(nodes)
    norm = LogNorm(vmin=floor, vmax=1.0)
    shown = height.masked_fill(height < floor, math.nan).numpy()
    image = axes.imshow(
        shown, cmap="viridis_r", norm=norm, aspect="auto", interpolation="nearest", extent=(low, high, n - 0.5, -0.5)
    )
    every = math.ceil(n * LABEL_PITCH / min(ROW_HEIGHT * n, MOST_ROWS_HEIGHT))
    longest = max(12, int(NAMES_SHARE * width * 72 / (LETTER * FONT)))
    labels = [_shorten(name, min(40, longest)) for name in blocks]
    axes.set_yticks(range(0, n, every), labels[::every], fontsize=0.8 * FONT)
    places, powers = _power_ticks(low, high, axis)
    axes.set_xticks(places, powers, fontsize=FONT)
    axes.tick_params(length=2, colors=QUIET)
    axes.axvline(0.0, color=FAINT, linewidth=0.8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=30)
    bar.ax.tick_params(labelsize=0.8 * FONT)
    bar.set_label("share of eigenvalues", fontsize=FONT)
    bar.outline.set_visible(False)
    text = f"eigenvalues of all blocks on one {axis}, smoothed with sigma {sigma:.3g} of this axis"
    is_cut_off = (spectra.quadrature.steps > 0) & ~exact(spectra.quadrature)
    if bool(is_cut_off[:, spectra.rows(blocks)].any()):
        text += "; gaps and lone peaks may be those of few steps"
    axes.set_xlabel(textwrap.fill(text, int(13 * width)), fontsize=FONT)


def _power_ticks(low: float, high: float, axis: Axis) -> tuple[list[float], list[str]]:
    """Return places and labels of zero and of at most MOST_POWERS powers of ten on either side."""
    scale = axis.scale or 1.0
    places, labels = [0.0], ["0"]
    for sign, end in (("", high), ("-", -low)):
        if end <= 1:  # within the linear part
            continue
        largest = axis.of_block().invert(torch.tensor(end, dtype=torch.float64, device="cpu"))
        first, last = math.ceil(math.log10(scale)), math.floor(math.log10(float(largest)))
        step = max(1, math.ceil((last - first + 1) / MOST_POWERS))
        for power in range(last, first - 1, -step):
            place = axis.place(torch.tensor(10.0**power, dtype=torch.float64, device="cpu"))
            places.append(-float(place) if sign else float(place))
            labels.append(f"${sign}10^{{{power}}}$")
    return places, labels


def _draw_density(panel: Axes, spectra: SpectraData, row: int, nodes: Tensor, weights: Tensor, sigma: float) -> None:
    grid = node_grid(nodes, sigma)
    height = smooth(nodes[None], weights[None], grid, sigma)[0] * (sigma * math.sqrt(2 * math.pi))
    panel.axvline(0.0, color=FAINT, linewidth=0.8, zorder=0)
    panel.fill_between(grid.numpy(), height.numpy(), 1e-300, color=AREA, linewidth=0)
    panel.plot(grid.numpy(), height.numpy(), color=LINE, linewidth=0.9)
    if not bool((weights > 0).any()):
        text = ZERO_NOTE if bool(spectra.known[row]) else "not finite"
        panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", color=QUIET)

    _set_range(panel, float(nodes.min()), float(nodes.max()), sigma)
    panel.tick_params(labelsize="x-small", colors=QUIET)
    panel.set_title(_shorten(spectra.names[row], 40), fontsize="small", loc="left", pad=3)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def _draw_bands(
    panel: Axes, spectra: SpectraData, row: int, grid: Tensor, sigma: float, confidence: float, axis: Axis
) -> None:
    """Shade the error bands of the density of an estimated block."""
    check_confidence("plot_density", confidence)
    if spectra.quadrature.is_exact(row) or int((spectra.quadrature.steps[:, row] > 0).sum()) < 2:
        return
    band = density_band(quadrature_for(spectra, axis), [row], grid, sigma, confidence, axis)
    x, height = band.x.numpy(), sigma * math.sqrt(2 * math.pi)
    for lower, upper, color in ((band.total_lower, band.total_upper, LIGHT), (band.lower, band.upper, DARK)):
        low, high = (height * edge[0].clamp(min=1e-300 / height).numpy() for edge in (lower, upper))
        panel.fill_between(x, low, high, color=color, linewidth=0, zorder=1.5)


def _set_range(panel: Axes, low: float, high: float, sigma: float) -> None:
    """Show the eigenvalues from low to high, with ticks at both ends, rounded to a hundredth of the range."""
    # A single eigenvalue is a narrow peak.
    spread = high - low > 10 * sigma
    reach = 6 * sigma if spread else 50 * sigma
    panel.set_xlim(low - reach, high + reach)
    ticks = [low, high] if spread else [low]
    places = math.ceil(2 - math.log10(high - low)) if spread else 300
    panel.set_xticks(ticks, [_brief(round(tick, places) + 0.0) for tick in ticks])  # + 0.0: no -0


def _brief(value: float) -> str:
    """Return the value with two digits and an exponent without leading zeros."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{value:.2g}" if -3 <= int(exponent) <= 3 or value == 0 else f"{mantissa}e{int(exponent)}"


def plot_heatmap(
    spectra: SpectraData, vmax: float | None = None, width: float | None = None, **comparison: Any
) -> Figure:
    """Draw js_matrix as a heat map.

    Args:
        vmax: upper end of the color scale; None means the upper bound of the kind, the same for all models.
        width: width of the figure in inches, which then has no title; None means a width that fits.
        comparison: arguments of Spectra.js_matrix, by name.

    Raises:
        ValueError: vmax is not positive, or an argument of js_matrix is invalid.
        ImportError: matplotlib is missing.

    Source: Zhang et al. 2024, Figure 4.

    Example:
        >>> plot_heatmap(spectra, kind="divergence").savefig("heatmap.png")
    """
    if vmax is not None and not vmax > 0:
        raise ValueError(f"plot_heatmap: vmax must be positive, got {vmax}")
    matrix, js0 = compare(spectra, **comparison)
    n = len(js0.blocks)
    pairs = matrix[~torch.eye(n, dtype=torch.bool, device="cpu")]
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
    pair_range = f"pairs from {float(pairs.min()):.2g} to {float(pairs.max()):.2g}"
    caption = textwrap.wrap(f"{js0}; {pair_range}", int(14 * caption_width))
    model = spectra.provenance.get("model")
    title = textwrap.wrap(f"Block spectra{f' of {model}' if model else ''}, compared", int(8 * side))
    title = title if width is None else []
    figure = new_figure(width or side + margin + 1.2, side + margin + 0.16 * len(caption) + 0.2 * len(title) + 0.4)
    axes = figure.subplots()
    shown = range(0, n, math.ceil(n / most_labels))
    labels = [_shorten(js0.blocks[i], longest) for i in shown]
    image = _draw_matrix(axes, matrix, vmax)
    axes.set_xticks(list(shown), labels, rotation=90, fontsize=font)
    axes.set_yticks(list(shown), labels, fontsize=font)
    if n <= MOST_VALUES and side / n >= LEAST_CELL:
        for i in range(n):
            for j in range(n):
                dark = float(matrix[i, j]) < 0.6 * vmax
                text = f"{float(matrix[i, j]):.2g}"
                axes.text(j, i, text, ha="center", va="center", fontsize=font, color="white" if dark else "black")

    # Placed relative to the matrix, which an equal aspect makes smaller than its axes.
    bar = figure.colorbar(image, cax=axes.inset_axes((1 + 0.08 / side, 0.1, 0.12 / side, 0.8)))
    kind = textwrap.fill(f"{KINDS[js0.kind]}, base {js0.base:.3g}", max(16, int(12 * side)))
    bar.set_label(kind, fontsize="small")
    bar.ax.tick_params(labelsize="small")
    bar.outline.set_visible(False)
    below = axes.set_title("\n".join(caption), fontsize="small", loc="left")
    place: dict[str, Any] = {"xycoords": below, "xytext": (0, 4), "textcoords": "offset points"}
    axes.annotate("\n".join(title), (0, 1), **place, annotation_clip=False, fontweight="bold", fontsize="large")
    return figure


def _draw_matrix(axes: Axes, matrix: Tensor, vmax: float) -> AxesImage:
    axes.tick_params(length=0, pad=2)
    axes.spines[:].set_visible(False)
    return axes.imshow(matrix.numpy(), cmap="viridis", vmin=0.0, vmax=vmax, interpolation="nearest")


def plot_models(models: Mapping[str, SpectraData]) -> Figure:
    """Draw models side by side: the spectra of all blocks on the signed-log axis of the model, and below js_matrix.

    The blocks of the matrix are those of the spectra above it, without those left out of comparisons.

    Args:
        models: title -> spectra.

    Raises:
        ValueError: a model has fewer than two blocks that can be compared.
        ImportError: matplotlib is missing.
    """
    rows = max(len(spectra.names) for spectra in models.values())
    heights = [min(ROW_HEIGHT * rows, MOST_ROWS_HEIGHT) + TEXT_HEIGHT + 0.4, MODEL_WIDTH - 2.0]
    figure = new_figure(MODEL_WIDTH * len(models), sum(heights))
    parts: Any = figure.subfigures(2, len(models), height_ratios=heights, squeeze=False)
    for (title, spectra), above, below in zip(models.items(), *parts):
        blocks = normalizable(spectra, Axis())
        above.suptitle(drawable(title), fontweight="bold")
        floor = 0.1 / max(10, *(spectra.dims[row] for row in spectra.rows(blocks)))
        _draw_shared(above, spectra, blocks, floor, MODEL_WIDTH)
        matrix, js0 = compare(spectra, confidence=0.95)
        assert js0.interval is not None
        low, high, _ = js0.interval
        axes = below.subplots()
        image = _draw_matrix(axes, matrix, largest_value(js0.kind, js0.base))
        labels = [_shorten(name, 24) for name in js0.blocks]
        axes.set_yticks(range(len(labels)), labels, fontsize=min(0.8 * FONT, 0.78 * 72 * heights[1] / len(labels)))
        axes.set_xticks([])
        axes.set_xlabel(
            f"JS0 = {js0.value:.2f} ({low:.2f} ... {high:.2f} with 95 %), the mean over pairs of blocks", fontsize=FONT
        )
        bar = below.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=30)
        bar.ax.tick_params(labelsize=0.8 * FONT)
        bar.set_label(f"{KINDS[js0.kind]}, base {js0.base:.3g}", fontsize=FONT)
        bar.outline.set_visible(False)
    return figure


def drawable(text: str) -> str:
    """Return text that matplotlib draws as it is: it would fail at surrogates, and read pairs of $ as mathematics."""
    return printable(text).replace("$", r"\$")


def _shorten(name: str, length: int) -> str:
    """Keep both ends of a long name, the layer and the parameter."""
    name = printable(name)
    return drawable(name if len(name) <= length else f"{name[: length // 2 - 1]}…{name[-(length - length // 2) :]}")
