"""Communication between the processes that share one problem; a single process needs none.

    rank = work_rank * data_size + data_rank          world size = work_size * data_size

Ranks of equal work_rank hold different batches and run the same recurrences; ranks of equal data_rank hold the same
batches and run different recurrences.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from blockhess._text import format_table
from blockhess.problem.batches import Batch

# Products are reduced in buckets of at least this many bytes, so that small blocks do not cost a collective each.
BUCKET_BYTES = 2**22


class ProcessGroup:
    """A group of one process; `run.distributed.Processes` is a group of several.

    Attributes:
        rank, size: of all processes.
        work_rank, work_size: among the processes that share recurrences.
        data_rank, data_size: among the processes that share batches.
    """

    rank = work_rank = data_rank = 0
    size = work_size = data_size = 1

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks in rank order, on every rank."""
        return [value]

    def gather_data_ranks(self, value: Any) -> list[Any]:
        """Return the values of the ranks with this work_rank. All ranks must call it."""
        first = self.work_rank * self.data_size
        return self.gather(value)[first : first + self.data_size]

    def same(self, value: Any) -> Any:
        """Return a value, or that of the first process that holds shards of the same model: all must decide alike."""
        return value

    def agree(self, values: Mapping[str, Any]) -> None:
        """Check that all ranks have the same values.

        Raises:
            ValueError: with a table of the differences, on every rank.
        """
        found = self.gather(dict(values))
        rows = [
            [name, *(_short(other[name]) for other in found)]
            for name in values
            if any(other[name] != found[0][name] for other in found)
        ]
        if rows:
            table = format_table(["", *(f"rank {rank}" for rank in range(self.size))], rows, left=1 + self.size)
            raise ValueError(f"spectrum: all ranks must be given the same job and run the same versions, got\n{table}")

    def share_batches(self, batches: list[Batch], digest: str) -> tuple[list[Batch], str]:
        """Return the batches of this rank and a fingerprint of the batches of all ranks.

        Where all ranks have the same batches, each takes every data_size-th; otherwise each keeps its own.

        Raises:
            ValueError: fewer batches than ranks, or batches that are neither the same everywhere nor one set per
                data_rank.
        """
        digests = self.gather(digest)
        if len(set(digests)) == 1:
            if len(batches) < self.data_size:
                raise ValueError(
                    f"spectrum: data must hold a batch for each of the {self.data_size} ranks that share it, got "
                    f"{len(batches)}; pass smaller batches, in a list: the result does not depend on their size"
                )
            return batches[self.data_rank :: self.data_size], digest
        own = digests[: self.data_size]
        if len(set(own)) < self.data_size or own * self.work_size != digests:
            raise ValueError(
                "spectrum: data must be the same on all ranks, or different on each of those that share it and the "
                f"same for ranks {self.data_size} apart, got {len(set(digests))} different sets on {self.size} ranks "
                f"(parallel={self.work_size, self.data_size})"
            )
        return batches, hashlib.blake2b("".join(own).encode(), digest_size=16).hexdigest()

    def sums(self) -> Sums:
        """Return a reduction over the ranks that share batches."""
        return Sums()

    def check(self) -> None:
        """Raise a RankError if another rank has failed."""


SINGLE_PROCESS = ProcessGroup()


class Sums:
    """Asynchronous all-reduce of tensors over ranks.

    Args:
        group: the ranks; None for a single one.
        wait: waits for a collective operation.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, wait: Callable[[Any], None] = lambda _: None) -> None:
        self._group, self._wait = group, wait
        self._bucket: list[Tensor] = []
        self._last: Tensor | None = None
        self._pending: list[tuple[Any, Tensor, list[Tensor]]] = []

    def add(self, part: Tensor) -> None:
        """Start the sum of a tensor over the ranks. `finish` guarantees that the tensor holds the sum."""
        if self._group is None:
            return
        self._bucket.append(part)
        self._last = part
        if sum(t.numel() * t.itemsize for t in self._bucket) >= BUCKET_BYTES:
            self._reduce_bucket()

    def finish(self, count: int) -> int:
        """Wait for all sums and return the sum of `count` over the ranks."""
        if self._last is None:
            return count
        self._bucket.append(counts := self._last.new_full((1,), count))
        self._reduce_bucket()
        while self._pending:
            self._complete()
        return int(counts)

    def _reduce_bucket(self) -> None:
        if len(self._pending) > 1:  # at most two buffers exist at a time
            self._complete()
        parts, self._bucket = self._bucket, []
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._pending.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, parts))

    def _complete(self) -> None:
        work, flat, parts = self._pending.pop(0)
        self._wait(work)
        for part, total in zip(parts, torch.split(flat, [part.numel() for part in parts])):
            part.copy_(total.view_as(part))
        if flat.is_cuda:
            # All ranks must see a recurrence finish at the same step; otherwise some wait for sums that never come.
            torch.cuda.current_stream().synchronize()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
