"""The two data sets shipped with the package, characters of Shakespeare and images of Fashion-MNIST.

Batches depend on the arguments only: the same seed gives the same batch on every machine, and torch's global generator
is neither used nor changed. Sources and licenses: data/README.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Mean and standard deviation of all 60,000 training images of Fashion-MNIST, pixels scaled to [0, 1].
_FASHION_MNIST_MEAN = 0.2860
_FASHION_MNIST_STD = 0.3530


class CharText:
    """A text, encoded by character, and batches of it for language models.

    Args:
        text: characters; the vocabulary is the sorted set of them.

    Raises:
        ValueError: text is empty.

    Example:
        >>> text = CharText("to be or not to be")
        >>> text.vocabulary
        ' benort'
        >>> text.decode(text.encode("not"))
        'not'
    """

    def __init__(self, text: str) -> None:
        if not text:
            raise ValueError("CharText: text must not be empty, got ''")
        self.vocabulary = "".join(sorted(set(text)))
        self._index = {char: i for i, char in enumerate(self.vocabulary)}
        self.tokens = self.encode(text)

    def encode(self, text: str) -> Tensor:
        """Return the vocabulary indices of text, (len(text),) int64.

        Raises:
            ValueError: a character is not in the vocabulary.
        """
        try:
            return torch.tensor([self._index[char] for char in text], dtype=torch.int64, device="cpu")
        except KeyError as error:
            raise ValueError(f"CharText.encode: text must be in the vocabulary, got {error}") from None

    def decode(self, tokens: Iterable[int] | Tensor) -> str:
        """Return the characters of vocabulary indices."""
        return "".join(self.vocabulary[int(token)] for token in tokens)

    def batches(
        self, num_batches: int = 1, *, batch_size: int = 8, context: int = 64, seed: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """Draw windows at random offsets; the target of each character is the one that follows it.

        Args:
            num_batches, batch_size, context: numbers of batches, windows per batch and characters per window.
            seed: of the offsets.

        Returns:
            num_batches pairs (x, y), each (batch_size, context) int64; y[:, t] follows x[:, t] in the text.

        Raises:
            ValueError: a size is below 1, or the text has no more than `context` characters.

        Example:
            >>> [(x, y)] = shakespeare().batches(batch_size=2, context=16)
            >>> x.shape, bool((x[:, 1:] == y[:, :-1]).all())
            (torch.Size([2, 16]), True)
        """
        sizes = {"batch_size": batch_size, "context": context}
        return windows(self.tokens, num_batches, **sizes, seed=seed, op="CharText.batches")


def windows(
    tokens: Tensor | np.ndarray[Any, Any], num_batches: int, *, batch_size: int, context: int, seed: int, op: str
) -> list[tuple[Tensor, Tensor]]:
    """Draw batches from tokens (n,), which may be a memory-mapped array; see CharText.batches. Errors name `op`."""
    for name, value in (("num_batches", num_batches), ("batch_size", batch_size), ("context", context)):
        if value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")
    if len(tokens) <= context:
        raise ValueError(f"{op}: context must be below the text's length {len(tokens)}, got {context}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(tokens) - context, (num_batches, batch_size, 1), generator=generator, device="cpu")
    places = starts + torch.arange(context + 1, device="cpu")
    drawn = tokens[places] if isinstance(tokens, Tensor) else torch.from_numpy(tokens[places.numpy()].astype(np.int64))
    return [(window[:, :-1].contiguous(), window[:, 1:].contiguous()) for window in drawn]


def shakespeare() -> CharText:
    """Return eight plays of Shakespeare: 1,036,489 characters, with a vocabulary of 76.

    Source: Project Gutenberg (public domain).
    """
    return CharText((files("blockhess") / "data" / "shakespeare.txt").read_text(encoding="ascii"))


def fashion_mnist(num_images: int | None = None, *, split: str = "train") -> tuple[Tensor, Tensor]:
    """Return the first images of the shipped part of Fashion-MNIST, a random sample of it.

    Args:
        num_images: number of images; None means all of the split: 4,096 of "train" or 1,024 of "test".
        split: "train" or "test".

    Returns:
        Images (num_images, 1, 28, 28) float32 with mean about 0 and standard deviation about 1, and labels
        (num_images,) int64 in 0..9.

    Raises:
        ValueError: split has another value, or num_images is out of range.

    Source: Xiao, Rasul, Vollgraf 2017, https://github.com/zalandoresearch/fashion-mnist (MIT license).

    Example:
        >>> images, labels = fashion_mnist(32)
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 28, 28]), torch.Size([32]))
    """
    if split not in ("train", "test"):
        raise ValueError(f'fashion_mnist: split must be "train" or "test", got {split!r}')
    source = files("blockhess") / "data" / "fashion_mnist_5k.npz"
    with source.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
        pixels, labels = archive[f"{split}_images"], archive[f"{split}_labels"]
    count = len(pixels) if num_images is None else num_images
    if not 1 <= count <= len(pixels):
        raise ValueError(f"fashion_mnist: num_images must be in 1..{len(pixels)}, got {num_images}")
    images = torch.from_numpy(pixels[:count]).to(torch.float32).div_(255)
    images = images.sub_(_FASHION_MNIST_MEAN).div_(_FASHION_MNIST_STD).unsqueeze(1)
    return images, torch.from_numpy(labels[:count].astype(np.int64))
