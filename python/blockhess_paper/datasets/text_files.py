"""Text from files of the user: token files of nanoGPT, any text as byte pairs, the Cornell Movie-Dialogs.

Nothing is downloaded: byte pairs are learned from the given text by Hugging Face's tokenizers
(pip install "blockhess[data]"). A batch depends only on file, sizes and seed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockhess.datasets import windows
from blockhess_paper.datasets.sentence_pairs import line_pairs

# Separator of the fields in the Cornell files.
SEPARATOR = " +++$+++ "

CORNELL_FILES = ("movie_lines.txt", "movie_conversations.txt")


class TokenFile:
    """A memory-mapped file of tokens as written by nanoGPT's prepare.py: unsigned 16-bit integers.

    Args:
        path: the file, such as data/openwebtext/train.bin.
        vocab_size: tokens of the batches must be below this; those of GPT-2 are below 50,257.

    Raises:
        ValueError: the file does not exist, or its size is odd or zero.

    Example:
        >>> tokens = TokenFile("data/openwebtext/train.bin", 50_304)
    """

    def __init__(self, path: str | PathLike[str], vocab_size: int) -> None:
        self.path, self.vocab_size = Path(path), vocab_size
        if not self.path.is_file():
            raise ValueError(
                f"TokenFile: {path} must be a file of uint16 tokens, as nanoGPT's data/openwebtext/prepare.py writes "
                "train.bin (https://github.com/karpathy/nanoGPT), got none"
            )
        size = self.path.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(f"TokenFile: {path} must hold uint16 tokens, got {size} bytes")
        self.tokens: np.ndarray[Any, Any] = np.memmap(self.path, dtype="<u2", mode="r")

    def batches(
        self, num_batches: int = 1, *, batch_size: int = 8, context: int = 1024, seed: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """Return windows at random offsets with their next tokens: see CharText.batches.

        Raises:
            ValueError: as CharText.batches, or a token is outside the vocabulary.
        """
        drawn = windows(
            self.tokens, num_batches, batch_size=batch_size, context=context, seed=seed, op="TokenFile.batches"
        )
        for pair in drawn:
            most = max(int(tokens.max()) for tokens in pair)
            if most >= self.vocab_size:
                raise ValueError(
                    f"TokenFile.batches: tokens of {self.path} must be below vocab_size = {self.vocab_size}, got {most}"
                )
        return drawn


def read_text(path: str | PathLike[str]) -> str:
    """Return the content of a UTF-8 file, for `CharText` or `BytePairs`.

    Raises:
        ValueError: the file cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"read_text: cannot read {path}: {error}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"read_text: {path} must be UTF-8, got byte {error.object[error.start]:#x}") from None


class BytePairs:
    """A byte-pair tokenizer learned from texts, like that of GPT-2: over bytes, so that every text can be encoded.

    Args:
        texts: the training texts.
        vocab_size: largest number of tokens, at least 256, one per byte; short texts give fewer.

    Raises:
        ImportError: the package tokenizers is missing.
        ValueError: vocab_size is below 256.

    Source: Sennrich, Haddow, Birch 2016; Radford et al. 2019.

    Example:
        >>> pairs = BytePairs(["to be or not to be"], 260)
        >>> pairs.decode(pairs.encode("not to be"))
        'not to be'
    """

    def __init__(self, texts: Iterable[str], vocab_size: int) -> None:
        if vocab_size < 256:
            raise ValueError(f"BytePairs: vocab_size must be at least 256, got {vocab_size}")
        try:
            import tokenizers
        except ImportError:
            raise ImportError(
                'BytePairs: needs the package tokenizers; type: pip install "blockhess[data]"; CharText does without'
            ) from None
        self._tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        self._tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(texts, trainer)
        self.vocab_size: int = self._tokenizer.get_vocab_size()

    def encode(self, text: str) -> Tensor:
        """Return the tokens (n,) int64 of a text."""
        return torch.tensor(self._tokenizer.encode(text).ids, dtype=torch.int64)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(tokens.tolist()))

    def batches(
        self, text: str, num_batches: int = 1, *, batch_size: int = 8, context: int = 64, seed: int = 0
    ) -> list[tuple[Tensor, Tensor]]:
        """Return windows of a text with their next tokens: see CharText.batches."""
        return windows(
            self.encode(text), num_batches, batch_size=batch_size, context=context, seed=seed, op="BytePairs.batches"
        )


def cornell_dialogs(folder: str | PathLike[str], vocab_size: int) -> tuple[list[tuple[Tensor, Tensor]], int]:
    """Read the Cornell Movie-Dialogs Corpus as pairs of consecutive lines, tokenized by byte pairs learned from it.

    Args:
        folder: folder with movie_lines.txt and movie_conversations.txt.
        vocab_size: largest number of byte-pair tokens.

    Returns:
        The pairs, and the size of the learned vocabulary.

    Raises:
        ValueError: a file is missing or has another layout.
        ImportError: as BytePairs.

    Source: Danescu-Niculescu-Mizil and Lee 2011,
        https://www.cs.cornell.edu/~cristian/Cornell_Movie-Dialogs_Corpus.html

    Example:
        >>> pairs, vocab_size = cornell_dialogs("cornell movie-dialogs corpus", 16_796)
    """
    lines = {fields[0]: fields[-1] for fields in _cornell(Path(folder) / CORNELL_FILES[0], 5)}
    spoken: list[list[str]] = []
    for fields in _cornell(Path(folder) / CORNELL_FILES[1], 4):
        names = re.findall(r"L\d+", fields[-1])
        missing = [name for name in names if name not in lines]
        if missing:
            raise ValueError(f"cornell_dialogs: {CORNELL_FILES[0]} must have every line, got no {missing[0]}")
        spoken.append([lines[name] for name in names])
    texts = BytePairs((line for lines in spoken for line in lines), vocab_size)
    encoded: Sequence[list[Tensor]] = [[texts.encode(line) for line in lines] for lines in spoken]
    return [pair for conversation in encoded for pair in line_pairs(conversation)], texts.vocab_size


def _cornell(path: Path, count: int) -> list[list[str]]:
    """Return the fields of every line; the corpus is in Latin-1."""
    try:
        text = path.read_text(encoding="latin-1")
    except OSError:
        raise ValueError(
            f"cornell_dialogs: {path.parent} must hold {' and '.join(CORNELL_FILES)} of "
            f"https://www.cs.cornell.edu/~cristian/Cornell_Movie-Dialogs_Corpus.html, got no {path.name}"
        ) from None
    # A line without text ends with the separator, whose trailing blank an editor may have removed.
    rows = [line.split(SEPARATOR.rstrip()) for line in text.split("\n") if line]
    for number, row in enumerate(rows, 1):
        if len(row) != count:
            raise ValueError(
                f"cornell_dialogs: {path.name} must have {count} fields separated by {SEPARATOR.strip()} a line, got "
                f"{len(row)} in line {number}"
            )
    return [[field.strip() for field in row] for row in rows]
