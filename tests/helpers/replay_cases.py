"""An operator whose recurrences end early, late and with NaN, for loops replayed from CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockhess_ext import batched_slq

DIMS = (1, 2, 7, 40, 300, 33_000)
STEPS = 21
FAILS_AT = 6


class Operator:
    """Diagonal, with a zero block; one recurrence gets NaN at a step counted in a tensor, which a graph replays too."""

    def __init__(
        self, dtype: torch.dtype = torch.float32, capturable: bool = False, where: torch.device | str = "cpu"
    ) -> None:
        scales = torch.randn(sum(DIMS), generator=torch.Generator().manual_seed(0), dtype=dtype)
        scales[3:10] = 0.0
        lane = torch.zeros(2, sum(DIMS), dtype=torch.bool)
        lane[1, 100] = True
        self.scales, self.lane = scales.to(where), lane.to(where)
        self.count = torch.zeros((), dtype=torch.int64, device=where)
        self.capturable, self.calls = capturable, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        self.count += 1
        return torch.where(self.lane & (self.count == FAILS_AT), torch.nan, v * self.scales)


def run(hvp: Callable[[Tensor], Tensor], **options: object) -> list[Tensor]:
    """Return the tensors of a short batched_slq."""
    q = batched_slq(hvp, DIMS, **{"num_probes": 2, "num_steps": STEPS, "on_nonfinite": "mark", **options})
    return [q.nodes, q.weights, q.alpha, q.beta, q.steps, q.nonfinite]
