"""When a step must be made orthogonal to the kept basis: always, or where Simon's recurrence says that it is due.

    omega_{j+1,k} = (beta_k omega_{j,k+1} + (alpha_k - alpha_j) omega_{j,k} + beta_{k-1} omega_{j,k-1}
                     - beta_{j-1} omega_{j-1,k} +- 2 eps |T|) / beta_j,        omega_{j+1,j} = eps |T| / beta_j

estimates <v_{j+1}, v_k> from alpha and beta alone. Where it passes sqrt(eps), this step and the next are projected, and
the estimate starts again from eps: the next one too, as two vectors carry the loss on. The basis stays orthogonal to
about sqrt(eps), and that is enough for T to be the projection of H to eps.

Promises: works on the device of the recurrences, in place, with no wait for the host, so a CUDA graph can replay it.

Source: Simon 1984, The Lanczos algorithm with partial reorthogonalization.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess_ext.recurrences import Recurrences


class FullReorthogonalization:
    """Every step is projected."""

    def due(self) -> Tensor | None:
        """Which recurrences to project, (n_probes, n_blocks) int32, or None for all. To be called after lanczos_step,
        before `reorthogonalize` has counted the step."""
        return None

    def tensors(self, step: int) -> dict[str, Tensor]:
        """What `due` remembers after this many steps, by name, not copied."""
        return {}


class PartialReorthogonalization(FullReorthogonalization):
    """Steps are projected where orthogonality is about to be lost, in the blocks that want it so.

    Args:
        recurrences: whose alpha and beta are read.
        partial: (n_blocks,) bool, the blocks that want it so; the others are always projected.
        eps: unit roundoff of the vectors.
    """

    def __init__(self, recurrences: Recurrences, partial: Tensor, eps: float) -> None:
        self._recurrences, self._eps = recurrences, eps
        rows = len(recurrences.alpha)
        self._rows = torch.arange(rows, device=partial.device)[:, None, None]
        self._now, self._before = (torch.zeros_like(recurrences.alpha) for _ in range(2))  # omega_j, omega_{j-1}
        self._always = (~partial).expand_as(recurrences.status)
        self._again = torch.zeros_like(self._always)

    def due(self) -> Tensor:
        """As in `Always`."""
        r, k, eps = self._recurrences, self._rows, self._eps
        j = r.steps[None].clamp(max=len(k) - 1)
        now = torch.where(k == j, 1.0, self._now)
        alpha_j, beta_j = r.alpha.gather(0, j), r.beta.gather(0, j)
        beta_before = torch.where(j > 0, r.beta.gather(0, (j - 1).clamp(min=0)), 0.0)
        norm = torch.maximum(r.norm, torch.maximum(alpha_j.abs(), beta_j))

        next_ = (r.alpha - alpha_j) * now - beta_before * self._before
        next_[:-1] += r.beta[:-1] * now[1:]
        next_[1:] += r.beta[:-1] * now[:-1]
        next_ = (next_ + 2 * eps * norm * next_.sign()) / beta_j
        next_ = torch.where(k == j, eps * norm / beta_j, next_)
        next_ = torch.where(k <= j, next_, 0.0)

        # A NaN or inf of a residual that is 0 counts as lost.
        lost = ~(next_.abs().amax(0) <= math.sqrt(eps)) & ~self._always
        project = lost | self._again | self._always
        self._before.copy_(now)
        self._now.copy_(torch.where(project & (k <= j), eps, next_))
        self._again.copy_(lost)
        return project.int()

    def tensors(self, step: int) -> dict[str, Tensor]:
        """As in `Always`."""
        return {"omega": self._now[:step], "omega_before": self._before[:step], "project_again": self._again}


def due_projections(recurrences: Recurrences, words: Sequence[str], dtype: torch.dtype) -> FullReorthogonalization:
    """What says which steps are projected, given "none", "full" or "partial" for every block."""
    if "partial" not in words:
        return FullReorthogonalization()
    partial = torch.tensor([word == "partial" for word in words], device=recurrences.status.device)
    return PartialReorthogonalization(recurrences, partial, torch.finfo(dtype).eps)
