"""Spectra during a training with Lightning's Trainer."""

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
    """Call a SpectrumMonitor before the first step and after every optimizer step, in the main process only.

    Args:
        watch: monitor; its steps are the Trainer's global steps, and its loss_fn is called with the LightningModule.

    Example:
        >>> watch = SpectrumMonitor(batch, lambda module, batch: module.loss(batch), every=100, folder="spectra")
        >>> lightning.pytorch.Trainer(callbacks=[SpectrumCallback(watch)]).fit(module, loader)
    """

    def __init__(self, watch: SpectrumMonitor) -> None:
        self.watch = watch

    def on_train_start(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Call the monitor, which ignores batches that end without a new step, as with accumulated gradients."""
        if trainer.is_global_zero:
            self.watch(pl_module, trainer.global_step)

    on_train_batch_end = on_train_start
