"""A training's state on disk, so that an interrupted training goes on where it was.

One file, written as a run's state is (runs/store.py) and as often (runs/checkpoint.py): parameters, buffers, what the
optimizer remembers, the losses so far. Batches are functions of the step, so nothing else is needed; on a CPU the
training goes on to the same bits.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from blockhess.run.storage import store
from blockhess.run.storage.checkpoint import wait_after


class SavedState:
    """Where a training is kept while it is under way.

    Args:
        path: of the file, in a folder that exists.
        told: what the training is, JSON values: a file of another one is not used.

    Example:
        >>> kept = Kept("runs/vgg16/SGD.state", {"rate": 0.01, "seed": 0})
    """

    def __init__(self, path: str | PathLike[str], told: Mapping[str, Any]) -> None:
        self._path, self._told = str(path), dict(told)
        self._before, self._start = 0.0, time.process_time()
        self._due = time.perf_counter() + wait_after(0.0)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the training, that of interrupted processes too, as far as it was saved."""
        return self._before + time.process_time() - self._start

    def load(self, model: nn.Module, optimizer: Optimizer) -> tuple[list[float], float] | None:
        """Bring model and optimizer to where the training was; return its losses and initial loss, None without any.

        What cannot be read, or is of another training, is none.
        """
        try:
            tensors, header = store.read(self._path)
        except ValueError:
            return None
        if header.get("told") != self._told:
            return None
        with torch.no_grad():
            for name, tensor in model.state_dict().items():
                tensor.copy_(tensors[f"model/{name}"])
        states: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, number, *entry = name.split("/")
            if kind == "optimizer":
                states.setdefault(int(number), {})[entry[0]] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": states})
        self._before = float(header["cpu_seconds"])
        return tensors["losses/all"].tolist(), float(header["initial"])

    def after_step(self, model: nn.Module, optimizer: Optimizer, losses: list[float], initial: float) -> None:
        """To be called after every step; saves where it is time."""
        if time.perf_counter() >= self._due:
            self.save(model, optimizer, losses, initial)

    def save(self, model: nn.Module, optimizer: Optimizer, losses: list[float], initial: float) -> None:
        """Write the state.

        Raises:
            OSError: the disk refused; the state before is kept.
        """
        start = time.perf_counter()
        tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items() if value is not None}
        tensors["losses/all"] = torch.tensor(losses, dtype=torch.float64)
        header = {"told": self._told, "initial": initial, "cpu_seconds": self.cpu_seconds}
        store.write(self._path, tensors, header)
        now = time.perf_counter()
        self._due = now + wait_after(now - start)

    def remove(self) -> None:
        """Remove the file: the training is done."""
        for end in ("", ".previous", ".new"):
            with contextlib.suppress(OSError):
                store.disk.unlink(f"{self._path}{end}")
