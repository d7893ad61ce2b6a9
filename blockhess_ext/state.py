"""Recurrences in mid-flight, and their state as a value with which they go on elsewhere or later.

Promises: a batch that goes on from a state computes the same bits as one that never stopped, with more steps asked for
too; handing out a state copies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blockhess_ext import huge_pages
from blockhess_ext.early_stopping import convergence
from blockhess_ext.layout import Layout
from blockhess_ext.partial_reorthogonalization import due_projections
from blockhess_ext.recurrences import FINISHED, NON_FINITE, RUNNING, Recurrences


@dataclass(frozen=True)
class State:
    """All that a batch of recurrences needs to make its next step.

    Attributes:
        step: steps made.
        reorthogonalize: "none", "full" or "partial", of each block.
        tensors: by name: v and v_prev (n_probes, n), the kept basis without v (step, n_probes, n_basis), alpha, beta,
            norm, steps and status of `Recurrences`, and what ends steps early or projects them needs to remember.
    """

    step: int
    reorthogonalize: tuple[str, ...]
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.numel() * tensor.itemsize for tensor in self.tensors.values())

    def copy(self, device: torch.device | str = "cpu") -> State:
        """The state with tensors of its own, which later steps leave alone."""
        return replace(self, tensors={name: t.to(device, copy=True) for name, t in self.tensors.items()})


class LanczosBatch:
    """A batch of recurrences between two steps.

    Args:
        v: (n_probes, n) unit vectors; becomes part of it.
        layout: the blocks, with the basis that the words ask for.
        num_steps: most steps.
        words: "none", "full" or "partial", of each block.
        tol, sigma: as in `batched_slq`.
        step: steps made; what they left is to be filled in by `load`.

    Attributes:
        v, v_prev: current and previous vectors. basis: (capacity, n_probes, n_basis). recurrences: coefficients.
        projections: which steps to project. settled: what ends recurrences early. num_steps: most steps that any makes.
    """

    def __init__(
        self,
        v: Tensor,
        layout: Layout,
        num_steps: int,
        words: Sequence[str],
        tol: float | None,
        sigma: float | None,
        step: int = 0,
    ) -> None:
        self._layout, self._words = layout, tuple(words)
        self.step, self.num_steps = step, min(num_steps, max(layout.dims))
        self.v, self.v_prev = v, huge_pages.zeros_like(v)
        limits = torch.tensor(layout.dims, device=v.device)
        # A row more than steps, since a recurrence that has filled the last one ends and loses its next vector.
        self.recurrences = Recurrences.start(len(v), limits, rows=min(num_steps + 1, max(layout.dims)))
        kept = [dim for dim, word in zip(layout.dims, words) if word != "none"]
        capacity = min(num_steps, max(kept, default=0))
        self.basis = huge_pages.zeros(capacity, len(v), layout.n_basis, dtype=v.dtype, device=v.device)
        self.settled = convergence(self.recurrences, tol, sigma, step)
        self.projections = due_projections(self.recurrences, words, v.dtype)
        self._keep_v()

    def turn(self) -> None:
        """After a step, which wrote the next vectors over the previous ones."""
        self.v, self.v_prev = self.v_prev, self.v
        self.step += 1

    def state(self) -> State:
        """The state, whose tensors are those that the next step changes."""
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
        return State(s, self._words, tensors | self.projections.tensors(s) | self.settled.tensors())

    def load(self, state: State) -> None:
        """Takes over a state of the same recurrences.

        Raises:
            ValueError: it is that of others.
        """
        own = self.state().tensors
        _require("tensors", sorted(own), sorted(state.tensors))
        for name, tensor in own.items():
            saved = state.tensors[name]
            for what in ("shape", "dtype"):
                _require(f"{what} of {name}", getattr(tensor, what), getattr(saved, what))
            tensor.copy_(saved)
        steps, status = self.recurrences.steps, self.recurrences.status
        sound = (status == FINISHED) | (status == NON_FINITE) | ((status == RUNNING) & (steps == self.step))
        if not bool((sound & (steps >= 0) & (steps <= self.step)).all()):
            raise ValueError(f"batched_slq: steps and status in state must be those of {self.step} steps, got others")
        self._keep_v()

    def _keep_v(self) -> None:
        """Makes v the next row of the basis, if there is one."""
        if self.step >= len(self.basis):
            return
        for l, start in enumerate(self._layout.basis_offsets.tolist()):
            if start >= 0:
                columns = slice(start, start + self._layout.dims[l])
                self.basis[self.step, :, columns] = self.v[:, self._layout.columns(l)]


def _require(what: str, wanted: object, got: object) -> None:
    if wanted != got:
        raise ValueError(f"batched_slq: {what} in state must be {wanted}, got {got}")
