"""The processes that share one call of `spectrum`: who does what, what they tell each other, and how they end together.

    rank = work_rank * data_size + data_rank          world = work_size x data_size, a mesh

Ranks of one row (the same work_rank) hold different batches and make the same recurrences, whose products they sum;
ranks of one column hold the same batches and make different recurrences.

Promises: whoever waits for another rank looks whether some rank has failed, and then raises too, so an error ends all;
waiting has no time limit, since units of work take as long as they take.
"""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup, Sums

Parallel: TypeAlias = str | tuple[int, int] | None

POLL_SECONDS = 0.005


class RankError(RuntimeError):
    """Another process failed; the message says which one and how. Its own error is raised there."""


class Processes(ProcessGroup):
    """This process among those of torch.distributed's default group.

    Args:
        work_size, data_size: the mesh; their product is the world size.
        root: the store of the default group.

    The groups and the part of the store are the call's own, so that a failed call leaves nothing behind for the next.
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
        """Makes the groups of those that share batches, once all ranks are known to want the same mesh."""
        if self.data_size == 1:
            return
        for first in range(0, self.size, self.data_size):
            group = dist.new_group(list(range(first, first + self.data_size)))
            if first == self.work_rank * self.data_size:
                self._data = group

    def gather(self, value: Any) -> list[Any]:
        """As in `ProcessGroup`."""
        self._meet(f"meeting {next(self._meetings)}")
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def sums(self) -> Sums:
        """As in `ProcessGroup`."""
        return Sums(self._data, self._wait)

    def check(self) -> None:
        """As in `ProcessGroup`."""
        if self._store.check(["failed"]):
            raise RankError(f"spectrum: {self._store.get('failed').decode()}; see that rank's own error")

    def fail(self, error: BaseException) -> None:
        """Tells the others."""
        if not isinstance(error, RankError):
            self._store.set("failed", f"rank {self.rank} failed with {type(error).__name__}: {error}")

    def close(self) -> None:
        """Gives up the groups."""
        for group in (self._data, self._control):
            if group is not None:
                dist.destroy_process_group(group)

    def leave(self) -> None:
        """Waits until nobody needs this rank any more."""
        self._meet("end")

    def _meet(self, name: str) -> None:
        """Waits until all ranks are here, however long that takes."""
        present = self._store.add(name, 1)
        while present < self.size:
            self.check()
            time.sleep(POLL_SECONDS)
            present = self._store.add(name, 0)

    def _wait(self, work: Any) -> None:
        """For a collective operation, as long as no rank has failed."""
        if dist.get_backend(self._data) != "gloo":
            work.wait()  # for the stream, not for the host; NCCL's watchdog ends what never comes
            return
        while True:
            try:
                work.wait(timedelta(seconds=1))
                return
            except RuntimeError:
                self.check()
                if work.is_completed():
                    raise


@contextmanager
def joined(parallel: Parallel) -> Iterator[ProcessGroup]:
    """The ranks among which a call is shared; whatever is raised inside ends the call on all of them.

    Args:
        parallel: None: this process alone, whatever process groups there are. "work": all processes of the default
            group share recurrences. "data": they share batches. (work, data): both.

    Raises:
        ValueError: torch.distributed is not initialised, or the world is not work x data.
        RankError: another rank failed.
    """
    if parallel is None:
        yield SINGLE_PROCESS
        return
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            f"spectrum: parallel={parallel!r} needs torch.distributed.init_process_group() before, in processes that "
            "torchrun starts; see docs/distributed.md"
        )
    world = dist.get_world_size()
    shape = _mesh(parallel, world)
    assert dist.group.WORLD is not None
    ranks = Processes(*shape, dist.group.WORLD.get_group_store())
    try:
        ranks.agree({"parallel": str(parallel), "torch": str(torch.__version__)})
        ranks.connect()
        yield ranks
        ranks.leave()
    except BaseException as error:
        ranks.fail(error)
        raise
    finally:
        ranks.close()


def _mesh(parallel: str | tuple[int, int], world: int) -> tuple[int, int]:
    if parallel == "work":
        return world, 1
    if parallel == "data":
        return 1, world
    valid = isinstance(parallel, Sequence) and len(parallel) == 2 and all(type(n) is int and n > 0 for n in parallel)
    if not valid or isinstance(parallel, str) or parallel[0] * parallel[1] != world:
        raise ValueError(
            f"spectrum: parallel must be None, 'work', 'data' or (work, data) whose product is the world size {world}, "
            f"got {parallel!r}"
        )
    return parallel
