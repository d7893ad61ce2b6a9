"""What the Lanczos recurrences of a batch know of themselves between two steps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RUNNING, FINISHED, NON_FINITE = 0, 1, 2

# Sizes of T, other than 0, in which no square of a residual underflows or overflows.
LEAST_SIZE, MOST_SIZE = 1e-120, 1e120


@dataclass(frozen=True)
class Recurrences:
    """The state of n_probes x n_blocks recurrences; ops write into its tensors.

    Which step comes next each recurrence knows itself: it is steps[p, l].

    Attributes:
        alpha: (m, n_probes, n_blocks) float64, diagonal entry of every step made, 0 in the others.
        beta: (m, n_probes, n_blocks) float64; beta[j] couples steps j and j + 1, the last valid one is the residual.
        norm: (n_probes, n_blocks) float64, the largest |alpha| or beta so far: the running |T|.
        steps: (n_probes, n_blocks) int64, valid steps made.
        status: (n_probes, n_blocks) int32, RUNNING, FINISHED or NON_FINITE.
        limits: (n_blocks,) int64, the most steps a block may make.
    """

    alpha: Tensor
    beta: Tensor
    norm: Tensor
    steps: Tensor
    status: Tensor
    limits: Tensor

    @staticmethod
    def start(n_probes: int, limits: Tensor, rows: int | None = None) -> Recurrences:
        """Recurrences before their first step; limits (n_blocks,) int64, m = rows, by default the largest of them."""
        shape = (n_probes, limits.shape[0])
        table = (int(limits.max()) if rows is None else rows, *shape)

        def zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=limits.device)

        return Recurrences(
            alpha=zeros(table, torch.float64),
            beta=zeros(table, torch.float64),
            norm=zeros(shape, torch.float64),
            steps=zeros(shape, torch.int64),
            status=zeros(shape, torch.int32),
            limits=limits,
        )
