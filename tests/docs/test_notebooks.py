"""The notebooks run from the first cell to the last, and print what is stored in them, apart from numbers."""

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


def printed(notebook: nbformat.NotebookNode) -> list[str]:
    """Return the text of every output without its numbers; "picture" for a picture.

    Streams that follow each other are one: how they are cut depends on the time.
    """
    texts: list[str] = []
    in_stream = False
    for output in (output for cell in notebook.cells if cell.cell_type == "code" for output in [None, *cell.outputs]):
        if output is None:  # a new cell
            in_stream = False
        elif "text" in output:
            texts += [] if in_stream else [""]
            texts[-1] += output["text"]
            in_stream = True
        else:
            texts.append("picture" if "image/png" in output["data"] else output["data"]["text/plain"])
            in_stream = False
    return [words(text) for text in texts]


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["gpt2_heads", "quick_start", "resnet_batchnorm"]


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, id=p.stem, marks=[] if p.stem == "quick_start" else [pytest.mark.slow]) for p in NOTEBOOKS],
)
def test_a_notebook_prints_what_is_stored_in_it(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept = nbformat.read(path, as_version=4)
    assert sum(cell.cell_type == "code" for cell in kept.cells) <= 8
    assert printed(kept).count("picture") >= 2
    assert printed(executed(path, str(tmp_path))) == printed(kept)
