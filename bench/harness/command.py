"""The command line of the benchmarks that measure one result: measure or load it, print its tables, write files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.harness.files import write_whole

Result = dict[str, Any]


def run(
    description: str | None,
    measure: Callable[[bool], Result],
    text: Callable[[Result], str],
    *,
    quick: str,
    plot: Callable[[Result, Path], None] | None = None,
) -> None:
    """Parse the command line, measure a result on one thread or load one, print its text and write the files.

    Args:
        description: Docstring of the module; its first line is the help.
        measure: Takes whether to measure at quick size, and returns the result.
        text: Formats the tables of a result.
        quick: Help of ``--quick``.
        plot: Draws a result into an image file; adds the option ``--plot``.
    """
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the result to this file")
    parser.add_argument("--text", type=Path, metavar="PATH", help="write the tables to this file")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--show", type=Path, metavar="JSON", help="measure nothing; load the result of this file")
    if plot:
        parser.add_argument("--plot", type=Path, metavar="PATH", help="draw the result into this image file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = json.loads(options.show.read_text()) if options.show else measure(options.quick)
    print(text(result))
    if options.json:
        write_json(result, options.json)
    if options.text:
        options.text.write_text(text(result) + "\n")
    if plot and options.plot:
        plot(result, options.plot)


def write_json(result: Result, path: Path) -> None:
    """Write a result as JSON, see `write_whole`."""
    write_whole(path, lambda part: part.write_text(json.dumps(result, indent=1) + "\n"))
