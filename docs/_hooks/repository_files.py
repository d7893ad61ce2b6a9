"""Add files of the repository outside docs/ to the site where a page links to them.

    ../bench/results/a.png  in docs/theory.md  ->  repository/bench/results/a.png  of the site

So the same link works in the repository and on the site. mkdocs reports links to missing files.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"(?<=\]\()(\.\./[^)\s#]*)")
FOLDER = "repository"


def _repository_path(page: str, link: str) -> str | None:
    """Return the target of a link of the page as a path in the repository, None where it is within docs/."""
    path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page), link))
    return None if path.startswith("docs/") else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to."""
    root = Path(config.docs_dir).parent
    for page in list(files.documentation_pages()):
        for link in LINK.findall(page.content_string):
            path = _repository_path(page.src_uri, link)
            if path and (root / path).is_file() and f"{FOLDER}/{path}" not in files.src_uris:
                files.append(File.generated(config, f"{FOLDER}/{path}", abs_src_path=str(root / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to these files with their paths on the site."""

    def replaced(match: re.Match[str]) -> str:
        path = _repository_path(page.file.src_uri, match[1])
        if path is None or f"{FOLDER}/{path}" not in files.src_uris:
            return match[1]
        return posixpath.relpath(f"{FOLDER}/{path}", posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(replaced, markdown)
