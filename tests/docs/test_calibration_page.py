"""docs/calibration.md is what docs/results/paper says."""

from __future__ import annotations

from docs._generate import calibration_page


def test_measured_parts_are_up_to_date() -> None:
    assert calibration_page.result("calibrate")["quick"] is False
    text = calibration_page.PAGE.read_text()
    assert calibration_page.page(text) == text
