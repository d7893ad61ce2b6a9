"""Self-contained HTML page of a result, or of the checkpoints of a training run.

The page makes no network requests, and its content security policy forbids them. Contents of result files, such as
block names, are embedded as JSON that cannot end its script element, and are displayed as text.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from blockhess.report.html.contents import page_contents
from blockhess.report.rows import finite
from blockhess.results.data import SpectraData
from blockhess.results.files import check_writable, write_text

# In order of dependence.
SCRIPTS = ("density.js", "figure.js", "spectra.js", "heatmap.js", "evolution.js", "table.js", "main.js")


def write(results: Sequence[SpectraData], path: str | PathLike[str], labels: Sequence[str] | None = None) -> Path:
    """Write the page of one result, or of several checkpoints of a model.

    Args:
        results: at least one, in order.
        path: file of the page, overwritten if it exists.
        labels: names of the results; None numbers them.

    Returns:
        path.

    Raises:
        ValueError: there is no result, the numbers of labels and results differ, the results have different blocks, or
            the file cannot be written.

    Example:
        >>> write([spectra], "report.html")
    """
    check_writable(path)  # before the work
    return write_text(render(page_contents(results, labels)), path)


def render(page: dict[str, Any]) -> str:
    """Return the HTML of the page with these contents: see contents.page_contents."""
    style = _asset("page.css")
    script = '"use strict";\n(() => {\n' + "\n".join(map(_asset, SCRIPTS)) + "})();\n"
    data = json.dumps(finite(page), allow_nan=False, separators=(",", ":"))
    parts = {
        "STYLE": style,
        "SCRIPT": script,
        "STYLE_HASH": _hash(style),
        "SCRIPT_HASH": _hash(script),
        # Without "<" there is no </script>, <!-- or <script.
        "DATA": data.replace("<", "\\u003c"),
    }
    pieces = _asset("page.html").split("%%")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _asset(name: str) -> str:
    return (files(__name__) / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
