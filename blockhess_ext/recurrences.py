"""What the Lanczos recurrences of a batch know of themselves between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RUNNING, FINISHED, NON_FINITE = 0, 1, 2


@dataclass(frozen=True)
class Recurrences:
    """The state of n_probes x n_blocks recurrences; ops write into its tensors.

    Attributes:
        norm: (n_probes, n_blocks) float64, the largest |alpha| or beta so far: the running |T|.
        steps: (n_probes, n_blocks) int64, valid steps made.
        status: (n_probes, n_blocks) int32, RUNNING, FINISHED or NON_FINITE.
        limits: (n_blocks,) int64, the most steps a block may make.
    """

    norm: Tensor
    steps: Tensor
    status: Tensor
    limits: Tensor

    @staticmethod
    def start(n_probes: int, limits: Tensor) -> Recurrences:
        """Recurrences before their first step; limits (n_blocks,) int64."""
        shape = (n_probes, limits.shape[0])

        def zeros(dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=limits.device)

        return Recurrences(zeros(torch.float64), zeros(torch.int64), zeros(torch.int32), limits)
