"""docs/theory.md is what docs/results/paper says."""

from __future__ import annotations

import pytest

from blockhess_paper.commands import EXPERIMENTS


@pytest.fixture
def theory_page():
    from docs._generate import theory_page

    return theory_page


def test_measured_parts_are_up_to_date(theory_page) -> None:
    text = theory_page.PAGE.read_text()
    assert theory_page.page(text) == text


def test_results_are_at_the_papers_scale(theory_page) -> None:
    for name in EXPERIMENTS:
        content = theory_page.result(name)
        assert content["quick"] is False and content["environment"]["commit"] != "unknown"
