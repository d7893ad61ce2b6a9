"""The data of the six networks at the paper's size, from a folder of the user; Shakespeare is shipped.

    FOLDER/imagenet/CLASS/*.JPEG       ResNet18, VGG16, ViT-base     see image_files.ImageFolder
    FOLDER/cornell/movie_*.txt         BERT                          see text_files.cornell_dialogs
    FOLDER/openwebtext/train.bin       GPT2                          see text_files.TokenFile

A batch depends only on folder, seed, step and size, so that a training can resume at any step. Images are shuffled anew
every epoch; text windows and sentence pairs are drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from os import PathLike
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor, nn

from blockhess.datasets import shakespeare
from blockhess.models import next_token_loss
from blockhess.problem import fingerprint
from blockhess.problem.batches import map_tensors
from blockhess_paper.datasets.sentence_pairs import SPECIAL, masked_pairs
from blockhess_paper.models import CONFIGS, masked_pair_loss

# Seed of step (or epoch) t: SEED_STRIDE * seed + t. torch's CPU generator uses only 32 bits of it. Steps of a training
# never share a seed, nor do trainings of fewer steps than this with different seeds.
SEED_STRIDE = 1_000_003

IMAGE_SIDE = 224


@dataclass(frozen=True)
class Source:
    """A data set from which batches are drawn.

    Attributes:
        description: short description of the data.
        draw: (samples, seed, step) -> a batch.
        loss_fn: argument of spectrum and train.
        sample: "image", "window" or "sentence pair".
        count: number of images, tokens or sentence pairs.
        tokens: tokens per sample of text.
        num_samples: samples per epoch; None where samples are drawn at random.
        sizes: fields of the model's configuration that depend on the data.
    """

    description: str
    draw: Callable[[int, int, int], Any]
    loss_fn: Callable[..., Any]
    sample: str
    count: int
    tokens: int = 1
    num_samples: int | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def identity(self) -> str:
        """Fingerprint of the data: their count and the bits of one sample; all of ImageNet would take hours."""
        return f"{self.count}-{fingerprint.of_data([self.draw(1, 0, 0)])}"


class Stream(Sequence[Any]):
    """The batches of a training by step, each drawn on access.

    Args:
        source: where samples are drawn from.
        num_batches: number of batches.
        batch_size: samples per batch.
        seed: random seed.
        device: device of the batches.
    """

    def __init__(self, source: Source, num_batches: int, batch_size: int, seed: int, device: torch.device) -> None:
        self._source, self._length, self._size = source, num_batches, batch_size
        self._seed, self._device = seed, device

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, step: int) -> Any: ...
    @overload
    def __getitem__(self, step: slice) -> Sequence[Any]: ...
    def __getitem__(self, step: int | slice) -> Any:
        if isinstance(step, slice):
            return [self[number] for number in range(*step.indices(self._length))]
        if not -self._length <= step < self._length:
            raise IndexError(f"Stream: step must be below {self._length}, got {step}")
        batch = self._source.draw(self._size, self._seed, step % self._length)
        return map_tensors(lambda tensor: tensor.to(self._device), batch)


def source(name: str, data: str | PathLike[str] | None) -> Source:
    """Return the data of a network.

    Args:
        name: a key of networks.NETWORKS; other names get images.
        data: the folder.

    Raises:
        ValueError: the folder is missing or has another layout; the message says which layout is expected.
        ImportError: a package that reads the data is missing.
    """
    config: Any = CONFIGS[name][1] if name in CONFIGS else None
    if name == "gpt2-nano":
        text = shakespeare()
        sizes = {"vocab_size": len(text.vocabulary)}
        return _language(text.batches, "Shakespeare, by character", len(text.tokens), config.context, sizes)
    if data is None:
        raise ValueError(
            f"network: {name} at the paper's size needs --data FOLDER with imagenet/CLASS/*.JPEG, "
            "cornell/movie_*.txt or openwebtext/train.bin, got none"
        )
    folder = Path(data).absolute()
    if name == "gpt2":
        from blockhess_paper.datasets.text_files import TokenFile

        tokens = TokenFile(folder / "openwebtext" / "train.bin", config.vocab_size)
        return _language(tokens.batches, "OpenWebText", len(tokens.tokens), config.context)
    return _sentence_pairs(folder / "cornell") if name == "bert" else _images(folder / "imagenet")


def _language(
    batches: Callable[..., Any], description: str, count: int, context: int, sizes: Mapping[str, int] | None = None
) -> Source:
    def draw(count: int, seed: int, step: int) -> Any:
        [batch] = batches(batch_size=count, context=context, seed=SEED_STRIDE * seed + step)
        return batch

    return Source(description, draw, next_token_loss, "window", count, context, sizes=sizes or {})


def _sentence_pairs(folder: Path) -> Source:
    from blockhess_paper.datasets.text_files import cornell_dialogs

    config = CONFIGS["bert"][1]
    pairs, learned = cornell_dialogs(folder, config.vocab_size - SPECIAL)

    def draw(count: int, seed: int, step: int) -> Any:
        seeds = SEED_STRIDE * seed + step
        [batch] = masked_pairs(pairs, learned + SPECIAL, batch_size=count, context=config.context, seed=seeds)
        return batch

    return Source("Cornell Movie-Dialogs", draw, masked_pair_loss, "sentence pair", len(pairs), config.context)


def _images(folder: Path) -> Source:
    from blockhess_paper.datasets.image_files import ImageFolder

    images = ImageFolder(folder)
    classes = CONFIGS["resnet18"][1].num_classes
    if images.num_classes > classes:
        raise ValueError(f"network: {folder} must hold {classes} classes at most, got {images.num_classes} folders")

    @lru_cache(maxsize=1)
    def order(seed: int) -> Tensor:
        return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))

    def draw(count: int, seed: int, step: int) -> Any:
        if count > len(images):
            raise ValueError(f"network: {folder} must hold a batch of {count:,} images, got {len(images):,}")
        epoch, place = divmod(step, len(images) // count)
        chosen = order(SEED_STRIDE * seed + epoch)[place * count : (place + 1) * count]
        return images.read(chosen.tolist(), side=IMAGE_SIDE)

    return Source("ImageNet", draw, nn.CrossEntropyLoss(), "image", len(images), num_samples=len(images))
