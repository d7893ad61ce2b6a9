"""The block-diagonal Hessian as a linear operator on vector sets, for any engine.

    (H v)_l = sum_b share_b H_b,l v_l,   over the batches of all ranks that share the data

The input is not modified. The result is the only allocation of the input's size. Finished recurrences are skipped.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from blockhess.problem.problem import Problem
from blockhess_ext import huge_pages

T = TypeVar("T")


def norm(x: Tensor) -> float:
    """Return |x|, computed in float64, in which squares of float32 values neither overflow nor underflow."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64))


@dataclass(frozen=True)
class Column:
    """Vectors of one block, and where their products go.

    Attributes:
        number: index of the block.
        vectors: (k, dim).
        products: (k, dim).
    """

    number: int
    vectors: Tensor
    products: Tensor


class Engine(Protocol):
    """Computes products with the block Hessians of one problem, batch by batch.

    Attributes:
        name: value of `engine=` that selects it.
    """

    name: str

    @property
    def capturable(self) -> bool:
        """Whether calls with the same columns do the same work on the same addresses and never wait for the device."""

    def prepare(self, index: int) -> None:
        """Select batch `index` for the next products."""

    def multiply(self, columns: Sequence[Column], share: float) -> Iterator[int]:
        """Add share * H_l v of the selected batch to the products; yield the number of vectors after every part.

        Blocks whose Hessian is zero are not counted.
        """


def product(engine: Engine, number: int, vectors: Tensor) -> Tensor:
    """Return H_l v of the selected batch for block `number` and vectors (k, dim)."""
    products = torch.zeros_like(vectors)
    for _ in engine.multiply([Column(number, vectors, products)], 1.0):
        pass
    return products


class PerBatch(Generic[T]):
    """One value per batch, such as a graph, computed when its batch is selected.

    Args:
        compute: returns the value of a batch.
        retain: keep the values of all batches; otherwise a value is freed before the next one is computed.

    Attributes:
        index: the selected batch.
    """

    def __init__(self, compute: Callable[[int], T], retain: bool) -> None:
        self._compute, self.retain = compute, retain
        self._values: dict[int, T] = {}
        self.index = 0

    def select(self, index: int) -> None:
        """Compute the value of batch `index` unless it is stored."""
        if index not in self._values:
            if not self.retain:
                self._values.clear()
            self._values[index] = self._compute(index)
        self.index = index

    @property
    def value(self) -> T:
        """The value of the selected batch."""
        return self._values[self.index]


class BlockOperator:
    """Hessian-vector products of some blocks of a problem, as `batched_slq` expects them.

    Args:
        problem: model, loss, data, blocks.
        engine: computes the products.
        numbers: indices of the blocks; default all.
        on_hvp: called after every product of one block, probe and batch.

    Attributes:
        dims: dimensions of these blocks.
        hvps: number of products so far, of one block, probe and batch each, on all ranks that share the data.
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
        self._made = 0

    @property
    def capturable(self) -> bool:
        """Whether `batched_slq` may replay products from CUDA graphs."""
        return self._engine.capturable and self.problem.ranks.data_size == 1

    def replayed(self) -> None:
        """Count the products of the last call once more, for a replay from a CUDA graph."""
        self._count(self._made)

    def _count(self, made: int) -> None:
        self.hvps += made
        for _ in range(made):
            self.on_hvp()

    def mark_finished(self, finished: Tensor) -> None:
        """Skip the recurrences marked in a bool tensor (n_probes, n_blocks) from now on."""
        self._finished = finished.tolist()

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply every block of every vector by the Hessian of the block.

        Args:
            v: (n_probes, sum(dims)).

        Returns:
            (n_probes, sum(dims)), zero for finished recurrences.
        """
        result = huge_pages.zeros_like(v)
        pieces = list(zip(self.numbers, torch.split(v, self.dims, dim=1), torch.split(result, self.dims, dim=1)))
        sums, before = self.problem.ranks.sums(), self.hvps
        columns: list[Column] = []
        for column, (number, vectors, products) in enumerate(pieces):
            if self.problem.is_used(number):
                columns += self._running(column, Column(number, vectors, products))
        for index, share in enumerate(self.problem.shares):
            self._engine.prepare(index)
            for made in self._engine.multiply(columns, share):
                self._count(made)
        for number, _, products in pieces:
            if self.problem.is_used(number):
                sums.add(products)
        self._made = sums.finish(self.hvps - before)
        self.hvps = before + self._made
        return result

    def _running(self, column: int, whole: Column) -> Iterator[Column]:
        """Yield the vectors of a column that are not finished, in consecutive ranges."""
        finished = [False] * len(whole.vectors)
        if self._finished is not None:
            finished = [row[column] for row in self._finished]
        first = 0
        for over, group in itertools.groupby(finished):
            last = first + len(list(group))
            if not over:
                yield Column(whole.number, whole.vectors[first:last], whole.products[first:last])
            first = last
