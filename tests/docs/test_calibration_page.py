"""docs/calibration.md and the shipped calibration are what docs/results/paper says."""

from __future__ import annotations

from docs._generate import calibration_page


def test_measured_parts_are_up_to_date() -> None:
    text = calibration_page.PAGE.read_text()
    assert calibration_page.page(text) == text


def test_the_shipped_calibration_is_the_committed_one() -> None:
    content = calibration_page.result("calibrate")
    assert content["quick"] is False
    assert calibration_page.calibration(content).to_json() == calibration_page.SHIPPED.read_text()
