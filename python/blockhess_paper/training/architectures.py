"""Small architectures with data and loss, trained in seconds, for Figures 1, 10 and 11 and the calibration.

Images are the shipped Fashion-MNIST, text is the shipped Shakespeare by character. Weights and batches depend only on
the seed. Language models are trained with the gradient clipped to norm 1, as in nanoGPT, with every optimizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from blockhess.datasets import CharText, fashion_mnist, shakespeare
from blockhess.models import next_token_loss
from blockhess_paper.datasets.sentence_pairs import SPECIAL, line_pairs, masked_pairs
from blockhess_paper.models import masked_pair_loss, named
from blockhess_paper.models.plain import CNN, LSTM
from blockhess_paper.scaled_mlp.mlp import scaled_mlp

IMAGES_PER_BATCH, WINDOWS_PER_BATCH, CONTEXT = 64, 16, 32

# Distinct characters in the shipped Shakespeare.
CHARACTERS = 76


@dataclass(frozen=True)
class Architecture:
    """A network that can be built and trained.

    Attributes:
        family: architectures that are left out together in the cross-validation of the calibration.
        transformer: whether the paper would call it a Transformer.
        make: builds the model, initialized from torch's global generator.
        draw: kind of batches: "images", "flat images", "windows" or "pairs".
        loss_fn: argument of spectrum and train.
    """

    family: str
    transformer: bool
    make: Callable[[], nn.Module]
    draw: str
    loss_fn: Callable[..., Any]

    @property
    def chance(self) -> float:
        """Loss of the uniform prediction, in nats."""
        if self.draw == "pairs":
            return math.log(CHARACTERS + SPECIAL) + math.log(2)
        return math.log(CHARACTERS if self.draw == "windows" else 10)

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of train: language models are trained with the gradient clipped."""
        return {"clip": 1.0 if self.draw in ("windows", "pairs") else None}

    @property
    def extra_settings(self) -> dict[str, Any]:
        """Settings that identify its trainings besides training_runs.Settings: none."""
        return {}

    def model(self, seed: int) -> nn.Module:
        """Return the model at the initialization of a seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make()

    def batches(self, num_batches: int, seed: int, *, batch_size: int | None = None) -> list[Any]:
        """Return batches of samples drawn uniformly, images with replacement."""
        usual = IMAGES_PER_BATCH if self.draw.endswith("images") else WINDOWS_PER_BATCH
        size = usual if batch_size is None else batch_size
        if self.draw == "windows":
            return list(_text().batches(num_batches, batch_size=size, context=CONTEXT, seed=seed))
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
def _images() -> tuple[Tensor, Tensor]:
    return fashion_mnist()


@cache
def _pairs() -> list[tuple[Tensor, Tensor]]:
    text = _text()
    newline = text.encode("\n")
    ends = (text.tokens == newline).nonzero().flatten()
    return line_pairs([line[line != newline] for line in torch.tensor_split(text.tokens, ends)])


def _gpt(**sizes: Any) -> Callable[[], nn.Module]:
    return partial(named, "gpt2-mini", vocab_size=CHARACTERS, context=CONTEXT, num_heads=2, width=32, **sizes)


def _image_net(family: str, make: Callable[[], nn.Module], *, draw: str = "images") -> Architecture:
    return Architecture(family, family == "ViT", make, draw, nn.CrossEntropyLoss())


def _language(family: str, make: Callable[[], nn.Module]) -> Architecture:
    return Architecture(family, family != "LSTM", make, "windows", next_token_loss)


ARCHITECTURES = {
    "mlp-c1": _image_net("MLP", partial(scaled_mlp, 1.0, None), draw="flat images"),
    "mlp-c4": _image_net("MLP", partial(scaled_mlp, 4.0, None), draw="flat images"),
    "mlp-c8": _image_net("MLP", partial(scaled_mlp, 8.0, None), draw="flat images"),
    "cnn": _image_net("CNN", partial(CNN, (8, 16, 32), batch_norm=False)),
    "cnn-bn": _image_net("CNN", partial(CNN, (8, 16, 32), batch_norm=True)),
    "vgg": _image_net("VGG", partial(named, "vgg16-mini", width=4)),
    "vgg-bn": _image_net("VGG", partial(named, "vgg16-mini", width=4, batch_norm=True)),
    "resnet": _image_net("ResNet", partial(named, "resnet18-mini", stem="imagenet")),
    "vit-1": _image_net("ViT", partial(named, "vit-base-mini", depth=1, width=32, num_heads=2)),
    "vit-2": _image_net("ViT", partial(named, "vit-base-mini", depth=2, width=32, num_heads=2)),
    "gpt-1": _language("GPT", _gpt(num_layers=1)),
    "gpt-2": _language("GPT", _gpt(num_layers=2)),
    "gpt-2-no-layernorm": _language("GPT", _gpt(num_layers=2, layer_norm=False)),
    "bert-2": Architecture(
        "BERT",
        True,
        partial(named, "bert-mini", vocab_size=CHARACTERS + SPECIAL, context=CONTEXT, width=32, num_heads=2),
        "pairs",
        masked_pair_loss,
    ),
    "lstm": _language("LSTM", partial(LSTM, CHARACTERS, 32)),
}
