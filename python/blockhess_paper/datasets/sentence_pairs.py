"""Sentence pairs for BERT, for next-sentence prediction and masked tokens.

    [CLS] first [SEP] second [SEP] padding       segments 1 ... 1 2 ... 2 0 ... 0

Half of the pairs are consecutive in the source, half are random. 15 % of the tokens are to be predicted: 80 % of them
are replaced by [MASK], 10 % by a random token, 10 % not at all. Batches depend only on the arguments.

Source: Devlin et al. 2018, section 3.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from blockhess_paper.models.bert import IGNORED, MaskedPairs

PADDING, CLS, SEP, MASK = range(4)

# The tokens of the text start at this number.
SPECIAL = 4

MASKED, SHOWN_AS_MASK, SHOWN_AS_OTHER = 0.15, 0.8, 0.1


def masked_pairs(
    pairs: Sequence[tuple[Tensor, Tensor]],
    vocab_size: int,
    num_batches: int = 1,
    *,
    batch_size: int = 8,
    context: int = 64,
    seed: int = 0,
) -> list[MaskedPairs]:
    """Draw batches for BERT.

    Args:
        pairs: consecutive sentences as tokens, int64 in 0 ... vocab_size - SPECIAL - 1; long ones are truncated.
        vocab_size: vocabulary size of the model, including special tokens.
        num_batches: number of batches.
        batch_size: pairs per batch.
        context: tokens per pair, including special tokens.
        seed: random seed.

    Raises:
        ValueError: fewer than two pairs, a size is too small, or a token is outside the vocabulary.

    Example:
        >>> pairs = [(torch.tensor([0, 1]), torch.tensor([2])), (torch.tensor([3]), torch.tensor([1, 1]))]
        >>> [batch] = masked_pairs(pairs, 8, batch_size=5, context=8)
        >>> batch.tokens.shape, batch.is_next.shape
        (torch.Size([5, 8]), torch.Size([5]))
    """
    for name, value, least in (("num_batches", num_batches, 1), ("batch_size", batch_size, 1), ("context", context, 5)):
        if value < least:
            raise ValueError(f"masked_pairs: {name} must be at least {least}, got {value}")
    if len(pairs) < 2:
        raise ValueError(f"masked_pairs: pairs must be at least two, got {len(pairs)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(pairs), (num_batches * batch_size, 2), generator=generator)
    follows = torch.rand(len(chosen), generator=generator) < 0.5
    tokens, segments = torch.zeros(2, len(chosen), context, dtype=torch.int64)
    room = (context - 3) // 2
    for row, ((index, other), follow) in enumerate(zip(chosen.tolist(), follows.tolist())):
        first, second = pairs[index][0][:room], pairs[index if follow else other][1][:room]
        ends = torch.tensor([SEP])
        line = torch.cat([torch.tensor([CLS]), first + SPECIAL, ends, second + SPECIAL, ends])
        tokens[row, : len(line)] = line
        segments[row, : len(line)] = 2
        segments[row, : len(first) + 2] = 1
    if int(tokens.max()) >= vocab_size:
        raise ValueError(f"masked_pairs: tokens must be below vocab_size = {vocab_size}, got {int(tokens.max())}")
    labels = _masked(tokens, vocab_size, generator)
    parts = (torch.split(t, batch_size) for t in (tokens, segments, labels, follows.long()))
    return [MaskedPairs(*batch) for batch in zip(*parts)]


def _masked(tokens: Tensor, vocab_size: int, generator: torch.Generator) -> Tensor:
    """Mask tokens in place, at least one per row, and return the labels."""
    draw = torch.rand(tokens.shape, generator=generator).masked_fill(tokens < SPECIAL, 2.0)
    asked = draw < MASKED
    asked |= (draw == draw.amin(1, keepdim=True)) & (draw < 1)
    labels = tokens.masked_fill(~asked, IGNORED)
    shown = torch.rand(tokens.shape, generator=generator)
    others = torch.randint(SPECIAL, vocab_size, tokens.shape, generator=generator)
    tokens[asked & (shown < SHOWN_AS_MASK)] = MASK
    replaced = asked & (shown >= SHOWN_AS_MASK) & (shown < SHOWN_AS_MASK + SHOWN_AS_OTHER)
    tokens[replaced] = others[replaced]
    return labels


def line_pairs(lines: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return all pairs of consecutive lines that are both not empty."""
    return [(a, b) for a, b in itertools.pairwise(lines) if len(a) and len(b)]
