"""Training with the paper's Algorithms 1 to 3, checkpoints and their spectra; Figures 1, 10, 11 and the calibration."""

from __future__ import annotations

from blockhess.integrations.checkpoints import load_checkpoint, save_checkpoint, spectra_of_checkpoints
from blockhess_paper.training.loop import Training, learning_rate, train
from blockhess_paper.training.optimizers import OPTIMIZERS, AdamUncorrected, make_optimizer
from blockhess_paper.training.saved_state import SavedState

__all__ = [
    "OPTIMIZERS",
    "AdamUncorrected",
    "SavedState",
    "Training",
    "learning_rate",
    "load_checkpoint",
    "make_optimizer",
    "save_checkpoint",
    "spectra_of_checkpoints",
    "train",
]
