"""The examples and commands of the documentation run and print what the pages show; newcomer.py runs them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.newcomer import COMMANDS, follow, needed, parts

DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = {"python", "text", *COMMANDS}
SLOW = {
    "coming_from.md", "engines.md", "howto/checkpoints.md", "howto/heads.md", "howto/monitor.md", "howto/report.md",
    "howto/resume.md", "index.md", "theory.md",
}  # fmt: skip


def blocks(page: Path) -> list[str]:
    found = list(parts(page))
    assert {language for language, _ in found} <= LANGUAGES, f"{page}: another language, or a fence that does not close"
    return [text for language, text in found if language == "python"]


PAGES = {str(p.relative_to(DOCS)): blocks(p) for p in sorted(DOCS.rglob("*.md"))}


@pytest.mark.parametrize("page", [pytest.param(p, marks=[pytest.mark.slow] if p in SLOW else []) for p in PAGES])
def test_a_page_is_as_it_says(page, tmp_path, monkeypatch, passed_over):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    passed_over[page] = follow(DOCS / page).passed_over
    if page == "index.md":
        assert (tmp_path / "js.png").stat().st_size > 10_000
    if page == "howto/monitor.md":
        assert sorted(path.name for path in (tmp_path / "spectra").iterdir()) == [
            *(f"step_{step:08d}.npz" for step in (0, 50)), "step_00000100.html", "step_00000100.npz"
        ]  # fmt: skip


def test_every_block_is_counted():
    counts = Counter(
        "always" if (what := needed(block)) is None else what or "never" for page in PAGES.values() for block in page
    )
    optional = {"accelerate": 1, "lightning": 1, "pyhessian": 1, "hessian_eigenthings": 1, "curvlinops": 2}
    assert counts == {"always": 55, "never": 3} | optional
