"""docs/findings.md is what bench/results says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from blockhess.paper.commands import NETWORK_EXPERIMENTS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def findings_page(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *sys.path])
    import findings_page

    return findings_page


def test_measured_parts_are_up_to_date(findings_page) -> None:
    text = findings_page.PAGE.read_text()
    assert findings_page.page(text) == text


def test_results_are_of_full_runs(findings_page) -> None:
    for name in NETWORK_EXPERIMENTS:
        content = findings_page.result(name)
        assert content["quick"] is False and content["environment"]["commit"] != "unknown"


def test_words_follow_from_the_intervals(findings_page) -> None:
    from blockhess.divergence import JS0

    def found(low: float, high: float) -> JS0:
        return JS0(0.5, "distance", 2.0, "linear", 0.1, ("a", "b"), interval=(low, high, 0.95))

    assert findings_page.compared(found(0.4, 0.5), found(0.1, 0.3)) == "more"
    assert findings_page.compared(found(0.1, 0.3), found(0.4, 0.5)) == "less"
    assert findings_page.compared(found(0.1, 0.45), found(0.4, 0.5)) == "undecided"
