"""The command line of a benchmark whose result is kept: measured or read again, printed, written."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def arguments(description: str | None, quick: str) -> argparse.ArgumentParser:
    """A parser of --json, --text, --quick and --show; quick says what --quick runs."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="write everything measured to this file")
    parser.add_argument("--text", type=Path, help="also write the tables to this file")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--show", type=Path, metavar="JSON", help="measure nothing: what a file of --json holds")
    return parser


def result_of(options: argparse.Namespace, measure: Callable[[bool], dict[str, Any]]) -> dict[str, Any]:
    """What is measured, or was kept."""
    return json.loads(options.show.read_text()) if options.show else measure(options.quick)  # type: ignore[no-any-return]


def tell(options: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Prints the text, and writes what was asked for."""
    print(text)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.text:
        options.text.write_text(text + "\n")
