"""The processes that share one call of `spectrum`: who does what, what they tell each other, and how they end together.

    rank = work_rank * data_size + data_rank          world = work_size x data_size, a mesh

Ranks of one row (the same work_rank) hold different batches and make the same recurrences, whose products they sum;
ranks of one column hold the same batches and make different recurrences.

Promises: whoever waits for another rank looks whether some rank has failed, and then raises too, so an error ends all;
waiting has no time limit, since units of work take as long as they take.
"""

from __future__ import annotations

import hashlib
import itertools
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore

from blockhess._text import format_table
from blockhess.problem.batches import Batch

Parallel: TypeAlias = str | tuple[int, int] | None

# Blocks are summed together until they have so many bytes, so that small ones do not cost a round each.
BUCKET_BYTES = 2**22
POLL_SECONDS = 0.005


class RankError(RuntimeError):
    """Another process failed; the message says which one and how. Its own error is raised there."""


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
        """As in `Ranks`."""
        self._meet(f"meeting {next(self._meetings)}")
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self._control)
        return found

    def sums(self) -> Sums:
        """As in `Ranks`."""
        return Sums(self._data, self._wait)

    def check(self) -> None:
        """As in `Ranks`."""
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


def refuse_sharded(model: nn.Module) -> None:
    """Refuses models of which this process holds a part only.

    Raises:
        NotImplementedError: says what to do.
    """
    sharded = next((n for n, p in model.named_parameters() if type(p).__name__ in ("DTensor", "FlatParameter")), None)
    if sharded is None:
        sharded = next((n for n, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    if sharded is not None:
        raise NotImplementedError(
            f"spectrum: model must hold whole parameters, got {sharded!r} as a shard (FSDP or tensor parallelism); "
            "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)), load them into a plain model on every rank, and pass that with "
            "parallel='work' or 'data'"
        )


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


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
