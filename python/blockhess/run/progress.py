"""A progress bar with an estimate of the time left, silent for jobs of a few seconds.

a terminal, a notebook     one line that is written over
a log file, a pipe         a new line now and then
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


def check_progress(enabled: bool | str) -> None:
    """Refuse what is neither True, False nor "auto".

    Raises:
        ValueError: it is something else.
    """
    if enabled not in (True, False, "auto"):
        raise ValueError(f"spectrum: progress must be True, False or 'auto', got {enabled!r}")


@contextmanager
def progress_bar(total: int, unit: str, enabled: bool | str = "auto") -> Iterator[Callable[[], object]]:
    """Show on stderr how many of `total` units are done.

    Args:
        total: the most units there can be; fewer may be needed.
        unit: what is counted.
        enabled: True, False, or "auto": where tqdm is installed.

    Yields:
        A function to call after every unit.

    Raises:
        ImportError: `enabled` is True and tqdm is missing.
        ValueError: another `enabled`.
    """
    check_progress(enabled)
    try:
        from tqdm import tqdm
    except ImportError:
        if enabled is True:
            raise ImportError('a progress bar needs tqdm: pip install "blockhess[cli]"') from None
        enabled = False
    if not enabled:
        yield lambda: None
        return
    # Of a notebook's kernel, no terminal, whose output is shown as on one.
    moving = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel.")
    where = {"file": sys.stderr, "mininterval": 0.5} if moving else {"file": _LogLines(), "mininterval": 10.0}
    with tqdm(total=total, unit=unit, delay=3, dynamic_ncols=True, **where) as bar:
        yield bar.update
        bar.total = bar.n


class _LogLines:
    """stderr, where each state of the bar takes a line of its own."""

    def write(self, text: str) -> None:
        if line := text.strip():
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
