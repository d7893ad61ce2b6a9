"""docs/theory.md is what bench/results/paper says."""

from __future__ import annotations

from pathlib import Path

import pytest

from blockhess.paper.commands import EXPERIMENTS

ROOT = Path(__file__).parent.parent


@pytest.fixture
def theory_page():
    from bench import theory_page

    return theory_page


def test_measured_parts_are_up_to_date(theory_page) -> None:
    text = theory_page.PAGE.read_text()
    assert theory_page.page(text) == text


def test_results_are_at_the_papers_scale(theory_page) -> None:
    for name in EXPERIMENTS:
        content = theory_page.result(name)
        assert content["quick"] is False and content["environment"]["commit"] != "unknown"
