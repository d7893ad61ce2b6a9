"""The state of an unfinished training on disk, from which an interrupted training resumes.

One file, written like the state of a run (run/storage/store.py) and as often (run/storage/checkpoint.py), holds
parameters, buffers, the optimizer's state and the losses so far. Batches depend only on the step, so nothing else is
needed; on a CPU a resumed training is bitwise equal.
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
    """The saved state of an unfinished training.

    Args:
        path: the file, in an existing folder.
        settings: JSON values that identify the training; a file with other settings is ignored.

    Example:
        >>> state = SavedState("runs/vgg16/SGD.state", {"rate": 0.01, "seed": 0})
    """

    def __init__(self, path: str | PathLike[str], settings: Mapping[str, Any]) -> None:
        self._path, self._told = str(path), dict(settings)
        self._before, self._start = 0.0, time.process_time()
        self._due = time.perf_counter() + wait_after(0.0)

    @property
    def cpu_seconds(self) -> float:
        """Processor time of the training, including the saved time of interrupted processes."""
        return self._before + time.process_time() - self._start

    def load(self, model: nn.Module, optimizer: Optimizer) -> tuple[list[float], float] | None:
        """Restore model and optimizer and return losses and initial loss; return None without a usable file.

        A file that cannot be read, or has other settings, is not usable.
        """
        try:
            tensors, header = store.read(self._path)
        except ValueError:
            return None
        if header.get("settings") != self._told:
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
        """Save the state if the last save was long enough ago; to be called after every step."""
        if time.perf_counter() >= self._due:
            self.save(model, optimizer, losses, initial)

    def save(self, model: nn.Module, optimizer: Optimizer, losses: list[float], initial: float) -> None:
        """Write the state.

        Raises:
            OSError: the file could not be written; the previous state remains.
        """
        start = time.perf_counter()
        tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
        for number, state in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{number}/{name}": value for name, value in state.items() if value is not None}
        tensors["losses/all"] = torch.tensor(losses, dtype=torch.float64)
        header = {"settings": self._told, "initial": initial, "cpu_seconds": self.cpu_seconds}
        store.write(self._path, tensors, header)
        now = time.perf_counter()
        self._due = now + wait_after(now - start)

    def remove(self) -> None:
        """Remove the file of a finished training."""
        for end in ("", ".previous", ".new"):
            with contextlib.suppress(OSError):
                store.disk.unlink(f"{self._path}{end}")
