"""Spectra in TensorBoard, or in any other log whose writer has the methods of SummaryWriter."""

from __future__ import annotations

import math
from typing import Any

from blockhess.report.rows import block_records
from blockhess.spectra import Spectra

# Columns of block_records that are logged.
LOGGED = ("lambda_min", "lambda_max", "trace", "negative_lower", "negative_upper")


def log_spectra(writer: Any, spectra: Spectra, step: int, *, figures: bool = False, prefix: str = "blockhess") -> None:
    """Log JS0, and five scalars of every block.

    Args:
        writer: object with add_scalar(tag, value, step) and, for figures, add_figure(tag, figure, step).
        spectra: result.
        step: of the training.
        figures: also log the plots of the densities and of js_matrix.
        prefix: of all tags.

    Raises:
        ImportError: figures need matplotlib, which is missing.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> log_spectra(SummaryWriter(), spectra, step=100)
    """
    is_compared = len(spectra.comparable_blocks()) >= 2
    if is_compared:
        writer.add_scalar(f"{prefix}/js0", float(spectra.js0()), step)
    for record in block_records(spectra):
        for name in LOGGED:
            if math.isfinite(record[name]):
                writer.add_scalar(f"{prefix}/{name}/{record['block']}", record[name], step)
    if figures:
        writer.add_figure(f"{prefix}/spectra", spectra.plot(), step)
        if is_compared:
            writer.add_figure(f"{prefix}/heatmap", spectra.heatmap(), step)
