"""docs/findings.md is what bench/results says."""

from __future__ import annotations

from bench import findings_page
from blockhess.paper.commands import NETWORK_EXPERIMENTS


def test_measured_parts_are_up_to_date() -> None:
    text = findings_page.PAGE.read_text()
    assert findings_page.page(text) == text


def test_results_are_of_full_runs() -> None:
    for name in NETWORK_EXPERIMENTS:
        content = findings_page.result(name)
        assert content["quick"] is False and content["environment"]["commit"] != "unknown"


def test_words_follow_from_the_intervals() -> None:
    from blockhess.divergence import JS0

    def found(low: float, high: float) -> JS0:
        return JS0(0.5, "distance", 2.0, "linear", 0.1, ("a", "b"), interval=(low, high, 0.95))

    assert findings_page.compared(found(0.4, 0.5), found(0.1, 0.3)) == "more"
    assert findings_page.compared(found(0.1, 0.3), found(0.4, 0.5)) == "less"
    assert findings_page.compared(found(0.1, 0.45), found(0.4, 0.5)) == "undecided"
