"""Work of Hessian-vector products, counted instead of timed, so that the same job is always computed in the same way.

    FLOPs / rate, bytes / bandwidth, launches * time of a launch,   at nominal rates of the device

A GPU does the three at once, so that the largest counts; a CPU one after the other, so that their sum does.

The FLOPs of a product with a block follow from the matrix products and convolutions of a forward pass, y = a b:

    tangent     dy = da b + a db
    adjoints    d(a*) = d(y*) b^T + y* db^T, and so for b

Without the terms of factors that do not depend on the block, these are 2 forward products if one of them does, and 6 if
both do. Gauss-Newton products have no y* db^T.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from blockhess.hvp.operator import Engine, product
from blockhess.problem.graph import DispatchMode
from blockhess.problem.problem import Problem

FLOPS_PER_SECOND = {"cpu": 1e11, "cuda": 1e13}
BYTES_PER_SECOND = {"cpu": 2e10, "cuda": 1e12}
SECONDS_PER_LAUNCH = {"cpu": 5e-6, "cuda": 1e-5}
# Forward products in a product with a block, per matrix product with one factor that depends on it, and with two.
FACTORS = {"autograd": (2, 6), "traced": (2, 6), "ggn": (2, 4), "difference": (2, 4)}
# The same for convolutions where autograd differentiates: it also computes the adjoints that are not asked for.
CONVOLUTION_FACTORS = (3, 6)


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products and convolutions, bytes moved and kernels launched."""

    flops: float
    bytes: float
    launches: float

    def times(self, factor: float) -> Work:
        """Return the work repeated `factor` times."""
        return Work(factor * self.flops, factor * self.bytes, factor * self.launches)

    def seconds(self, device: str) -> float:
        """Return the time at nominal rates of a device type."""
        parts = (
            self.flops / FLOPS_PER_SECOND[device],
            self.bytes / BYTES_PER_SECOND[device],
            self.launches * SECONDS_PER_LAUNCH[device],
        )
        return max(parts) if device == "cuda" else sum(parts)


class Counted(DispatchMode):
    """Counts the work of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self._flops = self._bytes = self._launches = 0

    @property
    def work(self) -> Work:
        return Work(self._flops, self._bytes, self._launches)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self._flops += count(*args, **{k: v for k, v in kwargs.items() if k != "out"}, out_val=out)
        if not func.is_view:
            self._launches += 1
            tensors = {id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}
            self._bytes += sum(t.numel() * t.itemsize for t in tensors.values())
        return out


def product_flops(problem: Problem, engine: str, traced: bool) -> list[int]:
    """Return the FLOPs of one product with each block for the first batch; 0 for unused blocks.

    Args:
        engine: its name.
        traced: whether products are those of a linear program.
    """
    matrices = FACTORS[engine]
    convolutions = matrices if traced or engine == "difference" else CONVOLUTION_FACTORS
    # Two forward passes for the gradients in a difference.
    fixed = 2 * problem.forward_flops if engine == "difference" else 0

    @functools.cache
    def flops(block: int) -> int:
        total = fixed
        for (is_convolution, *factors), count in problem.flops_by_factors.items():
            depend = sum(bool(bits & block) for bits in factors)
            if depend:
                total += count * (convolutions if is_convolution else matrices)[depend - 1]
        return total

    masks = [sum(problem.bits[name] for name in set(block.parameters)) for block in problem.blocks]
    return [flops(mask) if problem.is_used(number) else 0 for number, mask in enumerate(masks)]


def product_costs(problem: Problem, engine: Engine) -> list[float]:
    """Return the counted seconds of one product with each block for the first batch; 0 for unused blocks."""
    engine.prepare(0)
    costs = []
    for number, dim in enumerate(problem.dims):
        with Counted() as counted:
            if problem.is_used(number):
                product(engine, number, torch.ones(1, dim, dtype=problem.dtype, device=problem.device))
        costs.append(counted.work.seconds(problem.device.type))
    return costs


def step_cost(problem: Problem, number: int, basis_rows: float) -> float:
    """Return the counted seconds of a Lanczos step without its product: traffic of 8 vectors and 4 times the basis."""
    moved = problem.dims[number] * problem.dtype.itemsize * (8 + 4 * basis_rows)
    return moved / BYTES_PER_SECOND[problem.device.type] + 1e-7
