"""docs/calibration.md and the shipped calibration are what bench/results/paper says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def calibration_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    import calibration_page

    return calibration_page


def test_measured_parts_are_up_to_date(calibration_page) -> None:
    text = calibration_page.PAGE.read_text()
    assert calibration_page.page(text) == text


def test_the_shipped_calibration_is_the_committed_one(calibration_page) -> None:
    content = calibration_page.result("calibrate")
    assert content["quick"] is False
    assert calibration_page.calibration(content).to_json() == calibration_page.SHIPPED.read_text()
