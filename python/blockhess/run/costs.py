"""Cost of a product with each block, counted instead of timed, so that the same job is always partitioned alike.

    seconds = FLOPs / rate + bytes / bandwidth + operations * overhead,   at nominal rates of the device

Only ratios between blocks matter.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from blockhess.hvp.operator import Engine, product
from blockhess.problem.problem import Problem

FLOPS_PER_SECOND = {"cpu": 3e10, "cuda": 1e13}
BYTES_PER_SECOND = {"cpu": 1e10, "cuda": 1e12}
SECONDS_PER_OPERATION = {"cpu": 5e-6, "cuda": 1e-5}


class _Counted(TorchDispatchMode):
    """Sums the cost of all operations."""

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        device = self._device_type
        self.seconds += SECONDS_PER_OPERATION[device]
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.seconds += count(*args, **(kwargs or {}), out_val=out) / FLOPS_PER_SECOND[device]
        if not func.is_view:
            tensors = [t for t in (*args, out) if isinstance(t, Tensor)]
            self.seconds += sum(t.numel() * t.itemsize for t in tensors) / BYTES_PER_SECOND[device]
        return out


def product_costs(problem: Problem, engine: Engine) -> list[float]:
    """Return the counted seconds of one product with each block for the first batch; 0 for unused blocks."""
    engine.prepare(0)
    costs = []
    for number, dim in enumerate(problem.dims):
        counted = _Counted(problem.device.type)
        if problem.is_used(number):
            with counted:
                product(engine, number, torch.ones(1, dim, dtype=problem.dtype, device=problem.device))
        costs.append(counted.seconds)
    return costs


def step_cost(problem: Problem, number: int, basis_rows: float) -> float:
    """Return the counted seconds of a Lanczos step without its product: traffic of 8 vectors and 4 times the basis."""
    moved = problem.dims[number] * problem.dtype.itemsize * (8 + 4 * basis_rows)
    return moved / BYTES_PER_SECOND[problem.device.type] + 1e-7
