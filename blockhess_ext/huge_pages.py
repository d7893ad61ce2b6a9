"""Memory for large vectors: on the CPU in huge pages where the system provides them.

Streaming through large arrays costs a TLB miss per page; with pages of 2 MiB instead of 4 KiB these become rare. Linux
provides them on request. Smaller tensors use PyTorch's allocator.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

MIN_BYTES = 2**22


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor of zeros, in huge pages if it is large and the system provides them; it cannot be resized."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and nbytes >= MIN_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, OverflowError):  # no huge pages; or out of memory, which PyTorch reports below
            pass
        else:
            return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def zeros_like(x: Tensor) -> Tensor:
    """Return zeros of the shape, dtype and device of x."""
    return zeros(*x.shape, dtype=x.dtype, device=x.device)
