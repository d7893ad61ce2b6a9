"""A progress bar with an estimate of the time left, hidden during the first seconds.

terminal, notebook     one line, updated in place
log file, pipe         a new line every few seconds
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def check_progress(enabled: bool | str) -> None:
    """Raise ValueError unless `enabled` is True, False or "auto"."""
    if enabled not in (True, False, "auto"):
        raise ValueError(f"spectrum: progress must be True, False or 'auto', got {enabled!r}")


@contextmanager
def progress_bar(total: int, unit: str, enabled: bool | str = "auto") -> Iterator[Callable[[], object]]:
    """Show the number of finished items on stderr.

    Args:
        total: upper limit of the number of items.
        unit: name of an item.
        enabled: True, False, or "auto" for True if tqdm is installed.

    Yields:
        A function to call after every item.
    """
    check_progress(enabled)
    try:
        from tqdm import tqdm
    except ImportError:
        if enabled is True:
            raise ImportError(
                'spectrum: progress must be "auto" or False without tqdm, got True; type: pip install "blockhess[cli]"'
            ) from None
        enabled = False
    if not enabled:
        yield lambda: None
        return
    # Output of a notebook kernel, which is not a terminal, is displayed as on one.
    moving = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
    where = {"file": sys.stderr, "mininterval": 0.5} if moving else {"file": _LogLines(), "mininterval": 10.0}
    with tqdm(total=total, unit=unit, delay=3, dynamic_ncols=True, **where) as bar:
        yield bar.update
        bar.total = bar.n


class _LogLines:
    """Writes every state of the bar to a line of its own on stderr."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
