"""Result files that are whole at any moment. Only the standard library is imported."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file so that a process that is killed leaves the old file or the new one, never a part.

    Args:
        path: of the file.
        write: writes the content to the path that it is given.
    """
    part = path.with_name(f"{path.name}.part")
    write(part)
    os.replace(part, path)
