"""Figures free of pyplot and any display; matplotlib is imported on first use."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours of the optimizers, apart for colour-blind readers and in grey print.
GD_COLOR, ADAM_COLOR, ADAM_ONE_COLOR = "#08519c", "#d95f02", "#1b9e77"


def new_figure(width: float, height: float, dpi: int = 150) -> Figure:
    """Return an empty figure of so many inches, each of dpi pixels.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError('paper: pictures need matplotlib; type: pip install "blockhess[cli]"') from None
    return Figure(figsize=(width, height), layout="constrained", dpi=dpi)
