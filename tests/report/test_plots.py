"""plots.py: what the pictures show and say; how they look is for eyes."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blockhess
from blockhess.analysis.axes import Axis
from blockhess.spectra import Spectra
from tests.helpers.spectra_cases import make_spectra, random_spectra

pytest.importorskip("matplotlib")

from blockhess.report import plots
from blockhess.report.figures import plot_js0
from blockhess.report.plots import plot_density, plot_heatmap, plot_models


def texts(figure: Any) -> str:
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def mixed_spectra() -> Spectra:
    """A spread block, a zero one, one element, and one of which nothing is known."""
    return make_spectra(
        [[[-1.0, 0.0, 1e5], [0.0] * 3, [7.0] * 3, [0.0] * 3]],
        [[[0.5, 0.4999, 0.0001], [1.0, 0, 0], [1.0, 0, 0], [0.0] * 3]],
        dims=[100, 50, 1, 9],
        steps=[[3, 1, 1, 0]],
        nonfinite=[[False, False, False, True]],
        model="Net",
    )


@pytest.mark.parametrize("options", [{}, {"share_x": True}, {"sigma": 0.5}, {"sigma": 10.0, "share_x": True}])
def test_every_block_has_a_panel_with_all_its_eigenvalues(options: dict[str, Any]) -> None:
    spectra = mixed_spectra()
    figure = plot_density(spectra, **options)
    assert [panel.get_title(loc="left") for panel in figure.axes[:4]] == list(spectra.names)
    assert len(figure.axes) == (4 if "share_x" in options else 6)  # all blocks, and their color bar
    low, high = spectra.eigenvalue_range()
    for row, panel in enumerate(figure.axes[:3]):
        left, right = panel.get_xlim()
        assert left < low[row] and high[row] < right
        assert panel.get_yscale() == "log"
    # A lone eigenvalue stands as high as its share.
    line = figure.axes[0].lines[-1]
    at_outlier = np.abs(line.get_xdata() - 1e5).argmin()
    assert line.get_ydata()[at_outlier] == pytest.approx(1e-4, rel=0.05)
    assert "not finite" in texts(figure) and "of Net" in texts(figure)


def test_the_caption_states_sigma() -> None:
    spectra = mixed_spectra()
    default = texts(plot_density(spectra))
    assert "smoothed with sigma about range / steps of each block, for plots only" in default
    assert "sigma 0.5" in texts(plot_density(spectra, sigma=0.5))
    assert "sigma 1e+03" in texts(plot_density(spectra, share_x=True))


def test_the_default_sigma_is_what_the_steps_resolve() -> None:
    few, many, fewest = (
        make_spectra([[list(range(m))]], [[[1 / m] * m]], dims=[1000], steps=[[m]]) for m in (30, 200, 4)
    )
    for spectra, relative in ((few, 1 / 30), (many, 0.01), (fewest, 0.05)):
        nodes = spectra.merged[0][0]
        span = float(nodes.max() - nodes.min())
        assert spectra.resolved_sigma().item() == pytest.approx(relative * span)
    complete = make_spectra([[list(range(30))]], [[[1 / 30] * 30]], dims=[30])
    assert complete.resolved_sigma().item() == pytest.approx(0.29)


def test_bands_are_drawn_around_the_curve() -> None:
    from matplotlib.collections import PolyCollection

    spectra = random_spectra(n_probes=3, dims=[50] * 4)
    figure = plot_density(spectra, sigma=0.1)
    assert "95 % bands: dark for the random probes, light for probes and steps" in texts(figure)
    areas = figure.axes[0].findobj(PolyCollection)
    assert len(areas) == 3  # under the curve, total, statistical
    band = spectra.density_band(0.1, blocks=["block0"])
    height = 0.1 * np.sqrt(2 * np.pi)
    for area, upper in zip(areas[1:], (band.total_upper, band.upper)):
        assert area.get_paths()[0].vertices[:, 1].max() == pytest.approx(height * float(upper.max()))
    assert len(plot_density(spectra, sigma=0.1, confidence=None).axes[0].findobj(PolyCollection)) == 1
    assert len(plot_density(random_spectra(n_probes=1), sigma=0.1).axes[0].findobj(PolyCollection)) == 1
    with pytest.raises(ValueError, match="confidence must be between 0 and 1, got 2"):
        plot_density(spectra, confidence=2)


def test_a_block_written_out_has_no_band() -> None:
    from matplotlib.collections import PolyCollection

    model, data = torch.nn.Linear(40, 2), (torch.randn(8, 40), torch.randint(2, (8,)))
    options = {"num_probes": 2, "num_steps": 5, "progress": False}
    spectra = blockhess.spectrum(model, data, torch.nn.CrossEntropyLoss(), **options)
    exact = [spectra.quadrature.is_exact(row) for row in range(len(spectra))]
    assert sorted(exact) == [False, True]
    areas = [len(panel.findobj(PolyCollection)) for panel in plot_density(spectra, axis="linear").axes]
    assert areas == [1 if written_out else 3 for written_out in exact]


def test_ticks_are_no_finer_than_the_picture() -> None:
    def ticks(*nodes: float) -> list[str]:
        spectra = make_spectra([[list(nodes)]], [[[1 / len(nodes)] * len(nodes)]], dims=[100])
        return [label.get_text() for label in plot_density(spectra).axes[0].get_xticklabels()]

    assert ticks(-0.0684, 1.0, 2.04) == ["-0.07", "2"]
    assert ticks(-6.6e-10, 0.1, 0.114) == ["0", "0.11"]
    assert ticks(1.23e-9, 2e-9, 4.56e-9) == ["1.2e-9", "4.6e-9"]
    assert ticks(7.3e-6, 7.3e-6) == ["7.3e-6"]


def test_bands_on_a_normalized_axis() -> None:
    from matplotlib.collections import PolyCollection

    spectra = random_spectra(n_probes=3, dims=[50] * 4)
    figure = plot_density(spectra, axis=Axis("asinh", "radius", 0.1), sigma=0.1)
    assert "divided by the block's spectral radius" in " ".join(texts(figure).split())
    assert len(figure.axes[0].findobj(PolyCollection)) == 3
    band = spectra.density_band(0.1, axis=Axis("asinh", "radius", 0.1), blocks=["block0"])
    upper = figure.axes[0].findobj(PolyCollection)[2].get_paths()[0].vertices[:, 1].max()
    assert upper == pytest.approx(0.1 * np.sqrt(2 * np.pi) * float(band.upper.max()))
    assert len(plot_density(spectra, axis=Axis(normalize="radius")).axes) == 4


def assert_inside(figure: Any) -> None:
    """Nothing sticks out of the picture."""
    box = figure.get_tightbbox()
    assert box.x0 > -0.05 and box.y0 > -0.05
    assert box.x1 < figure.get_figwidth() + 0.05 and box.y1 < figure.get_figheight() + 0.05


@pytest.mark.parametrize("n_blocks", [1, 2, 5, 40])
def test_any_number_of_panels(n_blocks: int) -> None:
    figure = plot_density(random_spectra(n_blocks=n_blocks, model="AModelOfAnUnusuallyLongClassName" * 2))
    assert len(figure.axes) == n_blocks + (2 if n_blocks > 1 else 0)
    if n_blocks < 40:
        figure.draw_without_rendering()
        assert_inside(figure)


def test_blocks_that_are_noise_have_no_curve() -> None:
    spectra = make_spectra(
        [[[-1e-4, 5e-4], [1.0, 2.0], [1.0, 3.0]]] * 2, [[[0.5, 0.5]] * 3] * 2, hvp_error={"block0": 1e-3}
    )
    figure = plot_density(spectra, axis="linear", confidence=None)
    heights = [max(line.get_ydata().max() for line in panel.lines[-1:]) for panel in figure.axes]
    assert heights[0] == 0 and min(heights[1:]) > 0.1
    assert "zero within HVP error" in texts(figure) and "not finite" not in texts(figure)
    (image,) = (image for panel in plot_density(spectra).axes for image in panel.images)
    assert image.get_array().mask[0].all() and not image.get_array().mask[1].all()


def test_chosen_blocks_in_the_given_order() -> None:
    figure = plot_density(random_spectra(), blocks=["block2", "block0"])
    assert [panel.get_title(loc="left") for panel in figure.axes[:2]] == ["block2", "block0"]
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()] == ["block2", "block0"]


def test_all_blocks_share_the_axis_of_their_comparison() -> None:
    spectra = random_spectra(n_blocks=5, dims=[50] * 5, notes=["", "", "", "", "unused"])
    figure = plot_density(spectra)
    axes, js0 = figure.axes[5], spectra.js0()
    assert "gaps and lone peaks may be those of few steps" in " ".join(axes.get_xlabel().split())
    assert f"sigma {js0.sigma:.3g}" in axes.get_xlabel() and f"linear below {js0.scale:.3g}" in axes.get_xlabel()
    (image,) = axes.images
    low, high, bottom, top = image.get_extent()
    assert (bottom, top) == (4.5, -0.5)
    places = axes.get_xticks()
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert low < min(places) and max(places) < high and labels[0] == "0" and places[0] == 0
    for place, label in zip(places[1:], labels[1:]):
        sign, power = label.strip("$").replace("{", "").replace("}", "").split("10^")
        assert js0.scale * np.sinh(place) == pytest.approx(float(f"{sign}1e{power}"))
    values = image.get_array()
    points = np.linspace(low, high, values.shape[1])
    _, expected = spectra.density(js0.sigma, points, Axis("asinh", scale=js0.scale))
    expected = expected.numpy() * js0.sigma * np.sqrt(2 * np.pi)
    drawn = ~np.ma.getmaskarray(np.ma.masked_invalid(values))
    assert np.asarray(values)[drawn] == pytest.approx(expected[drawn]) and (expected[~drawn] < 0.1 / 50).all()


def test_exact_spectra_have_no_gaps_of_few_steps() -> None:
    figure = plot_density(make_spectra([[[1.0, 2.0], [3.0, 4.0]]], [[[0.5, 0.5]] * 2]))
    (axes,) = (axes for axes in figure.axes if axes.images)
    assert "eigenvalues of all blocks" in axes.get_xlabel() and "few steps" not in axes.get_xlabel()


@pytest.mark.parametrize("factor", [1e-110, 1e110])
def test_ticks_of_the_shared_axis_beyond_float32(factor: float) -> None:
    def labels(factor: float) -> list[str]:
        nodes = [[[-2.0 * factor, factor], [50.0 * factor, 3e3 * factor]]]
        figure = plot_density(make_spectra(nodes, [[[0.5, 0.5]] * 2], dims=[20, 20]))
        shared = next(axes for axes in figure.axes if axes.images)
        return [label.get_text() for label in shared.get_xticklabels()]

    power = round(math.log10(factor))
    assert f"$10^{{{3 + power}}}$" in labels(factor) and len(labels(factor)) == len(labels(1.0))


def test_heatmap_shows_the_matrix() -> None:
    spectra = random_spectra(batchnorm="eval", model="Net")
    figure = plot_heatmap(spectra)
    (axes,) = figure.axes
    (bar,) = axes.child_axes
    (image,) = axes.images
    assert np.array_equal(image.get_array(), spectra.js_matrix().numpy())
    assert image.get_clim() == (0.0, 1.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == list(spectra.names)
    assert bar.get_ylabel() == "Jensen-Shannon distance, base 2"
    shown = " ".join(texts(figure).split())
    assert str(spectra.js0()) in shown and "pairs from" in shown and "of Net" in shown


def test_heatmap_of_divergences() -> None:
    spectra = random_spectra()
    figure = plot_heatmap(spectra, kind="divergence", sigma=0.1, base=10.0, blocks=["block0", "block3", "block1"])
    matrix = spectra.js_matrix(kind="divergence", sigma=0.1, base=10.0, blocks=["block0", "block3", "block1"])
    (image,) = figure.axes[0].images
    assert np.array_equal(image.get_array(), matrix.numpy())
    assert image.get_clim()[1] == pytest.approx(np.log10(2))
    assert "base 10" in figure.axes[0].child_axes[0].get_ylabel()


def test_heatmap_of_equal_spectra_and_a_chosen_range() -> None:
    equal = make_spectra([[[0.0], [0.0]]], [[[1.0], [1.0]]])
    assert plot_heatmap(equal, blocks=equal.names).axes[0].images[0].get_clim() == (0.0, 1.0)
    assert plot_heatmap(equal, blocks=equal.names, vmax=0.1).axes[0].images[0].get_clim() == (0.0, 0.1)
    with pytest.raises(ValueError, match="plot_heatmap: vmax must be positive, got 0"):
        plot_heatmap(equal, blocks=equal.names, vmax=0)


def overlaps(figure: Any, which: str) -> bool:
    """Whether neighboring tick labels of the heat map overlap, once drawn."""
    figure.draw_without_rendering()
    axes = figure.axes[0]
    boxes = [label.get_window_extent() for label in getattr(axes, f"get_{which}ticklabels")()]
    if which == "x":
        return any(a.x1 > b.x0 for a, b in itertools.pairwise(boxes))
    return any(b.y1 > a.y0 for a, b in itertools.pairwise(boxes))


@pytest.mark.parametrize(("n_blocks", "most_labels"), [(3, 150), (14, 150), (40, 150), (110, 150), (65, 20)])
def test_heatmap_labels_stay_readable(n_blocks: int, most_labels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "MOST_LABELS", most_labels)
    names = [f"transformer.h.{i}.attn.c_attn.weight" for i in range(n_blocks)]
    figure = plot_heatmap(random_spectra(n_probes=1, n_blocks=n_blocks, m=2, names=names), sigma=0.1, blocks=names)
    assert not overlaps(figure, "x") and not overlaps(figure, "y")
    labels = figure.axes[0].get_yticklabels()
    assert len(labels) == min(n_blocks, 17) if most_labels == 20 else len(labels) == n_blocks
    assert labels[0].get_fontsize() >= 4
    assert_inside(figure)


def test_saves_to_the_path(tmp_path: Path) -> None:
    spectra = random_spectra()
    for name, start in (("a.png", b"\x89PNG"), ("b.pdf", b"%PDF"), ("c.svg", b"<?xml")):
        spectra.plot(tmp_path / name, blocks=["block0"])
        assert (tmp_path / name).read_bytes().startswith(start)
    pdf, svg = ((tmp_path / name).read_bytes() for name in ("b.pdf", "c.svg"))
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # TrueType, embedded
    assert b"<text" not in svg and b"<path" in svg  # no font is needed to show it
    figure = spectra.heatmap(str(tmp_path / "h.png"), kind="divergence")
    assert (tmp_path / "h.png").exists() and figure.axes
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.pdf", "c.svg", "h.png"]


def test_refusals(tmp_path: Path) -> None:
    spectra = random_spectra()
    for path in ("x", "x.xyz"):
        with pytest.raises(ValueError, match=r"plot: path must end in one of .*\.png.*, got .*x"):
            spectra.heatmap(tmp_path / path)
    with pytest.raises(ValueError, match=r"save: cannot write .*missing"):
        spectra.plot(tmp_path / "missing" / "x.png", blocks=["block0"])
    with pytest.raises(ValueError, match="blocks must name at least one, got none"):
        spectra.plot(blocks=[])
    with pytest.raises(ValueError, match="no block is called 'x'"):
        spectra.plot(blocks=["x"])
    with pytest.raises(ValueError, match="plot_density: sigma must be"):
        spectra.plot(sigma=0.0)


def test_neither_pyplot_nor_matplotlib_unless_drawn() -> None:
    code = (
        "import sys\n"
        "from tests.helpers.spectra_cases import random_spectra\n"
        "spectra = random_spectra()\n"
        "assert 'matplotlib' not in sys.modules\n"
        "spectra.heatmap()\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_a_missing_matplotlib_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "blockhess\[plot\]"'):
        random_spectra().plot()


@pytest.mark.parametrize("name", ["a\udcff", "b\x1b[2J", r"$\frac$"])
def test_names_that_matplotlib_would_not_draw(name: str) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    spectra = random_spectra(n_probes=2, n_blocks=2, names=[name, "other"])
    figures = plot_density(spectra), plot_heatmap(spectra), plot_models({name: spectra}), plot_js0([spectra], [name])
    for figure in figures:
        FigureCanvasAgg(figure).draw()
