"""Partial reorthogonalization: Simon's recurrence decides which steps are orthogonalized against the Krylov basis.

    omega_{j+1,k} = (beta_k omega_{j,k+1} + (alpha_k - alpha_j) omega_{j,k} + beta_{k-1} omega_{j,k-1}
                     - beta_{j-1} omega_{j-1,k} +- 2 eps |T|) / beta_j,        omega_{j+1,j} = eps |T| / beta_j

estimates <v_{j+1}, v_k> from alpha and beta alone. Where |omega| exceeds sqrt(eps), this step and the next are
orthogonalized, since the three-term recurrence propagates the loss through two vectors, and the estimate restarts from
eps. This keeps the basis semiorthogonal, <v_i, v_k> = O(sqrt(eps)), so T is the projection of H up to O(eps).

Guarantees: all work is in place on the device of the recurrences; the host never waits, so a CUDA graph can replay it.

Source: Simon 1984, The Lanczos algorithm with partial reorthogonalization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess_ext.recurrences import Recurrences


class FullReorthogonalization:
    """Orthogonalize every step."""

    def select(self, replayed: bool = False) -> Tensor | None:
        """Return which recurrences to orthogonalize in this step, (n_probes, n_blocks) int32, or None for all.

        Call it between `lanczos_step` and `reorthogonalize`. With `replayed`, for a CUDA graph, all shapes are those of
        other steps.
        """
        return None

    def tensors(self, step: int) -> dict[str, Tensor]:
        """Return the state after this many steps by name, without copying."""
        return {}


class PartialReorthogonalization(FullReorthogonalization):
    """Orthogonalize the steps in which orthogonality is about to be lost.

    Args:
        recurrences: the recurrences; alpha and beta are read.
        partial: (n_blocks,) bool, the blocks with partial reorthogonalization; all others are fully orthogonalized.
        eps: unit roundoff of the vectors.
    """

    def __init__(self, recurrences: Recurrences, partial: Tensor, eps: float) -> None:
        self._recurrences, self._eps = recurrences, eps
        rows = len(recurrences.alpha)
        self._rows = torch.arange(rows, device=partial.device)[:, None]
        self._now, self._before = (torch.zeros_like(recurrences.alpha) for _ in range(2))  # omega_j, omega_{j-1}
        self._full = (~partial).expand_as(recurrences.status)
        self._again = torch.zeros_like(self._full)

    def select(self, replayed: bool = False) -> Tensor:
        """See `FullReorthogonalization`."""
        r, n_rows, eps = self._recurrences, len(self._rows), self._eps
        flat = [
            x.flatten(-2) for x in (r.alpha, r.beta, self._now, self._before, r.steps, r.norm, self._full, self._again)
        ]
        which = None if replayed else r.running()
        if which is None:
            alpha, beta, omega, before, steps, norm, full, again = flat
        else:  # the recurrences that decide, and the rows that are not zero
            which = which[~flat[6][which]]
            n_rows = min(n_rows, int(flat[4][which].amax()) + 2) if len(which) else 1
            alpha, beta, omega, before = (x[:n_rows, which] for x in flat[:4])
            steps, norm, full, again = (x[which] for x in flat[4:])
        k = self._rows[:n_rows]
        j = steps[None].clamp(max=n_rows - 1)
        now = torch.where(k == j, 1.0, omega)
        alpha_j, beta_j = alpha.gather(0, j), beta.gather(0, j)
        beta_before = torch.where(j > 0, beta.gather(0, (j - 1).clamp(min=0)), 0.0)
        norm = torch.maximum(norm, torch.maximum(alpha_j.abs(), beta_j))

        next_ = (alpha - alpha_j) * now - beta_before * before
        next_[:-1] += beta[:-1] * now[1:]
        next_[1:] += beta[:-1] * now[:-1]
        next_ = (next_ + 2 * eps * norm * next_.sign()) / beta_j
        next_ = torch.where(k == j, eps * norm / beta_j, next_)
        next_ = torch.where(k <= j, next_, 0.0)

        # A zero residual gives NaN or inf, which counts as lost.
        lost = ~(next_.abs().amax(0) <= math.sqrt(eps)) & ~full
        project = lost | again | full
        omega = torch.where(project & (k <= j), eps, next_)
        if which is None:
            self._before.copy_(now.view_as(self._before))
            self._now.copy_(omega.view_as(self._now))
            self._again.copy_(lost.view_as(self._again))
            return project.view_as(r.status).int()
        self._before.flatten(1)[:n_rows].index_copy_(1, which, now)
        self._now.flatten(1)[:n_rows].index_copy_(1, which, omega)
        self._again.flatten().index_copy_(0, which, lost)
        return self._full.flatten().index_copy(0, which, project).view_as(r.status).int()

    def tensors(self, step: int) -> dict[str, Tensor]:
        """See `FullReorthogonalization`."""
        return {"omega": self._now[:step], "omega_before": self._before[:step], "project_again": self._again}


def reorthogonalization(recurrences: Recurrences, modes: Sequence[str], dtype: torch.dtype) -> FullReorthogonalization:
    """Return what selects the steps to orthogonalize; modes are "none", "full" or "partial", one per block."""
    if "partial" not in modes:
        return FullReorthogonalization()
    partial = torch.tensor([mode == "partial" for mode in modes], device=recurrences.status.device)
    return PartialReorthogonalization(recurrences, partial, torch.finfo(dtype).eps)
