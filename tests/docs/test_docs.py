"""The documentation is as it says: its Python examples and its commands run as they stand; newcomer.py follows them."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from blockhess.cli.config import load_config
from tests.helpers.newcomer import COMMANDS, follow, needed, parts

DOCS = Path(__file__).parents[2] / "docs"
LANGUAGES = {"python", "toml", "text", *COMMANDS}


def blocks(page: Path) -> list[str]:
    found = list(parts(page))
    assert {language for language, _ in found} <= LANGUAGES, f"{page}: another language, or a fence that does not close"
    return [text for language, text in found if language == "python"]


PAGES = {str(p.relative_to(DOCS)): blocks(p) for p in sorted(DOCS.rglob("*.md"))}


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_as_it_says(page, tmp_path, monkeypatch, passed_over):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    passed_over[page] = follow(DOCS / page).passed_over


def test_every_block_is_counted():
    counts = Counter(
        "always" if (what := needed(block)) is None else what or "never" for page in PAGES.values() for block in page
    )
    optional = {"accelerate": 1, "lightning": 1, "pyhessian": 1, "hessian_eigenthings": 1, "curvlinops": 2}
    assert counts == {"always": 46, "never": 2} | optional


def test_the_configuration_is_accepted(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", (DOCS / "howto/resume.md").read_text(), flags=re.DOTALL)
    (tmp_path / "job.toml").write_text(text)
    assert load_config(tmp_path / "job.toml").arguments(())["num_steps"] == 20
