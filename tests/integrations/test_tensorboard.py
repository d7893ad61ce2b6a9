"""The scalars and figures that are logged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from blockhess.integrations import tensorboard
from blockhess.integrations.watch import SpectrumMonitor
from tests.helpers.spectra_cases import make_spectra, random_spectra
from tests.integrations.test_watch import LOSS, OPTIONS, examples, noisy_model


class Writer:
    """What log_spectra may use of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[str, tuple[float, int]] = {}
        self.figures: list[str] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert math.isfinite(value)
        self.scalars[tag] = (value, step)

    def add_figure(self, tag: str, figure: Any, step: int) -> None:
        assert figure.axes
        self.figures.append(tag)


def test_log_has_js0_and_every_block() -> None:
    spectra, writer = random_spectra(), Writer()
    tensorboard.log_spectra(writer, spectra, 5)
    assert writer.scalars["blockhess/js0"] == (float(spectra.js0()), 5)
    for name in spectra:
        assert writer.scalars[f"blockhess/lambda_max/{name}"] == (spectra[name].lambda_max, 5)
        assert writer.scalars[f"blockhess/trace/{name}"][0] == pytest.approx(spectra[name].trace)
    assert len(writer.scalars) == 1 + 5 * len(spectra) and not writer.figures


def test_log_of_one_block_and_of_nothing_known() -> None:
    unknown = make_spectra([[[0.0]]], [[[0.0]]], steps=[[0]], nonfinite=[[True]])
    writer = Writer()
    tensorboard.log_spectra(writer, unknown, 0)
    assert writer.scalars == {}


def test_figures_are_logged() -> None:
    pytest.importorskip("matplotlib")
    writer = Writer()
    tensorboard.log_spectra(writer, random_spectra(), 0, figures=True, prefix="H")
    assert writer.figures == ["H/spectra", "H/heatmap"]


def test_a_watch_logs(tmp_path: Path) -> None:
    writer = Writer()
    SpectrumMonitor(examples(8), LOSS, every=1, folder=None, writer=writer, **OPTIONS)(noisy_model(), 3)
    assert writer.scalars["blockhess/js0"][1] == 3
