"""Two more networks for the calibration: an LSTM language model and a plain CNN with or without BatchNorm."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


class LSTM(nn.Module):
    """Character language model: embedding, one LSTM layer, linear head; PyTorch's default initialization.

    The recurrence is a loop over nn.LSTMCell, since the fused one has no second derivative on GPUs.

    Example:
        >>> LSTM(vocab_size=10, width=8)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.cell = nn.LSTMCell(width, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, length, vocab_size) of tokens (batch, length) int64."""
        state, outputs = None, []
        for x in self.embedding(tokens).unbind(1):
            state = self.cell(x, state)
            outputs.append(state[0])
        return self.head(torch.stack(outputs, 1))  # type: ignore[no-any-return]


class CNN(nn.Sequential):
    """Image classifier of 3x3 convolutions with stride 2 and ReLU, optionally BatchNorm, and a linear head.

    PyTorch's default initialization.

    Example:
        >>> CNN((4, 8), batch_norm=True)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, widths: tuple[int, ...], *, batch_norm: bool, in_channels: int = 1, num_classes: int = 10):
        layers: list[nn.Module] = []
        for channels, width in itertools.pairwise((in_channels, *widths)):
            layers.append(nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=not batch_norm))
            layers += [nn.BatchNorm2d(width), nn.ReLU()] if batch_norm else [nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
