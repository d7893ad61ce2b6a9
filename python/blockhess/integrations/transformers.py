"""Spectra during a training by Transformers' Trainer."""

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
    """Hands the model to a SpectrumMonitor at the start and after every optimizer step, in the main process only.

    Args:
        watch: what to compute, and when; steps are the Trainer's global steps.

    Example:
        >>> watch = SpectrumMonitor(batch, every=100, folder="spectra", num_probes=4)
        >>> Trainer(model, arguments, train_dataset=dataset, callbacks=[SpectrumCallback(watch)]).train()
    """

    def __init__(self, watch: SpectrumMonitor) -> None:
        self.watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the model before the first step."""
        self._look(state, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the model after an optimizer step."""
        self._look(state, **kwargs)

    def _look(self, state: Any, model: Any = None, **_: Any) -> None:
        if state.is_world_process_zero:
            self.watch(model, state.global_step)
