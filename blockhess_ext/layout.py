"""Layout of a ragged batch: the columns of every block, and the tiles into which work on them is divided."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

import blockhess_ext._C as _C

# Elements in a piece of a vector set, and the largest number of such pieces on a GPU.
PIECE, PIECES = 2**16, 128


@dataclass(frozen=True)
class Layout:
    """Blocks stored contiguously in vectors of n = sum(dims) elements.

    Attributes:
        dims: number of elements of each block.
        offsets: (n_blocks + 1,) int64, block l has the columns offsets[l] : offsets[l + 1].
        tiles: (n_tiles, 3) int64, block, start and stop column of each tile, ordered by block.
        tile_offsets: (n_blocks + 1,) int64, block l has the tiles tile_offsets[l] : tile_offsets[l + 1].
        basis_offsets: (n_blocks,) int64, first column of the block in the Krylov basis, or -1 if it is not stored.
        basis_tiles: (n,) int64, indices of the tiles of the blocks in the Krylov basis.
        n_basis: number of columns of the Krylov basis.
    """

    dims: tuple[int, ...]
    offsets: Tensor
    tiles: Tensor
    tile_offsets: Tensor
    basis_offsets: Tensor
    basis_tiles: Tensor
    n_basis: int = 0

    @staticmethod
    def of(dims: Sequence[int], device: torch.device | str = "cpu") -> Layout:
        """Return the layout of blocks of these sizes, without a Krylov basis."""
        tiles, tile_offsets = (torch.from_numpy(table) for table in _C.plan_tiles(dims))
        offsets = torch.tensor([0, *dims], device="cpu").cumsum(0)
        no_basis = torch.full((len(dims),), -1, device="cpu")
        parts = (offsets, tiles, tile_offsets, no_basis, no_basis[:0])
        offsets, tiles, tile_offsets, no_basis, no_tiles = (part.to(device) for part in parts)
        return Layout(tuple(dims), offsets, tiles, tile_offsets, no_basis, no_tiles)

    def with_basis(self, stored: Sequence[bool]) -> Layout:
        """Return the layout with a Krylov basis for the blocks with stored[l]."""
        columns, n_basis = [], 0
        for dim, store in zip(self.dims, stored):
            columns.append(n_basis if store else -1)
            n_basis += dim if store else 0
        n_basis += -n_basis % 4  # align rows to 16 bytes, for vectorized loads on a GPU
        tiles = torch.tensor(stored, dtype=torch.bool, device="cpu")[self.tiles[:, 0].cpu()].nonzero()[:, 0]
        basis_offsets, basis_tiles = (
            part.to(self.offsets.device) for part in (torch.tensor(columns, device="cpu"), tiles)
        )
        return replace(self, basis_offsets=basis_offsets, basis_tiles=basis_tiles, n_basis=n_basis)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.dims, initial=0))  # on the host, unlike `offsets`

    @property
    def n(self) -> int:
        """Number of elements of a vector."""
        return self._starts[-1]

    @property
    def n_blocks(self) -> int:
        """Number of blocks."""
        return len(self.dims)

    @property
    def n_tiles(self) -> int:
        """Number of tiles of one vector."""
        return self.tiles.shape[0]

    def columns(self, block: int) -> slice:
        """Return the columns of a block."""
        return slice(self._starts[block], self._starts[block + 1])

    def dots(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the inner products <a, b> of all segments, accumulated in float64.

        Args:
            a, b: (n_probes, n).

        Returns:
            (n_probes, n_blocks) float64.
        """
        result = torch.zeros(len(a), self.n_blocks, dtype=torch.float64, device=a.device)
        scratch = result.new_empty(2, len(a), self._width(a))
        for columns, blocks, sizes in self.pieces(a):
            terms, factors = scratch[:, :, : columns.stop - columns.start]
            terms.copy_(a[:, columns]).mul_(factors.copy_(b[:, columns]))
            sums = torch.segment_reduce(terms.flatten(), "sum", lengths=sizes.repeat(len(a)), unsafe=True)
            result[:, blocks] += sums.view(len(a), -1)
        return result

    def pieces(self, x: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield a part of the columns, the blocks in it, and how many of its columns each has, until all were yielded.

        Args:
            x: (n_probes, n). A part has so few columns that copies of it need little memory.
        """
        width = self._width(x)
        for start in range(0, self.n, width):
            stop = min(start + width, self.n)
            blocks = slice(bisect_right(self._starts, start) - 1, bisect_left(self._starts, stop))
            yield slice(start, stop), blocks, self.offsets[blocks.start : blocks.stop + 1].clamp(start, stop).diff()

    def _width(self, x: Tensor) -> int:
        return min(self.n, max(PIECE // max(len(x), 1), 1 + self.n // PIECES if x.is_cuda else 1))

    def basis_columns(self, block: int) -> slice | None:
        """Return the columns of a block in the Krylov basis, or None if it is not stored."""
        start = int(self.basis_offsets[block])
        return None if start < 0 else slice(start, start + self.dims[block])
