"""The notebooks run from the first cell to the last, and say what is kept in them, but for numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")
pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from tests.helpers.newcomer import words  # noqa: E402
from tests.helpers.notebooks import NOTEBOOKS, executed  # noqa: E402


def told(notebook: nbformat.NotebookNode) -> list[str]:
    """Of every output its words; "picture" for a picture."""
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    texts = [
        "picture" if "image/png" in output.get("data", {}) else output.get("text") or output["data"]["text/plain"]
        for output in outputs
    ]
    return [words(text) for text in texts]


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["gpt2_heads", "quick_start", "resnet_batchnorm"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_says_what_it_says(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept = nbformat.read(path, as_version=4)
    assert sum(cell.cell_type == "code" for cell in kept.cells) <= 8
    assert told(kept).count("picture") >= 2
    assert told(executed(path, str(tmp_path))) == told(kept)
