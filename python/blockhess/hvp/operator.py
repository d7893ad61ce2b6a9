"""The block-diagonal Hessian as an operator on vector sets, whatever computes the products.

    (H v)_l = sum_b share_b H_b,l v_l,   over the batches of all ranks that share them

Promises: block l of the result depends on block l of the input only; the input is neither modified nor kept; the
result is the only tensor of the input's size that is made; finished recurrences cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from blockhess.problem.problem import Problem
from blockhess_ext import huge_pages


class Engine(Protocol):
    """Computes products with block Hessians of one problem, batch by batch.

    Attributes:
        name: how users call it.
        rows: vectors of one block that it takes together.
    """

    name: str
    rows: int

    def prepare(self, index: int) -> None:
        """Make ready for products of batch `index`: graphs, activations. What is held of others may be given up."""

    def product(self, number: int, vectors: Tensor) -> Tensor | None:
        """H_l v of the batch prepared, for block `number`.

        Args:
            vectors: (k, dim), k <= rows.

        Returns:
            (k, dim); None where the Hessian is zero.
        """


class BlockOperator:
    """H v for some blocks of a problem, as `batched_slq` takes it.

    Args:
        problem: model, loss, data, blocks.
        engine: computes the products.
        numbers: which blocks; all unless given.
        on_hvp: called after every product of one block, probe and batch.

    Attributes:
        problem: as given. dims: of these blocks. hvps: products computed so far, by
            all ranks that share batches, one per block, probe, step and batch.
    """

    def __init__(
        self,
        problem: Problem,
        engine: Engine,
        numbers: Sequence[int] | None = None,
        on_hvp: Callable[[], object] = lambda: None,
    ) -> None:
        self.on_hvp = on_hvp
        self.hvps = 0
        self.numbers = list(range(len(problem.blocks)) if numbers is None else numbers)
        self.dims = [problem.dims[l] for l in self.numbers]
        self.problem, self._engine = problem, engine
        self._finished: list[list[bool]] | None = None

    def mark_finished(self, finished: Tensor) -> None:
        """Skip from now on the recurrences marked in a bool tensor (n_probes, n_blocks)."""
        self._finished = finished.tolist()

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply every block of every vector by that block's Hessian.

        Args:
            v: (n_probes, sum(dims)).

        Returns:
            (n_probes, sum(dims)), zeros where a recurrence is finished or a block's Hessian is zero.
        """
        result = huge_pages.zeros_like(v)
        columns = list(zip(torch.split(v, self.dims, dim=1), torch.split(result, self.dims, dim=1)))
        sums, last, before = self.problem.ranks.sums(), len(self.problem.shares) - 1, self.hvps
        for index, share in enumerate(self.problem.shares):
            self._engine.prepare(index)
            for column, (number, (vectors, products)) in enumerate(zip(self.numbers, columns)):
                if not self.problem.is_used(number):
                    continue
                running = [p for p in range(len(v)) if self._finished is None or not self._finished[p][column]]
                for start in range(0, len(running), self._engine.rows):
                    self._add(number, vectors, products, running[start : start + self._engine.rows], share)
                if index == last:
                    sums.add(products)
        self.hvps = before + sums.finish(self.hvps - before)
        return result

    def _add(self, number: int, vectors: Tensor, products: Tensor, probes: list[int], share: float) -> None:
        first, last = probes[0], probes[-1] + 1
        together = last - first == len(probes)  # then views will do
        chosen = vectors[first:last] if together else vectors[probes]
        product = self._engine.product(number, chosen)
        if product is not None:
            if together:
                products[first:last].add_(product, alpha=share)
            else:
                products[probes] += share * product
        self.hvps += len(probes) if product is not None else 0
        for _ in probes if product is not None else ():
            self.on_hvp()
