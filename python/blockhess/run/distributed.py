"""The processes of torch.distributed among which one call of `spectrum` is divided.

    rank = work_rank * data_size + data_rank          world size = work_size * data_size, a mesh

Ranks of one row (equal work_rank) have different batches and compute the same recurrences; their products are summed.
Ranks of one column have the same batches and compute different recurrences.

An error on one rank ends the call on all ranks: a rank that waits for others checks whether one has failed. There is no
time limit for waiting, because units of work may take arbitrarily long. Ranks that wait within the model, as for shards
of FSDP, learn of the error when the process of the failed rank ends.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from blockhess.problem.batches import Batch, first_line
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup, Sums

Parallel: TypeAlias = str | tuple[int, int] | None

POLL_SECONDS = 0.005


class RankError(RuntimeError):
    """Another rank failed; the message contains its error, if that is known."""


class Processes(ProcessGroup):
    """Several processes, those of torch.distributed's default group.

    Every call has groups and store keys of its own, in the default group's store `root`, so that a failed call does not
    affect the next.
    """

    def __init__(self, work_size: int, data_size: int, root: Any) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.work_size, self.data_size = work_size, data_size
        self.work_rank, self.data_rank = divmod(self.rank, data_size)
        self._control = dist.new_group(backend="gloo")
        names: list[str] = [""] * self.size
        dist.all_gather_object(names, uuid.uuid4().hex, group=self._control)
        self._store, self._meetings = PrefixStore(f"blockhess {names[0]}", root), itertools.count()
        self._data: dist.ProcessGroup | None = None

    def connect(self) -> None:
        """Create the groups of ranks that share batches, after all ranks have agreed on the mesh."""
        if self.data_size == 1:
            return
        for first in range(0, self.size, self.data_size):
            group = dist.new_group(list(range(first, first + self.data_size)))
            if first == self.work_rank * self.data_size:
                self._data = group

    def gather(self, value: Any) -> list[Any]:
        self.meet(f"meeting {next(self._meetings)}")
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def sums(self) -> Sums:
        return Sums(self._data, self._wait)

    def check(self) -> None:
        if failure := self._failure():
            raise RankError(failure)

    def _failure(self) -> str:
        failed = self._store.check(["failed"])
        return f"spectrum: {self._store.get('failed').decode()}; see that rank's own error" if failed else ""

    def lost(self, error: BaseException) -> RankError | None:
        """Return the error to raise if another one comes from a collective operation without an answer, or None."""
        cause: BaseException | None = error
        while cause and not (isinstance(cause, dist.DistError) or "gloo/transport" in str(cause)):
            cause = cause.__cause__
        if cause is None or isinstance(error, RankError):
            return None
        with suppress(dist.DistError):  # the process that holds the store may have ended
            if failure := self._failure():
                return RankError(failure)
        return RankError(f"spectrum: a process has ended, or does not answer: {first_line(cause)}")

    def fail(self, error: BaseException) -> None:
        """Report an error to the other ranks."""
        if not isinstance(error, RankError):
            self._store.set("failed", f"rank {self.rank} failed with {type(error).__name__}: {error}")

    def close(self) -> None:
        """Destroy the groups, now: where the garbage collector does it, torch may wait for its threads forever."""
        for group in (self._data, self._control):
            if group is not None:
                dist.destroy_process_group(group)
        del self._data, self._control

    def meet(self, name: str, size: int | None = None) -> None:
        """Wait until all ranks, or so many, have called this with the name."""
        present = self._store.add(name, 1)
        while present < (size or self.size):
            self.check()
            time.sleep(POLL_SECONDS)
            present = self._store.add(name, 0)

    def _wait(self, work: Any) -> None:
        """Wait for a collective operation while no rank has failed."""
        if dist.get_backend(self._data) != "gloo":
            work.wait()  # blocks the stream, not the host; NCCL's watchdog ends operations that never complete
            return
        while True:
            try:
                work.wait(timedelta(seconds=1))
                return
            except RuntimeError:
                self.check()
                if work.is_completed():
                    raise


class Replicas(Processes):
    """Groups of processes that hold shards of one model, and make the same products with the same batches."""

    def connect(self) -> None:
        self._alike = itertools.count()
        if self.work_size == 1:
            return
        for first in range(0, self.size, self.data_size):
            group = dist.new_group(list(range(first, first + self.data_size)), backend="gloo")
            if first == self.work_rank * self.data_size:
                self._data = group

    def same(self, value: Any) -> Any:
        self.meet(f"group {self.work_rank}, {next(self._alike)}", self.data_size)
        found: list[Any] = [None] * self.data_size
        dist.all_gather_object(found, value, group=self._data or self._control)
        return found[0]

    def gather_data_ranks(self, value: Any) -> list[Any]:
        return super().gather_data_ranks(value)[:1]

    def share_batches(self, batches: list[Batch], digest: str) -> tuple[list[Batch], str]:
        self.agree({"data": digest})
        return batches, digest

    def sums(self) -> Sums:
        return Sums()


@contextmanager
def process_group(parallel: Parallel, holders: Sequence[int] = ()) -> Iterator[ProcessGroup]:
    """Yield the processes among which a call is divided; an error raised inside ends the call on all of them.

    Args:
        parallel: as for `spectrum`; None is this process alone, even if torch.distributed is initialized.
        holders: the ranks that hold the shards of the model, if it is sharded.

    Raises:
        ValueError: torch.distributed is not initialized, or its world size is not that of the mesh.
        RankError: another rank failed.
    """
    if parallel is None and not holders:
        yield SINGLE_PROCESS
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"spectrum: parallel={parallel!r} needs torch.distributed.init_process_group() before, in processes that "
            "torchrun starts; see docs/distributed.md"
        )
    assert dist.group.WORLD is not None
    root = dist.group.WORLD.get_group_store()
    world = dist.get_world_size()
    if holders:
        ranks: Processes = Replicas(*_groups(parallel, holders, world), root)
    else:
        assert parallel is not None
        ranks = Processes(*_mesh(parallel, world), root)
    try:
        ranks.agree({"parallel": str(parallel), "torch": str(torch.__version__)})
        ranks.connect()
        yield ranks
        ranks.meet("end")
    except BaseException as error:
        if lost := ranks.lost(error):
            raise lost from error
        ranks.fail(error)
        raise
    finally:
        ranks.close()


def _groups(parallel: Parallel, holders: Sequence[int], world: int) -> tuple[int, int]:
    """Return the number of groups that compute different recurrences, and of the processes of each."""
    if parallel is None:
        return 1, world
    groups, size = world // len(holders), len(holders)
    if groups * size != world or parallel not in ("recurrences", (groups, size)):
        raise ValueError(
            f"spectrum: parallel must be None, 'recurrences' or {groups, size} for a model sharded over {size} of "
            f"{world} processes, got {parallel!r}"
        )
    first = dist.get_rank() // size * size
    if list(holders) != list(range(first, first + size)):
        raise ValueError(
            f"spectrum: parallel={parallel!r} needs a model sharded over neighboring ranks, got ranks {list(holders)}"
        )
    return groups, size


def _mesh(parallel: str | tuple[int, int], world: int) -> tuple[int, int]:
    if parallel == "recurrences":
        return world, 1
    if parallel == "data":
        return 1, world
    valid = isinstance(parallel, Sequence) and len(parallel) == 2 and all(type(n) is int and n > 0 for n in parallel)
    if not valid or isinstance(parallel, str) or parallel[0] * parallel[1] != world:
        raise ValueError(
            f"spectrum: parallel must be None, 'recurrences', 'data' or (recurrences, data) whose product is the world "
            f"size {world}, got {parallel!r}"
        )
    return parallel
