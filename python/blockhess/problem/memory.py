"""The memory budget of a run, and text for sizes and durations."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re

import torch
from torch import nn

from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup
from blockhess.problem.shards import device_of


def budget_bytes(memory_budget: int | str | None, device: torch.device) -> int:
    """Return the memory budget in bytes.

    Args:
        memory_budget: a number of bytes, a string such as "6 GiB", or None for half of the device's memory.

    Raises:
        ValueError: not a size, or not positive.
    """
    if memory_budget is None:
        if device.type == "cuda":
            return torch.cuda.get_device_properties(device).total_memory // 2
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    text = str(memory_budget).strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:([kKMGT])(i?))?B?", text)
    if isinstance(memory_budget, bool) or not match:
        raise ValueError(f"spectrum: memory_budget must be bytes or a text such as '6 GiB', got {memory_budget!r}")
    power = " KMGT".index(match[2].upper()) if match[2] else 0
    size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if size < 1:
        raise ValueError(f"spectrum: memory_budget must be above 0, got {memory_budget!r}")
    return size


def shared_budget(memory_budget: int | str | None, model: nn.Module, ranks: ProcessGroup) -> int | str | None:
    """Return the memory budget of every rank: by default the smallest default of any rank.

    CPU processes that torchrun started on one host divide its memory among them.
    """
    if memory_budget is not None or ranks is SINGLE_PROCESS or not isinstance(model, nn.Module):
        return memory_budget
    device = next(map(device_of, model.parameters()), torch.device("cpu"))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if device.type == "cpu" else 1
    return int(min(ranks.gather(budget_bytes(None, device) // local)))


def release_unused() -> None:
    """Return freed memory of the C heap to the system, where the C library can."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def time_text(seconds: float) -> str:
    """Format a duration, as "3.2 hours"."""
    for unit, length in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.2g} {unit}"
    return f"{seconds:.2g} seconds"


def size_text(nbytes: float) -> str:
    """Format a number of bytes, as "1.5 GiB"."""
    unit, *larger = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")
    while nbytes >= 1024 and larger:
        nbytes, unit = nbytes / 1024, larger.pop(0)
    return f"{nbytes:.0f} {unit}" if unit == "bytes" or nbytes >= 1000 else f"{nbytes:.3g} {unit}"
