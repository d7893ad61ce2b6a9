"""Peak memory: of anything in bytes, and of batched_slq in vector sets of n_probes x n elements.

The operator's own result is one of the vector sets.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from blockhess_ext import batched_slq

T = TypeVar("T")


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def growth(run: Callable[[], object]) -> int:
    """How many bytes the resident memory of this process grows by at most while `run` runs. Linux only.

    What a run loads lazily should be loaded before. Memory that was freed but that the C library cannot give back
    hides growth, so that only a young process tells small growth well.
    """
    ctypes.CDLL(None).malloc_trim(0)
    before = _resident_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size starts anew
    run()
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """The result of a function of a module, called in a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _measure(num_probes: int, dims: list[int], num_steps: int) -> float:
    """Growth of this process's resident memory during one run, in vector sets."""
    batched_slq(lambda v: 2 * v, [8], num_probes=1, num_steps=2)  # loads what a run loads lazily
    eigenvalues = torch.linspace(-1.0, 1.0, sum(dims))
    options = {"num_probes": num_probes, "num_steps": num_steps, "reorthogonalize": "none"}
    peak = growth(lambda: batched_slq(lambda v: v * eigenvalues, dims, **options))
    return peak / (num_probes * sum(dims) * 4)


def peak_vector_sets(num_probes: int, dims: list[int], num_steps: int) -> float:
    """Return the peak memory of batched_slq without reorthogonalisation, divided by one float32 vector set.

    Measured in a fresh process as the highest resident size minus the size before the call, so that allocations of
    any library count. The operator is diagonal and returns a new tensor at every call. Linux only.

    Args:
        num_probes: vectors a set.
        dims: sizes of the blocks; a set should be 100 MB or more, else small things count too.
        num_steps: Lanczos steps.
    """
    return in_fresh_process(_measure, num_probes, dims, num_steps)
