"""What the options of all commands share: JSON in place of text, and values that the shell completes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def text_on_stderr(as_json: bool) -> AbstractContextManager[Any]:
    """Where JSON is asked for, what is printed meanwhile goes to stderr, so that stdout holds JSON alone."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def completed(values: Sequence[str]) -> Callable[[str], list[str]]:
    """Return what offers these values to the shell, as typer.Option's `autocompletion`.

    Example:
        >>> completed(("auto", "exact", "ggn"))("e")
        ['exact']
    """
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
