"""Writes of states under random faults: after every one the old or the new state is read, never an error."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import torch

from blockhess.run.storage import store
from tests.fuzz.targets import Target, require
from tests.helpers import faulty_disk
from tests.helpers.faulty_disk import FaultyDisk, Killed

FAULTS = (
    faulty_disk.kill, faulty_disk.kill_halfway, faulty_disk.kill_after, faulty_disk.disk_full, faulty_disk.broken,
    faulty_disk.short,
)  # fmt: skip
CALLS = 20  # of the disk, more than one write makes


class StateCrashes(Target):
    """blockhess.run.storage.store.write: an input is "accepted" where every write of a sequence went through."""

    name = "crashes"

    def run(self, seed: int, index: int) -> bool:
        path = self.folder / "state.safetensors"
        for file in self.folder.glob("state*"):
            file.unlink()
        store.write(path, *content(0, 3))
        held, whole = 0, True
        rng = random.Random(f"{self.name} {seed} {index}")
        for number in range(1, rng.randrange(2, 7)):
            size = rng.randrange(40)
            store.disk = FaultyDisk(rng.randrange(CALLS), rng.choice(FAULTS))
            try:
                with contextlib.suppress(Killed, OSError):
                    store.write(path, *content(number, size))
                    held = number
            finally:
                store.disk = store.Disk()
            tensors, header = store.read(path)
            got = header["number"]
            require(got in (held, number), f"state {got} was read after a write of {number} over {held}")
            same = torch.equal(tensors["a"], content(got, header["size"])[0]["a"])
            require(same, f"state {got} is not what was written")
            whole, held = whole and held == number, got
        return whole


def content(number: int, size: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    return {"a": torch.arange(size) * number}, {"number": number, "size": size}
