"""The processes that share one problem: what one process does alone, and the interface of several.

rank = work_rank * data_size + data_rank          world = work_size x data_size, a mesh
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

# Blocks are summed together until they have so many bytes, so that small ones do not cost a round each.
BUCKET_BYTES = 2**22


class ProcessGroup:
    """One process that has all the work to itself, as `Processes` are several.

    Attributes:
        rank, size: of all. work_rank, work_size: among those that share recurrences. data_rank, data_size: among those
            that share batches.
    """

    rank = work_rank = data_rank = 0
    size = work_size = data_size = 1

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        return [value]

    def row(self, value: Any) -> list[Any]:
        """The values of the ranks that share this one's recurrences. To be called by all ranks."""
        first = self.work_rank * self.data_size
        return self.gather(value)[first : first + self.data_size]

    def agree(self, values: Mapping[str, Any]) -> None:
        """Refuses ranks that differ, with the same error on all of them.

        Raises:
            ValueError: with a table of what differs.
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
        """This rank's batches and the fingerprint of all: every data_size-th one where all ranks were given the same,
        else the rank's own.

        Raises:
            ValueError: fewer batches than ranks to share them, or ranks with neither the same batches nor their own.
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
        """What adds up products over the ranks that share batches."""
        return Sums(None, self._wait)

    def check(self) -> None:
        """Raises if another rank has failed.

        Raises:
            RankError: says which and how.
        """

    def _wait(self, work: Any) -> None:
        raise NotImplementedError


SINGLE_PROCESS = ProcessGroup()


class Sums:
    """Adds up tensors over ranks while the caller goes on computing.

    Args:
        group: of the ranks, or None where there is one only.
        wait: waits for an operation.
    """

    def __init__(self, group: dist.ProcessGroup | None, wait: Callable[[Any], None]) -> None:
        self._group, self._wait = group, wait
        self._bucket: list[Tensor] = []
        self._last: Tensor | None = None
        self._flying: list[tuple[Any, Tensor, list[Tensor]]] = []

    def add(self, part: Tensor) -> None:
        """Takes this rank's part of a sum, which the sum will replace by the time of `finish`."""
        if self._group is None:
            return
        self._bucket.append(part)
        self._last = part
        if sum(t.numel() * t.itemsize for t in self._bucket) >= BUCKET_BYTES:
            self._send()

    def finish(self, count: int) -> int:
        """Waits for all sums, and for that of the ranks' counts, which it returns."""
        if self._last is None:
            return count
        counts = self._last.new_full((1,), count)
        self._bucket.append(counts)
        self._send()
        while self._flying:
            self._land()
        return int(counts)

    def _send(self) -> None:
        if len(self._flying) > 1:  # two buffers, not all
            self._land()
        parts, self._bucket = self._bucket, []
        flat = torch.cat([part.reshape(-1) for part in parts])
        self._flying.append((dist.all_reduce(flat, group=self._group, async_op=True), flat, parts))

    def _land(self) -> None:
        work, flat, parts = self._flying.pop(0)
        self._wait(work)
        for part, total in zip(parts, torch.split(flat, [part.numel() for part in parts])):
            part.copy_(total.view_as(part))
        if flat.is_cuda:
            # Ranks must learn at the same step that a recurrence has finished, or some would wait for sums of others.
            torch.cuda.current_stream().synchronize()


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
