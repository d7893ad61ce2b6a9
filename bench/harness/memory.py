"""Peak memory of a call, and of batched_slq in multiples of one set of vectors (n_probes, n). Linux only."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def growth(run: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory of this process grows at most during a call of `run`.

    Libraries that `run` loads lazily count, so load them before. Memory that was freed but not returned to the system
    hides growth: small growth is measured well only in a fresh process.
    """
    ctypes.CDLL(None).malloc_trim(0)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident size
    run()
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 - before


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """Return the result of a module-level function called in a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _vector_sets(num_probes: int, dims: list[int], num_steps: int) -> float:
    from blockhess_ext import batched_slq  # the limits of a machine are measured before the extension is built

    batched_slq(lambda v: 2 * v, [8], num_probes=1, num_steps=2)  # loads libraries
    eigenvalues = torch.linspace(-1.0, 1.0, sum(dims))
    options = {"num_probes": num_probes, "num_steps": num_steps, "reorthogonalize": "none"}
    peak = growth(lambda: batched_slq(lambda v: v * eigenvalues, dims, **options))
    return peak / (num_probes * sum(dims) * 4)


def peak_vector_sets(num_probes: int, dims: list[int], num_steps: int) -> float:
    """Return the peak memory of batched_slq without reorthogonalization, divided by one float32 set of vectors.

    Measured in a fresh process. The operator is diagonal, and the new tensor that it returns is one of the sets.

    Args:
        num_probes: Vectors per set.
        dims: Sizes of the blocks. Use sets of 100 MB or more, so that other allocations are negligible.
        num_steps: Lanczos steps.
    """
    return in_fresh_process(_vector_sets, num_probes, dims, num_steps)
