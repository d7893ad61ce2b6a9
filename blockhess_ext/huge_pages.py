"""Memory for vectors that ops pass through again and again: on a CPU in huge pages, where the system has them.

A processor must look up every page that it comes to, and does so often where they are of the usual 4 KiB; Linux gives
pages of 2 MiB to those who ask. Shorter vectors stay in what PyTorch keeps for such.
"""

from __future__ import annotations

import math
import mmap

import torch
from torch import Tensor

LEAST_BYTES = 2**22


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros, in huge pages if it is large and the system gives them; it cannot be resized."""
    nbytes = math.prod(shape) * dtype.itemsize
    if device.type == "cpu" and nbytes >= LEAST_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        except (OSError, OverflowError):  # a kernel without them; or too little memory, of which PyTorch tells
            pass
        else:
            return torch.frombuffer(memory, dtype=dtype).view(shape)
    return torch.zeros(shape, dtype=dtype, device=device)


def zeros_like(x: Tensor) -> Tensor:
    """Zeros of the shape, type and device of x, a plain tensor."""
    return zeros(*x.shape, dtype=x.dtype, device=x.device)
