"""BERT as in the blog named by the paper: two post-LayerNorm layers, next-sentence and masked-LM heads.

    x = token(t) + segment(s) + sinusoid;  x = norm(x + attn(x));  x = norm(x + fc2(gelu(fc1(x))))  per layer

Unlike in the original, there is no LayerNorm after the embedding, attention and MLP of a layer share one LayerNorm,
positions are fixed sinusoids, and the heads are single linear layers, not tied to the embedding. Token 0 is padding and
is masked in attention. There is no dropout, since a Hessian needs a deterministic loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockhess.models.gpt import check_tokens

# Label of the positions that the masked-LM loss ignores.
IGNORED = -100


@dataclass(frozen=True)
class BERTConfig:
    """Sizes of a `BERT`; the defaults are the blog's, with a vocabulary that gives the 40M parameters of the paper.

    The blog trains its WordPiece vocabulary on the data; the paper does not state its size.
    """

    vocab_size: int = 16_800
    context: int = 64
    num_layers: int = 2
    num_heads: int = 12
    width: int = 768

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"BERTConfig: {name} must be at least 1, got {value}")
        if self.width % self.num_heads or self.width % 2:
            raise ValueError(
                f"BERTConfig: width must be even and a multiple of num_heads = {self.num_heads}, got {self.width}"
            )


class Embedding(nn.Module):
    """Sum of token, segment (0 for padding, 1 and 2) and fixed sinusoidal position embeddings."""

    position: Tensor

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocab_size, config.width, padding_idx=0)
        self.segment = nn.Embedding(3, config.width, padding_idx=0)
        self.register_buffer("position", sinusoids(config.context, config.width), persistent=False)

    def forward(self, tokens: Tensor, segments: Tensor) -> Tensor:
        return self.token(tokens) + self.segment(segments) + self.position[: tokens.shape[-1]]  # type: ignore[no-any-return]


def sinusoids(length: int, width: int) -> Tensor:
    """Return position embeddings (length, width): sin and cos of t / 10000^(2 i / width), alternating.

    Source: Vaswani et al. 2017, section 3.5.
    """
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


class EncoderLayer(nn.Module):
    """Bidirectional attention and an MLP, each followed by the same LayerNorm."""

    def __init__(self, config: BERTConfig) -> None:
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.layernorm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output_linear = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, attended: Tensor) -> Tensor:
        q, k, v = (
            linear(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=attended)
        x = self.layernorm(x + self.output_linear(y.transpose(1, 2).flatten(2)))
        return self.layernorm(x + self.fc2(F.gelu(self.fc1(x))))  # type: ignore[no-any-return]


class Head(nn.Module):
    """A linear layer, named as in Figure 4 (b)."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)  # type: ignore[no-any-return]


class BERT(nn.Module):
    """Encoder of sentence pairs.

    Initialized from torch's global generator with the defaults of torch: embeddings N(0, 1), linear layers uniform.

    Args:
        config: sizes; the default is the paper's BERT (40M).

    Source: Devlin et al. 2018; Zhang et al. 2024, appendix C.1, which names the blog.

    Example:
        >>> model = BERT(BERTConfig(vocab_size=10, context=8, num_layers=1, num_heads=2, width=16))
        >>> tokens = torch.ones(3, 8, dtype=torch.int64)
        >>> [logits.shape for logits in model(tokens, tokens)]
        [torch.Size([3, 2]), torch.Size([3, 8, 10])]
    """

    def __init__(self, config: BERTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or BERTConfig()
        self.embedding = Embedding(config)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))
        self.next_sentence = Head(config.width, 2)
        self.mask_lm = Head(config.width, config.vocab_size)

    def forward(self, tokens: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of "B follows A" (batch, 2) and of every token (batch, length, vocab_size).

        Args:
            tokens, segments: (batch, length) int64.

        Raises:
            ValueError: length exceeds the context.
        """
        if tokens.shape[-1] > self.config.context:
            raise ValueError(
                f"BERT: tokens must have length <= context = {self.config.context}, got {tokens.shape[-1]}"
            )
        attended = (tokens != 0)[:, None, None, :]
        x = self.embedding(tokens, segments)
        for layer in self.encoder:
            x = layer(x, attended)
        return self.next_sentence(x[:, 0]), self.mask_lm(x)

    def paper_blocks(self, figure: bool) -> dict[str, str]:
        """Return block name -> parameter: all but LayerNorm; for Figure 4 (b), the 16 weights."""
        names = [name for name, _ in self.named_parameters() if ".layernorm." not in name]
        if figure:
            return {name.removesuffix(".weight"): name for name in names if name.endswith("weight")}
        return {name: name for name in names}


class MaskedPairs(NamedTuple):
    """A batch for BERT: sentence pairs with some tokens masked.

    Attributes:
        tokens, segments: (batch, context) int64, 0 for padding.
        labels: (batch, context) int64, the masked tokens, IGNORED elsewhere.
        is_next: (batch,) int64, 1 where the second sentence follows the first.
    """

    tokens: Tensor
    segments: Tensor
    labels: Tensor
    is_next: Tensor


def masked_pair_loss(model: nn.Module, batch: MaskedPairs) -> tuple[Tensor, float]:
    """Return the next-sentence plus masked-LM cross-entropy in nats, and the number of pairs as its weight.

    Args:
        model: maps tokens and segments to the two logits of `BERT`.
        batch: MaskedPairs.

    Example:
        >>> model = BERT(BERTConfig(vocab_size=10, context=8, num_layers=1, num_heads=2, width=16))
        >>> tokens = torch.ones(3, 8, dtype=torch.int64)
        >>> masked_pair_loss(model, MaskedPairs(tokens, tokens, tokens, tokens[:, 0]))[1]
        3.0
    """
    check_tokens(model, batch.tokens, batch.segments, batch.labels)
    following, masked = model(batch.tokens, batch.segments)
    loss = F.cross_entropy(following, batch.is_next)
    loss = loss + F.cross_entropy(masked.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORED)
    return loss, float(len(batch.is_next))
