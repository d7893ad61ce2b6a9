"""What an image classifier may be given, said once."""

from __future__ import annotations

from torch import Tensor


def check_images(op: str, images: Tensor, channels: int) -> None:
    """Refuse what are no images of so many channels.

    Raises:
        ValueError: names op.
    """
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"{op}: images must be (batch, {channels}, height, width), got {tuple(images.shape)}")
