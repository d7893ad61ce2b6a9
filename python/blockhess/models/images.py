"""The check of the inputs of image classifiers."""

from __future__ import annotations

from torch import Tensor


def check_images(op: str, images: Tensor, channels: int) -> None:
    """Raise ValueError, naming `op`, unless images are (batch, channels, height, width)."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"{op}: images must be (batch, {channels}, height, width), got {tuple(images.shape)}")
