"""Spectra of a model in training, every so many steps, on fixed data.

    watch = SpectrumMonitor(batch, loss_fn, every=100, folder="spectra")
    for step, batch in enumerate(batches):
        watch(model, step)
        ...

The training is unchanged bit by bit: its random numbers, model, gradients and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

import blockhess
from blockhess.integrations import tensorboard
from blockhess.problem.batches import as_batches, map_tensors
from blockhess.problem.losses import make_loss
from blockhess.problem.model_state import fixed_random_numbers
from blockhess.results.files import writable_folder
from blockhess.spectra import Spectra


class SpectrumMonitor:
    """Compute spectra at some steps of a training, save them and log them.

    Args:
        data, loss_fn: as for `spectrum`. The data are drawn once, here, and are moved to the model's device.
        every: compute at the steps that are multiples of this.
        folder: for the files "step_00000100.npz" and so on, which `blockhess report` reads together; made if it is
            missing. None saves nothing.
        writer: object with add_scalar(tag, value, step), such as TensorBoard's SummaryWriter; see
            tensorboard.log_spectra.
        options: other arguments of `spectrum`. By default, non-finite blocks are marked in the result instead of
            raising an error, which would end the training.

    Raises:
        ValueError: every is below 1, the folder cannot be written, or data hold no batch.

    Example:
        >>> watch = SpectrumMonitor(batch, torch.nn.CrossEntropyLoss(), every=100, folder="spectra", num_probes=4)
        >>> spectra = watch(model, step=0)
    """

    def __init__(
        self,
        data: Any,
        loss_fn: Callable[..., Any] | None = None,
        *,
        every: int,
        folder: str | PathLike[str] | None = "blockhess-spectra",
        writer: Any = None,
        **options: Any,
    ) -> None:
        if every < 1:
            raise ValueError(f"SpectrumMonitor: every must be at least 1, got {every}")
        self.every, self.writer = every, writer
        self.folder: Path | None = None if folder is None else writable_folder(folder)
        self._loss_fn = loss_fn
        self._options: dict[str, Any] = {"on_nonfinite": "mark", "progress": False} | options
        with fixed_random_numbers():  # a DataLoader draws some
            self._batches = as_batches(data, pairs=make_loss(loss_fn).pairs)
        self._last: int | None = None

    def __call__(self, model: nn.Module, step: int) -> Spectra | None:
        """Compute the spectra of the model if the training's step is a multiple of `every`.

        Returns:
            The spectra, with "step" in their provenance; None at other steps, or if the step is that of the last call.
        """
        if step % self.every or step == self._last:
            return None
        self._last = step
        device = next(model.parameters()).device
        batches = [map_tensors(lambda t: t.to(device), batch) for batch in self._batches]
        found = blockhess.spectrum(model, batches, self._loss_fn, **self._options)
        spectra = Spectra(found.blocks, found.quadrature, found.provenance | {"step": step})
        if self.folder is not None:
            spectra.save(self.folder / f"step_{step:08d}.npz")
        if self.writer is not None:
            tensorboard.log_spectra(self.writer, spectra, step)
        return spectra
