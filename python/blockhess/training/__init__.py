"""Training as the paper does it: its Algorithms 1-3, learning-rate grids, checkpoints, and the spectra of those."""

from __future__ import annotations

from blockhess.training.checkpoints import load_checkpoint, save_checkpoint, spectra_of_checkpoints
from blockhess.training.kept import Kept
from blockhess.training.loop import Training, learning_rate, train
from blockhess.training.optimizers import OPTIMIZERS, AdamUncorrected, make_optimizer

__all__ = [
    "OPTIMIZERS",
    "AdamUncorrected",
    "Kept",
    "Training",
    "learning_rate",
    "load_checkpoint",
    "make_optimizer",
    "save_checkpoint",
    "spectra_of_checkpoints",
    "train",
]
