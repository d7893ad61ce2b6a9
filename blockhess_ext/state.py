"""A batch of Lanczos recurrences between two steps, and the saved state from which it resumes.

Guarantees: a batch resumed from a state computes bitwise the same results as one that never stopped, also with a larger
num_steps; exporting a state copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from blockhess_ext import huge_pages
from blockhess_ext.early_stopping import stopping_rule
from blockhess_ext.layout import Layout
from blockhess_ext.partial_reorthogonalization import reorthogonalization
from blockhess_ext.recurrences import FINISHED, NON_FINITE, RUNNING, Recurrences


@dataclass(frozen=True, eq=False)
class State:
    """Everything a batch of recurrences needs to make its next step.

    Attributes:
        step: number of steps made.
        reorthogonalize: mode of each block, "none", "full" or "partial".
        tensors: by name: v and v_prev (n_probes, n), the Krylov basis without v (step, n_probes, n_basis), alpha, beta,
            norm, steps and status of `Recurrences`, and the state of early stopping and partial reorthogonalization.
    """

    step: int
    reorthogonalize: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Size of the tensors in bytes."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    def copy(self, device: torch.device | str = "cpu") -> State:
        """Return a copy whose tensors later steps do not change."""
        return replace(self, tensors={name: t.to(device, copy=True) for name, t in self.tensors.items()})


class LanczosBatch:
    """A batch of recurrences between two steps.

    Args:
        v: (n_probes, n) unit vectors; owned by the batch from here on.
        layout: the blocks, with a basis for those that are reorthogonalized.
        num_steps: maximum number of steps.
        modes: "none", "full" or "partial", one per block.
        tol, sigma: see `batched_slq`.
        step: number of steps made so far; `load` then restores their results.

    Attributes:
        v, v_prev: current and previous vectors, (n_probes, n).
        basis: Krylov basis, (capacity, n_probes, n_basis).
        recurrences: coefficients and status.
        projections: selects the steps to orthogonalize.
        stopping: ends recurrences early.
        step, num_steps: number of steps made, and the maximum over all blocks.
    """

    def __init__(
        self,
        v: Tensor,
        layout: Layout,
        num_steps: int,
        modes: Sequence[str],
        tol: float | None,
        sigma: float | None,
        step: int = 0,
    ) -> None:
        self._layout, self._modes = layout, tuple(modes)
        self.step, self.num_steps = step, min(num_steps, max(layout.dims))
        self.v, self.v_prev = v, huge_pages.zeros_like(v)
        limits = torch.tensor(layout.dims, device=v.device)
        # One row more than steps: a recurrence that fills the last row ends without computing its next vector, which a
        # continuation with more steps would need.
        self.recurrences = Recurrences.start(len(v), limits, rows=min(num_steps + 1, max(layout.dims)))
        capacity = min(num_steps, max((dim for dim, mode in zip(layout.dims, modes) if mode != "none"), default=0))
        self.basis = huge_pages.zeros(capacity, len(v), layout.n_basis, dtype=v.dtype, device=v.device)
        self.stopping = stopping_rule(self.recurrences, tol, sigma, step)
        self.projections = reorthogonalization(self.recurrences, modes, v.dtype)
        self._store_v()

    def finish_step(self) -> None:
        """Count a step and swap v and v_prev: the step wrote the next vectors to v_prev."""
        self.v, self.v_prev = self.v_prev, self.v
        self.step += 1

    def state(self) -> State:
        """Return the state. Its tensors are not copied, so the next step changes them."""
        r, s = self.recurrences, self.step
        tensors = {
            "v": self.v,
            "v_prev": self.v_prev,
            "basis": self.basis[:s],
            "alpha": r.alpha[:s],
            "beta": r.beta[:s],
            "norm": r.norm,
            "steps": r.steps,
            "status": r.status,
        }
        return State(s, self._modes, tensors | self.projections.tensors(s) | self.stopping.tensors())

    def load(self, state: State) -> None:
        """Load a state of the same recurrences.

        Raises:
            ValueError: the state does not fit these recurrences.
        """
        own = self.state().tensors
        _require("tensors", sorted(own), sorted(state.tensors))
        for name, tensor in own.items():
            saved = state.tensors[name]
            for what in ("shape", "dtype"):
                _require(f"{what} of {name}", getattr(tensor, what), getattr(saved, what))
            tensor.copy_(saved)
        steps, status = self.recurrences.steps, self.recurrences.status
        valid = (status == FINISHED) | (status == NON_FINITE) | ((status == RUNNING) & (steps == self.step))
        if not bool((valid & (steps >= 0) & (steps <= self.step)).all()):
            raise ValueError(f"batched_slq: steps and status in state must be consistent with {self.step} steps")
        self._store_v()

    def _store_v(self) -> None:
        """Copy v to the next row of the basis unless the basis is full."""
        if self.step >= len(self.basis):
            return
        starts = self._layout.basis_offsets.tolist()
        # Neighbors that are both stored, or both not, are neighbors in the basis, too.
        for is_stored, blocks in groupby(range(len(starts)), lambda l: starts[l] >= 0):
            if is_stored:
                run = list(blocks)
                first, last = run[0], run[-1]
                columns = slice(starts[first], starts[last] + self._layout.dims[last])
                whole = slice(self._layout.columns(first).start, self._layout.columns(last).stop)
                self.basis[self.step, :, columns] = self.v[:, whole]


def _require(what: str, expected: object, got: object) -> None:
    if expected != got:
        raise ValueError(f"batched_slq: {what} in state must be {expected}, got {got}")
