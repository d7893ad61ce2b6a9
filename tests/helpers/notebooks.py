"""Run the notebooks of docs/notebooks, each in a kernel of its own, and store what they print and draw:
`python -m tests.helpers.notebooks`, or `make notebooks`.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def executed(path: Path, folder: str) -> nbformat.NotebookNode:
    """Return the notebook with the outputs of a new run; files that it writes go into the folder.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings of other packages, and progress bars
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata.pop("language_info")  # the version of this Python
    return notebook


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    for path in NOTEBOOKS:
        print(path.name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(path, folder), path)
