"""Run experiments one after the other; print each result and write its files as soon as it is finished."""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch

import blockhess
from blockhess._text import format_table, printable
from blockhess.problem.batches import known_device
from blockhess.results.files import writable_folder
from blockhess_paper.results import Result
from blockhess_paper.theory import block_spectra


def run_experiments(
    modules: Mapping[str, str],
    out: str | PathLike[str],
    *,
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    **options: Any,
) -> list[Result]:
    """Run experiments, print their results and write their files.

    Args:
        modules: name -> MODULE of this package, whose `run` returns a Result, or MODULE:FUNCTION.
        out: folder for the files; created if missing.
        seed, quick: passed to every experiment.
        device, options: passed, like the folder, to the experiments that take them.

    Raises:
        ValueError: the folder is not writable, or there is no such device.
        ImportError: matplotlib is missing.

    Example:
        >>> results = run_experiments({"prop2": "theory.proposition2"}, "blockhess-paper", quick=True)
    """
    known_device(device, "paper")
    folder = writable_folder(out)
    results = []
    for position, (name, target) in enumerate(modules.items(), 1):
        module, _, function = target.partition(":")
        run = getattr(importlib.import_module(f"blockhess_paper.{module}"), function or "run")
        offered = {**options, "folder": folder, "device": device}
        taken = {key: value for key, value in offered.items() if key in inspect.signature(run).parameters}
        print(f"[{position}/{len(modules)}] {name}", flush=True)
        start, cpu_start = time.perf_counter(), time.process_time()
        result: Result = run(seed=seed, quick=quick, **taken)
        seconds = time.perf_counter() - start
        written = result.write(
            folder,
            seconds=seconds,
            cpu_seconds=time.process_time() - cpu_start,
            quick=quick,
            torch=str(torch.__version__),
            blockhess=blockhess.__version__,
        )
        print(f"{result}\n\n{seconds:.1f} s; written: {', '.join(map(printable, written))}\n", flush=True)
        results.append(result)
    if len(results) > 1:
        rows = [[claim.verdict, claim.paper] for result in results for claim in result.claims]
        print(format_table(["verdict", "claim of the paper"], rows, left=2))
    return results


def measure_spectra(out: str | PathLike[str], *, seed: int, quick: bool, device: str) -> list[Path]:
    """Recompute the block spectra of cases 1 and 2, and print and return the files."""
    written = block_spectra.measure(
        writable_folder(out), seed=seed, quick=quick, device=str(known_device(device, "spectra"))
    )
    for path in written:
        print(f"{printable(path)}: {blockhess.load(path)!r}")
    return written
