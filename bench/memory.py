"""Peak memory of batched_slq, in vector sets of n_probes x n elements; the operator's own result is one of them."""

from __future__ import annotations

import multiprocessing
import os
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from blockhess_ext import batched_slq


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _measure(num_probes: int, dims: list[int], num_steps: int) -> float:
    """Growth of this process's resident memory during one run, in vector sets.

    Small blocks first, so that everything a run loads lazily is loaded before the measurement.
    """
    batched_slq(lambda v: 2 * v, [8], num_probes=1, num_steps=2)
    eigenvalues = torch.linspace(-1.0, 1.0, sum(dims))
    before = _resident_bytes()
    batched_slq(lambda v: v * eigenvalues, dims, num_probes=num_probes, num_steps=num_steps, reorthogonalize="none")
    # Linux gives the highest resident size of a process in KiB.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return (peak - before) / (num_probes * sum(dims) * 4)


def peak_vector_sets(num_probes: int, dims: list[int], num_steps: int) -> float:
    """Return the peak memory of batched_slq without reorthogonalisation, divided by one float32 vector set.

    Measured in a fresh process as the highest resident size minus the size before the call, so that allocations of
    any library count. The operator is diagonal and returns a new tensor at every call. Linux only.

    Args:
        num_probes: vectors a set.
        dims: sizes of the blocks; a set should be 100 MB or more, else small things count too.
        num_steps: Lanczos steps.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_measure, num_probes, dims, num_steps).result()
