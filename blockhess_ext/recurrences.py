"""Coefficients and status of a batch of Lanczos recurrences.

beta_j v_{j+1} = H v_j - alpha_j v_j - beta_{j-1} v_{j-1}
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RUNNING, FINISHED, NON_FINITE = 0, 1, 2

# A residual beta <= EXHAUSTED_EPS eps |T| means that the Krylov space is exhausted.
EXHAUSTED_EPS = 64

# Range of |T|, besides 0, in which no square of a residual underflows or overflows.
LEAST_SIZE, MOST_SIZE = 1e-120, 1e120


@dataclass(frozen=True)
class Recurrences:
    """Coefficients of n_probes x n_blocks recurrences; the ops update the tensors in place.

    Recurrence (p, l) has made steps[p, l] steps, so its next step writes row steps[p, l] of alpha and beta.

    Attributes:
        alpha: (m, n_probes, n_blocks) float64, diagonal entries of T; 0 beyond `steps`.
        beta: (m, n_probes, n_blocks) float64; beta[j] couples steps j and j + 1, the last valid one is the residual.
        norm: (n_probes, n_blocks) float64, running estimate of |T|: the largest |alpha| or beta so far.
        steps: (n_probes, n_blocks) int64, number of valid steps.
        status: (n_probes, n_blocks) int32, RUNNING, FINISHED or NON_FINITE.
        limits: (n_blocks,) int64, maximum number of steps of each block.
    """

    alpha: Tensor
    beta: Tensor
    norm: Tensor
    steps: Tensor
    status: Tensor
    limits: Tensor

    def running(self) -> Tensor | None:
        """Return the indices of running recurrences in the flattened status; None on a GPU, where it would wait."""
        return None if self.status.is_cuda else (self.status == RUNNING).flatten().nonzero()[:, 0]

    @staticmethod
    def start(n_probes: int, limits: Tensor, rows: int | None = None) -> Recurrences:
        """Return recurrences before their first step.

        Args:
            n_probes: number of probes.
            limits: (n_blocks,) int64.
            rows: m, by default max(limits).
        """
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
