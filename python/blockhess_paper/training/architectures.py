"""Small architectures with data and loss, trained in seconds, for Figures 1, 10 and 11 and the calibration.

Images are the shipped Fashion-MNIST, text is the shipped Shakespeare by character, or by word with the classes of
Zipf's law. Weights and batches depend only on the seed. Language models are trained with the gradient clipped to norm
1, as in nanoGPT, with every optimizer.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn

from blockhess.datasets import CharText, fashion_mnist, shakespeare, windows
from blockhess.models import next_token_loss
from blockhess.problem.batches import map_tensors
from blockhess_paper.datasets.sentence_pairs import SPECIAL, line_pairs, masked_pairs
from blockhess_paper.models import masked_pair_loss, named
from blockhess_paper.models.plain import CNN, LSTM, Bigrams, ImageMixer, WordMixer, WordMLP

IMAGES_PER_BATCH, WINDOWS_PER_BATCH, CONTEXT = 64, 16, 32

# Distinct characters in the shipped Shakespeare; its most frequent words, with one more class for all others.
CHARACTERS, WORDS = 76, 1000


@dataclass(frozen=True)
class Architecture:
    """A network that can be built and trained.

    Attributes:
        family: architectures that are resampled together in the calibration.
        transformer: whether the paper would call it a Transformer.
        make: builds the model, initialized from torch's global generator.
        draw: kind of batches: "images", "flat images", "characters", "words" or "pairs".
        loss_fn: argument of spectrum and train.
        size: images, windows or pairs in a batch.
        device: of models and batches; both are drawn on the CPU.
    """

    family: str
    transformer: bool
    make: Callable[[], nn.Module]
    draw: str
    loss_fn: Callable[..., Any]
    size: int
    device: str = "cpu"

    @property
    def images(self) -> bool:
        """Whether the data are images."""
        return self.draw.endswith("images")

    @property
    def classes(self) -> int:
        """Number of classes, those of tokens if the model also classifies pairs."""
        return {"characters": CHARACTERS, "words": WORDS, "pairs": CHARACTERS + SPECIAL}.get(self.draw, 10)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of train: language models are trained with the gradient clipped."""
        return {"clip": None if self.images else 1.0}

    @property
    def extra_settings(self) -> dict[str, Any]:
        """Settings that identify its trainings besides training_runs.Settings: none."""
        return {}

    def model(self, seed: int) -> nn.Module:
        """Return the model at the initialization of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().to(self.device)

    def batches(self, num_batches: int, seed: int, *, batch_size: int | None = None) -> list[Any]:
        """Return batches of samples drawn uniformly, images with replacement."""
        drawn = self._drawn(num_batches, seed, batch_size)
        return [map_tensors(lambda tensor: tensor.to(self.device), batch) for batch in drawn]

    def _drawn(self, num_batches: int, seed: int, batch_size: int | None) -> list[Any]:
        size = self.size if batch_size is None else batch_size
        if self.draw in ("characters", "words"):
            tokens = _text().tokens if self.draw == "characters" else _words()
            return windows(tokens, num_batches, batch_size=size, context=CONTEXT, seed=seed, op="batches")
        if self.draw == "pairs":
            options = {"batch_size": size, "context": CONTEXT, "seed": seed}
            return list(masked_pairs(_pairs(), CHARACTERS + SPECIAL, num_batches, **options))
        images, labels = _images()
        if self.draw == "flat images":
            images = images.flatten(1)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(len(labels), (num_batches, size), generator=generator)
        return [(images[rows], labels[rows]) for rows in chosen]


@cache
def _text() -> CharText:
    return shakespeare()


@cache
def _words() -> Tensor:
    """Return words and punctuation marks as classes, the most frequent first; WORDS - 1 stands for all others."""
    text = files("blockhess") / "data" / "shakespeare.txt"
    found = re.findall(r"[\w']+|[^\w\s]", text.read_text(encoding="ascii").lower())
    place = {word: k for k, (word, _) in enumerate(Counter(found).most_common(WORDS - 1))}
    return torch.tensor([place.get(word, WORDS - 1) for word in found])


@cache
def _images() -> tuple[Tensor, Tensor]:
    return fashion_mnist()


@cache
def _pairs() -> list[tuple[Tensor, Tensor]]:
    text = _text()
    newline = text.encode("\n")
    ends = (text.tokens == newline).nonzero().flatten()
    return line_pairs([line[line != newline] for line in torch.tensor_split(text.tokens, ends)])


def _gpt(vocab_size: int, num_layers: int) -> Callable[[], nn.Module]:
    sizes = {"context": CONTEXT, "num_heads": 2, "width": 32}
    return partial(named, "gpt2-mini", vocab_size=vocab_size, num_layers=num_layers, **sizes)


def _image_net(
    family: str, make: Callable[[], nn.Module], size: int = IMAGES_PER_BATCH, *, draw: str = "images"
) -> Architecture:
    return Architecture(family, family == "ViT", make, draw, nn.CrossEntropyLoss(), size)


def _language(
    family: str, make: Callable[[], nn.Module], size: int = WINDOWS_PER_BATCH, *, draw: str = "words"
) -> Architecture:
    return Architecture(family, family == "GPT", make, draw, next_token_loss, size)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


_LINEAR = partial(nn.Linear, 784, 10)
_CNN_BN = partial(CNN, (8, 16, 32), batch_norm=True)
_VGG_BN = partial(named, "vgg16-mini", width=4, batch_norm=True)
_RESNET = partial(named, "resnet18-mini", stem="imagenet")
_VIT = partial(named, "vit-base-mini", depth=1, width=32, num_heads=2)

# Relatives of the paper's networks, for Figures 1, 10 and 11.
FIGURES = {
    "vgg": _image_net("VGG", partial(named, "vgg16-mini", width=4)),
    "vgg-bn": _image_net("VGG", _VGG_BN),
    "resnet": _image_net("ResNet", _RESNET),
    "vit-2": _image_net("ViT", partial(named, "vit-base-mini", depth=2, width=32, num_heads=2)),
    "gpt-1": _language("GPT", _gpt(CHARACTERS, 1), draw="characters"),
    "gpt-2": _language("GPT", _gpt(CHARACTERS, 2), draw="characters"),
    "bert-2": Architecture(
        "BERT",
        True,
        partial(named, "bert-mini", vocab_size=CHARACTERS + SPECIAL, context=CONTEXT, width=32, num_heads=2),
        "pairs",
        masked_pair_loss,
        WINDOWS_PER_BATCH,
    ),
}

# Networks of the calibration, named after family, layers, data, and the images or tokens in a batch where they vary.
CALIBRATED = {
    "linear-images-64": _image_net("linear", _LINEAR, 64, draw="flat images"),
    "linear-images-512": _image_net("linear", _LINEAR, 512, draw="flat images"),
    "mlp-images-16": _image_net("MLP", _mlp, 16, draw="flat images"),
    "cnn-images": _image_net("CNN", partial(CNN, (8, 16, 32), batch_norm=False)),
    "resnet-images-16": _image_net("ResNet", _RESNET, 16),
    "vit-1-images-16": _image_net("ViT", _VIT, 16),
    "mixer-images": _image_net("Mixer", partial(ImageMixer, 32, 2)),
    "gpt-1-characters": _language("GPT", _gpt(CHARACTERS, 1), 4, draw="characters"),
    "gpt-2-characters": _language("GPT", _gpt(CHARACTERS, 2), 4, draw="characters"),
    "lstm-characters-128": _language("LSTM", partial(LSTM, CHARACTERS, 32), 4, draw="characters"),
    "lstm-characters-512": _language("LSTM", partial(LSTM, CHARACTERS, 32), 16, draw="characters"),
    "vgg-bn-images-16": _image_net("VGG", _VGG_BN, 16),
    "vgg-bn-images-64": FIGURES["vgg-bn"],
    "bert-2-characters": FIGURES["bert-2"],
    "linear-characters": _language("linear", partial(Bigrams, CHARACTERS), draw="characters"),
    "mlp-characters": _language("MLP", partial(WordMLP, CHARACTERS, 32, 4), draw="characters"),
    "cnn-bn-images-16": _image_net("CNN", _CNN_BN, 16),
    "resnet-images-64": FIGURES["resnet"],
    "cnn-bn-images-64": _image_net("CNN", _CNN_BN, 64),
    "vit-2-images": FIGURES["vit-2"],
    "vit-1-images-128": _image_net("ViT", _VIT, 128),
    "mixer-words": _language("Mixer", partial(WordMixer, WORDS, CONTEXT, 32, 2), 32),
    "gpt-1-words-64": _language("GPT", _gpt(WORDS, 1), 2),
    "gpt-1-words-256": _language("GPT", _gpt(WORDS, 1), 8),
    "lstm-words-64": _language("LSTM", partial(LSTM, WORDS, 32), 2),
    "lstm-words-256": _language("LSTM", partial(LSTM, WORDS, 32), 8),
    "lstm-words-1024": _language("LSTM", partial(LSTM, WORDS, 32), 32),
    "linear-words-256": _language("linear", partial(Bigrams, WORDS), 8),
    "linear-words-1024": _language("linear", partial(Bigrams, WORDS), 32),
    "mlp-words-256": _language("MLP", partial(WordMLP, WORDS, 32, 4), 8),
    "mlp-words-1024": _language("MLP", partial(WordMLP, WORDS, 32, 4), 32),
    "cnn-words": _language("CNN", partial(WordMLP, WORDS, 32, 2, num_layers=3), 32),
    "gpt-1-words-1024": _language("GPT", _gpt(WORDS, 1), 32),
    "mlp-images-512": _image_net("MLP", _mlp, 512, draw="flat images"),
    "cnn-bn-images-128": _image_net("CNN", _CNN_BN, 128),
    "gpt-2-words-256": _language("GPT", _gpt(WORDS, 2), 8),
    "gpt-3-words-256": _language("GPT", _gpt(WORDS, 3), 8),
    "gpt-2-words-1024": _language("GPT", _gpt(WORDS, 2), 32),
    "gpt-3-words-1024": _language("GPT", _gpt(WORDS, 3), 32),
}

ARCHITECTURES = FIGURES | CALIBRATED
