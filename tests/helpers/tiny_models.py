"""Models so small that their Hessians can be written out, and data for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def labeled(n: int) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3), torch.randint(3, (n,))


class SelfAttention(nn.Module):
    """One causal attention layer; F.scaled_dot_product_attention takes a fused kernel unless told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(4, 12)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2).mean(1))


class TorchAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))


class TiedLanguageModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.mix = nn.Linear(3, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(x)))).flatten(0, 1)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True, dropout=0.5, num_layers=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0].sum(1)


def convolutional() -> nn.Sequential:
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3)
    )
    net(torch.randn(8, 1, 4, 4))  # running statistics that are not those of the batch
    return net


CASES = {
    "mlp": (mlp, lambda: labeled(7)),
    "convolution and BatchNorm": (convolutional, lambda: (torch.randn(6, 1, 4, 4), torch.randint(3, (6,)))),
    "attention": (SelfAttention, lambda: (torch.randn(2, 3, 4), torch.randint(2, (2,)))),
    "nn.MultiheadAttention": (TorchAttention, lambda: (torch.randn(2, 3, 4), torch.randint(2, (2,)))),
    "encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(4, 2, 3, batch_first=True), nn.Flatten()),
        lambda: (torch.randn(2, 2, 4), torch.randint(8, (2,))),
    ),
    "tied embedding": (TiedLanguageModel, lambda: (torch.randint(5, (2, 3)), torch.randint(5, (6,)))),
    "LSTM": (Recurrent, lambda: (torch.randn(2, 3, 3), torch.randint(2, (2,)))),
}
