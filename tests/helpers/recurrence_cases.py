"""A batch of recurrences after some steps, to be advanced by two implementations and compared."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import FINISHED, NON_FINITE, Recurrences

# One element, odd tails, exactly one tile, one tile and more, several tiles.
DIMS = (1, 2, 7, 1000, 32768, 32769, 100_003)


@dataclass
class Case:
    """The arguments of lanczos_step."""

    w: Tensor
    v: Tensor
    v_prev: Tensor
    recurrences: Recurrences
    layout: Layout
    partial: Tensor

    def copy(self) -> Case:
        return copy.deepcopy(self)

    def arguments(self) -> tuple[object, ...]:
        return tuple(vars(self).values())


STEPS = 5  # of most recurrences
UNWRITTEN = 7.0  # value of the rows of alpha and beta that no step has written


def mid_flight(
    dtype: torch.dtype,
    rng: torch.Generator,
    dims: tuple[int, ...] = DIMS,
    n_probes: int = 3,
    steps: int = STEPS,
    uneven: bool = True,
) -> Case:
    """Return recurrences after some steps: most running, one finished, one non-finite, one a step before its limit.

    With uneven=True two have made fewer steps: none, and one less.
    """
    layout = Layout.of(dims)
    w, v, v_prev = (torch.randn(n_probes, layout.n, generator=rng, dtype=dtype) for _ in range(3))
    for l in range(layout.n_blocks):
        for x in (w, v, v_prev):
            x[:, layout.columns(l)] /= x[:, layout.columns(l)].norm(dim=1, keepdim=True)
    shape = (n_probes, layout.n_blocks)
    limits = torch.full((layout.n_blocks,), steps + 5)
    recurrences = Recurrences.start(n_probes, limits)
    recurrences.steps.fill_(steps)
    recurrences.norm.fill_(0.5)
    recurrences.status[1, 3], recurrences.status[0, -1] = FINISHED, NON_FINITE
    limits[2] = steps + 1
    if uneven:
        recurrences.steps[1, -2], recurrences.steps[1, 1] = 0, max(steps - 1, 0)
    recurrences.alpha.fill_(UNWRITTEN)
    recurrences.beta.fill_(UNWRITTEN)
    recurrences.beta[:steps] = torch.rand(steps, *shape, generator=rng, dtype=torch.float64)
    return Case(w, v, v_prev, recurrences, layout, recurrences.norm.new_empty(n_probes, layout.n_tiles))


def assert_same_state(a: Case, b: Case, rtol: float) -> None:
    """Assert equal vectors and coefficients within rtol, relative or absolute, and equal steps and status."""
    assert torch.equal(a.recurrences.steps, b.recurrences.steps)
    assert torch.equal(a.recurrences.status, b.recurrences.status)
    for name in ("alpha", "beta", "norm"):
        torch.testing.assert_close(getattr(a.recurrences, name), getattr(b.recurrences, name), rtol=rtol, atol=rtol)
    torch.testing.assert_close(a.v_prev, b.v_prev, rtol=rtol, atol=rtol)
