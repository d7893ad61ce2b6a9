"""The Python examples of the documentation run as they stand; those of the README are run by test_readme.py.

A page's blocks run in order, in one namespace and one empty folder. A first line tells of a block that does not:
`# not run here: REASON` never does, `# needs: MODULE` does where that module is installed.
"""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from blockhess.runs.config import load_config

DOCS = Path(__file__).parent.parent / "docs"
FENCE = re.compile(r"^ *```(.*?)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)
LANGUAGES = {"python", "sh", "bash", "toml", "text"}
NOT_RUN, NEEDS = "# not run here: ", "# needs: "


def blocks(page: Path) -> list[str]:
    found = FENCE.findall(page.read_text())
    assert {language for language, _ in found} <= LANGUAGES, f"{page}: another language, or a fence that does not close"
    return [text for language, text in found if language == "python"]


PAGES = {str(p.relative_to(DOCS)): blocks(p) for p in sorted(DOCS.rglob("*.md")) if blocks(p)}


def needed(block: str) -> str | None:
    """What a block needs beyond the package itself, "" for one that never runs, None for one that always does."""
    if block.startswith(NOT_RUN):
        return ""
    return block.split("\n", 1)[0].removeprefix(NEEDS).strip() if block.startswith(NEEDS) else None


@pytest.mark.parametrize("page", PAGES)
def test_examples_run(page, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, block in enumerate(PAGES[page]):
        module = needed(block)
        if module is None or (module and importlib.util.find_spec(module)):
            exec(compile(block, f"{page}, block {number}", "exec"), names)


def test_every_block_is_counted():
    counts = Counter(
        "always" if (what := needed(block)) is None else what or "never" for page in PAGES.values() for block in page
    )
    optional = {"accelerate": 1, "lightning": 1, "pyhessian": 1, "hessian_eigenthings": 1, "curvlinops": 2}
    assert counts == {"always": 46, "never": 2} | optional


def test_the_configuration_is_accepted(tmp_path):
    (text,) = re.findall(r"```toml\n(.*?)```", (DOCS / "howto/resume.md").read_text(), flags=re.DOTALL)
    (tmp_path / "job.toml").write_text(text)
    assert load_config(tmp_path / "job.toml").arguments(())["num_steps"] == 50
