"""Networks for the calibration: language models (LSTM, bigrams, causal convolutions), a plain CNN and an MLP-Mixer."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LSTM(nn.Module):
    """Language model: embedding, one LSTM layer, linear head; PyTorch's default initialization.

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


class Bigrams(nn.Module):
    """Softmax regression of the next token on the token, from logits 0: a row of weights for every token, and a bias.

    Example:
        >>> Bigrams(10)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.rows = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.rows.weight)
        self.bias = nn.Parameter(torch.zeros(vocab_size))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, length, vocab_size) of tokens (batch, length) int64."""
        return self.rows(tokens) + self.bias  # type: ignore[no-any-return]


class WordMLP(nn.Module):
    """Language model with one hidden layer on the embeddings of the last `reach` tokens (Bengio et al. 2003), or with
    several layers of causal convolutions of that reach; PyTorch's default initialization.

    Example:
        >>> WordMLP(vocab_size=10, width=8, reach=3)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(self, vocab_size: int, width: int, reach: int, num_layers: int = 1) -> None:
        super().__init__()
        self.reach = reach
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(nn.Conv1d(width, width, reach) for _ in range(num_layers))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, length, vocab_size) of tokens (batch, length) int64."""
        x = self.embedding(tokens).transpose(1, 2)
        for layer in self.layers:
            x = F.relu(layer(F.pad(x, (self.reach - 1, 0))))
        return self.head(x.transpose(1, 2))  # type: ignore[no-any-return]


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


class CausalLinear(nn.Linear):
    """A linear layer whose output k depends on the inputs 0 ... k only: its weight is used below the diagonal."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.tril(), self.bias)


class MixerLayer(nn.Module):
    """One pre-LayerNorm layer of an MLP-Mixer over (batch, length, width): `positions` mixes the positions of every
    channel, then an MLP the channels of every position.
    """

    def __init__(self, positions: nn.Module, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.positions = positions
        self.channels = _mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm2(x))  # type: ignore[no-any-return]


def _mlp(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class ImageMixer(nn.Module):
    """MLP-Mixer for 28 x 28 gray images in patches of 7 (Tolstikhin et al. 2021); PyTorch's default initialization.

    Example:
        >>> ImageMixer(width=8, num_layers=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, width: int, num_layers: int, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 7, stride=7)
        self.layers = nn.Sequential(*(MixerLayer(_mlp(16), width) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, num_classes) of images (batch, 1, 28, 28)."""
        x = self.layers(self.patches(images).flatten(2).transpose(1, 2))
        return self.head(self.norm(x).mean(1))  # type: ignore[no-any-return]


class WordMixer(nn.Module):
    """Language model of causal mixer layers between an embedding and a linear head; PyTorch's default initialization.

    Example:
        >>> WordMixer(vocab_size=10, context=5, width=8, num_layers=1)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 10])
    """

    def __init__(self, vocab_size: int, context: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.Sequential(*(MixerLayer(CausalLinear(context, context), width) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits (batch, length, vocab_size) of tokens (batch, length) int64."""
        return self.head(self.norm(self.layers(self.embedding(tokens))))  # type: ignore[no-any-return]
