"""Spectra during a training by Lightning's Trainer."""

from __future__ import annotations

from typing import Any

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError:
        raise ImportError("blockhess.integrations.lightning needs lightning; type: pip install lightning") from None

from blockhess.integrations.watch import SpectrumMonitor


class SpectrumCallback(Callback):  # type: ignore[misc]
    """Hands the LightningModule to a SpectrumMonitor at the start and after every optimizer step, in the main process only.

    Args:
        watch: what to compute, and when; steps are the Trainer's global steps, and the loss_fn is given the module.

    Example:
        >>> watch = SpectrumMonitor(batch, lambda module, batch: module.loss(batch), every=100, folder="spectra")
        >>> lightning.pytorch.Trainer(callbacks=[SpectrumCallback(watch)]).fit(module, loader)
    """

    def __init__(self, watch: SpectrumMonitor) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the module before the first step."""
        self._look(trainer, pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the module after a batch, which may have ended an optimizer step."""
        self._look(trainer, pl_module)

    def _look(self, trainer: Any, module: Any) -> None:
        if trainer.is_global_zero:
            self.watch(module, trainer.global_step)
