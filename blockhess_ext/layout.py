"""The ragged batch: where every block lies in a vector, and the tiles that schedule work on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

import blockhess_ext._C as _C


@dataclass(frozen=True)
class Layout:
    """Blocks side by side in vectors of n = sum(dims) elements.

    Attributes:
        dims: elements of each block.
        offsets: (n_blocks + 1,) int64, block l is the columns offsets[l] : offsets[l + 1].
        tiles: (n_tiles, 3) int64, block, start and stop column of each tile, block by block.
        tile_offsets: (n_blocks + 1,) int64, the tiles of block l are tile_offsets[l] : tile_offsets[l + 1].
        basis_offsets: (n_blocks,) int64, first column of the block in a kept basis, or -1 where none is kept.
        n_basis: columns of a kept basis.
    """

    dims: tuple[int, ...]
    offsets: Tensor
    tiles: Tensor
    tile_offsets: Tensor
    basis_offsets: Tensor
    n_basis: int = 0

    @staticmethod
    def of(dims: Sequence[int], device: torch.device | str = "cpu") -> Layout:
        """Plans the layout of blocks of these sizes, without a kept basis."""
        tiles, tile_offsets = (torch.from_numpy(table) for table in _C.plan_tiles(dims))
        offsets = torch.tensor([0, *dims]).cumsum(0)
        no_basis = torch.full((len(dims),), -1)
        parts = (offsets, tiles, tile_offsets, no_basis)
        offsets, tiles, tile_offsets, no_basis = (part.to(device) for part in parts)
        return Layout(tuple(dims), offsets, tiles, tile_offsets, no_basis)

    def with_basis(self, kept: Sequence[bool]) -> Layout:
        """The same layout where a basis is kept for the blocks with kept[l]."""
        columns, n_basis = [], 0
        for dim, keep in zip(self.dims, kept):
            columns.append(n_basis if keep else -1)
            n_basis += dim if keep else 0
        n_basis += -n_basis % 4  # rows of whole 16-byte packs, which a GPU reads at once
        return replace(self, basis_offsets=torch.tensor(columns).to(self.offsets), n_basis=n_basis)

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        return tuple(accumulate(self.dims, initial=0))  # on the host, unlike `offsets`

    @property
    def n(self) -> int:
        """Elements of a vector."""
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
        """The columns of a block."""
        return slice(self._starts[block], self._starts[block + 1])

    def basis_columns(self, block: int) -> slice | None:
        """The columns of a block in a kept basis, or None."""
        start = int(self.basis_offsets[block])
        return None if start < 0 else slice(start, start + self.dims[block])
