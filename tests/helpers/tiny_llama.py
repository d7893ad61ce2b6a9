"""A layer like those of Llama: RMSNorm, rotary embeddings, grouped-query attention, SwiGLU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEADS, GROUPS, HEAD_DIM, HIDDEN = 4, 2, 4, 10


class LlamaLayer(nn.Module):
    """A layer for one sequence (length, width): grouped-query attention with 4 queries and 2 keys, then SwiGLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before_attention, self.before_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.query = nn.Linear(width, HEADS * HEAD_DIM, bias=False)
        self.key = nn.Linear(width, GROUPS * HEAD_DIM, bias=False)
        self.value = nn.Linear(width, GROUPS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, width, bias=False)
        self.gate, self.up = nn.Linear(width, HIDDEN, bias=False), nn.Linear(width, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.before_attention(x)
        q, k, v = (
            linear(normed).unflatten(-1, (-1, HEAD_DIM)).transpose(0, 1).unsqueeze(0)
            for linear in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(mixed.squeeze(0).transpose(0, 1).flatten(1))
        normed = self.before_mlp(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


def rotated(x: Tensor) -> Tensor:
    """Rotate pairs of entries of (..., length, dim) by angles that grow with the position."""
    length, dim = x.shape[-2:]
    rates = 10.0 ** -torch.arange(0, dim // 2, dtype=x.dtype)
    angles = torch.arange(length, dtype=x.dtype)[:, None] * rates
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
