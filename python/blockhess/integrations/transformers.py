"""Spectra during a training with the Trainer of Transformers."""

from __future__ import annotations

from typing import Any

try:
    from transformers import TrainerCallback
except ImportError:
    raise ImportError(
        "blockhess.integrations.transformers needs transformers; type: pip install transformers"
    ) from None

from blockhess.integrations.watch import SpectrumMonitor


class SpectrumCallback(TrainerCallback):
    """Call a SpectrumMonitor before the first step and after every optimizer step, in the main process only.

    Args:
        watch: monitor; its steps are the Trainer's global steps.

    Example:
        >>> watch = SpectrumMonitor(batch, every=100, folder="spectra", num_probes=4)
        >>> Trainer(model, arguments, train_dataset=dataset, callbacks=[SpectrumCallback(watch)]).train()
    """

    def __init__(self, watch: SpectrumMonitor) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Call the monitor."""
        if state.is_world_process_zero:
            self.watch(model, state.global_step)

    on_step_end = on_train_begin
