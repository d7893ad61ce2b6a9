"""docs/reliability.md is what bench/results/reliability says, and the tests it names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from docs._generate import reliability_page
from tests import ROOT


def test_measured_parts_are_up_to_date() -> None:
    text = reliability_page.PAGE.read_text()
    assert reliability_page.page(text) == text


def test_missing_parts_are_said_to_be_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(reliability_page, "RESULTS", tmp_path)
    text = reliability_page.page(reliability_page.PAGE.read_text())
    assert text.count("**Not measured yet:**") == len(reliability_page.PARTS)
    (tmp_path / "crash.json").write_text('{"counts": {"kills": 200}, "lost_runs": 0, "machine": {"cpu": "x"}}')
    assert "| counts kills | 200 |\n| lost runs | 0 |\n" in reliability_page.page(text)


def test_named_tests_exist() -> None:
    named = re.findall(r"(test_\w+\.py)::(\w+)", reliability_page.PAGE.read_text())
    assert len(named) > 10
    for file, test in named:
        found = [path.read_text() for path in (ROOT / "tests").rglob(file)]
        assert any(f"def {test}(" in text for text in found), f"{file}::{test}"
