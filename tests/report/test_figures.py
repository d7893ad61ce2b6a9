"""Figures for a paper: their sizes, letters and fonts, and that they show what the results hold."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import pytest

from blockhess.cli.main import main
from tests.helpers.spectra_cases import make_spectra, random_spectra

pytest.importorskip("matplotlib")

from matplotlib import rc_context
from matplotlib.text import Text
from PIL import Image

from blockhess.report import figures
from blockhess.report.plots import plot_density, plot_heatmap


def test_the_files_of_a_result_and_of_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(random_spectra(seed=i, step=i).save(tmp_path / f"step{i}.npz")) for i in range(2)]
    assert main(["report", *names, "--figures", "pdf"]) == 0
    found = sorted(path.name for path in tmp_path.glob("*.pdf"))
    assert found == ["step1_heatmap.pdf", "step1_js0.pdf", "step1_spectra.pdf"]
    told = capsys.readouterr().out
    assert all(name in told for name in found)
    for name in found:
        content = (tmp_path / name).read_bytes()
        streams = re.findall(rb"stream\r?\n(.*?)\r?\nendstream", content, flags=re.DOTALL)
        assert b"/FontFile2" in content and b"/Type3" not in content and len(streams) > 2
        assert any(b"BT" in zlib.decompress(s) for s in streams if s[:1] == b"x")  # text, not outlines
    one = make_spectra([[[1.0, 2.0]]], [[[0.5, 0.5]]])
    assert [path.name for path in figures.write([one], tmp_path / "one", "svg", ["one"])] == ["one_spectra.svg"]


@pytest.mark.parametrize("n_blocks", [1, 3, pytest.param(30, marks=pytest.mark.slow)])
def test_they_fit_a_journals_columns(n_blocks: int, tmp_path: Path) -> None:
    spectra = random_spectra(
        n_blocks=n_blocks, n_probes=2, names=[f"layers.{i}.attention.weight" for i in range(n_blocks)]
    )
    paths = figures.write([spectra], tmp_path / "x", "png", ["x"])
    widths = [round(Image.open(path).width / 600, 2) for path in paths]
    assert widths == [figures.DOUBLE, figures.MIDDLE][: len(paths)] and len(paths) == (1 if n_blocks == 1 else 2)
    assert Image.open(paths[0]).height / 600 < 9.5  # a page
    with rc_context(figures.STYLE):
        made = [plot_density(spectra, figures.shown(spectra), width=figures.SINGLE)]
        made += [plot_heatmap(spectra, width=figures.MIDDLE)] if n_blocks > 1 else []
    for figure in made:
        assert figure.get_suptitle() == ""
        sizes = [text.get_fontsize() for text in figure.findobj(Text) if text.get_text()]
        assert min(sizes) >= 5.5 and max(sizes) <= 10
    assert plot_density(spectra, figures.shown(spectra)).get_suptitle()


@pytest.mark.parametrize("width", [figures.SINGLE, figures.MIDDLE, figures.DOUBLE])
@pytest.mark.parametrize("name", ["b{}", "transformer.encoder.layers.{}.attention.self.query.weight"])
@pytest.mark.parametrize("n_blocks", [3, 30])
def test_no_text_of_a_heat_map_is_cut_or_covered(n_blocks: int, name: str, width: float) -> None:
    spectra = random_spectra(n_blocks=n_blocks, n_probes=2, names=[name.format(i) for i in range(n_blocks)])
    with rc_context(figures.STYLE):
        figure = plot_heatmap(spectra, width=width)
        figure.draw_without_rendering()
    whole, axes = figure.bbox, figure.axes[0]
    for text in filter(Text.get_text, figure.findobj(Text)):
        box, margin = text.get_window_extent(), 0.02 * figure.dpi
        assert box.x0 > -margin and box.y0 > -margin, text
        assert box.x1 < whole.x1 + margin and box.y1 < whole.y1 + margin, text
    (bar,) = axes.child_axes
    assert bar.get_window_extent().y1 < axes.get_window_extent().y1  # below the caption
    assert axes.get_window_extent().width > 0.3 * whole.width


def test_the_blocks_of_one_page() -> None:
    few, many = random_spectra(n_blocks=5), random_spectra(n_blocks=60)
    assert figures.shown(few) == list(few.names)
    names = figures.shown(many)
    assert len(names) == figures.MOST_PANELS and names == sorted(set(names), key=many.names.index)
    assert names[0] == many.names[0] and many.names.index(names[-1]) > 55


def test_js0_over_checkpoints_is_js0() -> None:
    results = [random_spectra(seed=i, step=10 * i) for i in range(3)]
    axes = figures.plot_js0(results, ["a", "b", "c"]).axes[0]
    first = axes.lines[0]
    assert list(first.get_xdata()) == [0, 10, 20] and axes.get_xlabel() == "training step"
    assert list(first.get_ydata()) == pytest.approx([spectra.js0().value for spectra in results])
    assert len(axes.lines) == 3 and not any(line.get_clip_on() for line in axes.lines)
    axes = figures.plot_js0([random_spectra(), random_spectra(seed=1)], ["a", "b"]).axes[0]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["a", "b"]


def test_the_legend_of_js0_covers_nothing() -> None:
    with rc_context(figures.STYLE):
        figure = figures.plot_js0([random_spectra(), random_spectra(seed=1)], ["a", "b"])
        figure.draw_without_rendering()
    legend, axes = figure.legends[0].get_window_extent(), figure.axes[0]
    assert not legend.overlaps(axes.yaxis.label.get_window_extent())
    assert not legend.overlaps(axes.get_window_extent())


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(random_spectra().save(tmp_path / "a.npz"))
    assert main(["report", file, "--figures", "docx"]) == 2
    assert "figures: format must be" in capsys.readouterr().err and not list(tmp_path.glob("*.docx"))
    with pytest.raises(ValueError, match="cannot write"):
        figures.write([random_spectra()], tmp_path / "missing" / "x", "pdf", ["x"])
