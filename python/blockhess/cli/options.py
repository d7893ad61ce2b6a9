"""What the options of several commands share: `--json`, and values that the shell completes."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def text_on_stderr(as_json: bool) -> AbstractContextManager[Any]:
    """Return a context that, with JSON, redirects printed text to stderr, so that stdout holds only JSON."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def completed(values: Sequence[str]) -> Callable[[str], list[str]]:
    """Return a function that completes these values, for the `autocompletion` of typer.Option.

    Example:
        >>> completed(("auto", "exact", "ggn"))("e")
        ['exact']
    """
    return lambda incomplete: [value for value in values if value.startswith(incomplete)]
