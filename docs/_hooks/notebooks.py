"""Make a page notebooks/NAME.md of every docs/notebooks/NAME.ipynb, with its stored outputs.

Nothing is executed here. The site also contains the .ipynb, and each page links to it.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

DOWNLOAD = "[Open it in Jupyter]({name}.ipynb){{ .md-button download }}"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and its pictures for every notebook."""
    for path in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        pictures: dict[str, bytes] = {}
        cells = json.loads(path.read_text())["cells"]
        parts = [part for number, cell in enumerate(cells) for part in _cell(cell, f"{path.stem}_{number}", pictures)]
        parts.insert(1, DOWNLOAD.format(name=path.stem))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content="\n\n".join(parts)))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def _cell(cell: dict[str, Any], stem: str, pictures: dict[str, bytes]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    parts = [_fence(source, "python")]
    for number, output in enumerate(cell["outputs"]):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}_{number}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            parts.append(f"![What the code above draws]({name})")
        else:
            parts.append(_fence("".join(output.get("text") or data["text/plain"]).rstrip("\n"), "text"))
    return parts


def _fence(text: str, language: str) -> str:
    return f"```{language}\n{text}\n```"
