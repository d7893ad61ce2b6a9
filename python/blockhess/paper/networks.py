"""The paper's six networks with data and loss, as Table 1 and Figures 3 and 4 take them: at its size, or for a CPU.

    scale "mini"     blockhess.models' "-mini", on the data that ship with the package
    scale "paper"    the paper's sizes and batches (appendix C.1), on data in a folder of the user's:
                     FOLDER/imagenet/CLASS/*.JPEG, FOLDER/cornell/movie_*.txt, FOLDER/openwebtext/train.bin

Weights, text windows and images are pure functions of the seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.divergence import check_choice
from blockhess.models import CONFIGS, MaskedPairs, masked_pair_loss, named, next_token_loss
from blockhess.sentence_pairs import PADDING, SPECIAL, line_pairs, masked_pairs

SCALES = ("mini", "paper")

# Name -> title, JS0 of the paper's Table 1, whether it is a Transformer; in the table's order.
NETWORKS = {
    "resnet18": ("ResNet18", 0.10, False),
    "vgg16": ("VGG16", 0.09, False),
    "vit-base": ("ViT-base", 286.41, True),
    "bert": ("BERT", 53.38, True),
    "gpt2-nano": ("GPT2-nano", 14.93, True),
    "gpt2": ("GPT2", 83.23, True),
}

# What a mini network is measured on.
MINI_IMAGES, MINI_WINDOWS, MINI_PAIRS = 32, 4, 16

# The paper's batches: images, tokens; and how much of them one graph holds.
IMAGES = 1024
TOKENS = {"bert": 327_680, "gpt2-nano": 163_840, "gpt2": 245_760}
IMAGES_AT_ONCE, TOKENS_AT_ONCE = 32, 8_192


@dataclass(frozen=True)
class Network:
    """A network at initialisation with what `spectrum` takes.

    Attributes:
        name: of NETWORKS, or PACKAGE:NAME.
        model, data, loss_fn: of spectrum.
        source: the data in words.
    """

    name: str
    model: nn.Module
    data: Any
    loss_fn: Callable[..., Any] | None
    source: str


def network(
    name: str, *, scale: str = "mini", seed: int = 0, data: str | PathLike[str] | None = None, size: int | None = None
) -> Network:
    """Build a network and its data.

    Args:
        name: of NETWORKS; or hf:TYPE for a Transformers language model, torchvision:NAME or timm:NAME.
        scale: one of SCALES.
        seed: of weights and data.
        data: folder with the data of scale "paper"; Shakespeare ships.
        size: images, windows or pairs, instead of the scale's own number.

    Raises:
        ValueError: an unknown name or scale, or data that are not there; tells the layout.

    Example:
        >>> network("bert").source
        'line pairs of Shakespeare, by character'
    """
    check_choice("network", "scale", scale, SCALES)
    if name not in NETWORKS and ":" not in name:
        raise ValueError(f"network: name must be one of {', '.join(NETWORKS)} or PACKAGE:NAME, got {name!r}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if scale == "paper":
            return _at_paper_size(name, seed, data, size)
        return _mini(name, seed, size)


def _mini(name: str, seed: int, size: int | None) -> Network:
    if name.startswith("hf:"):
        return _of_transformers(name, seed, size)
    if name == "bert":
        batches, vocab_size = _pairs(seed, size)
        return Network(name, named("bert-mini", vocab_size=vocab_size), batches, masked_pair_loss, PAIRS)
    if name.startswith("gpt2"):
        text = shakespeare()
        model = named(f"{name}-mini", vocab_size=len(text.vocabulary))
        windows = text.batches(batch_size=size or MINI_WINDOWS, context=64, seed=seed)
        return Network(name, model, windows, next_token_loss, "Shakespeare, by character")
    images, labels = fashion_mnist(size or MINI_IMAGES)
    if ":" in name:
        model = named(name)
        # timm's models say what they take.
        channels, *sides = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
        enlarged = nn.functional.interpolate(images.expand(-1, channels, -1, -1), size=sides, mode="bilinear")
        source = f"Fashion-MNIST, {sides[0]} x {sides[1]}"
        return Network(name, model, (enlarged, labels), nn.CrossEntropyLoss(), source)
    return Network(name, named(f"{name}-mini"), (images, labels), nn.CrossEntropyLoss(), "Fashion-MNIST")


PAIRS = "line pairs of Shakespeare, by character"


def _pairs(seed: int, size: int | None) -> tuple[list[MaskedPairs], int]:
    """One batch of line pairs, and the size of its vocabulary."""
    text = shakespeare()
    newline = text.encode("\n")
    ends = (text.tokens == newline).nonzero().flatten()
    pairs = line_pairs([line[line != newline] for line in torch.tensor_split(text.tokens, ends)])
    vocab_size = len(text.vocabulary) + SPECIAL
    return masked_pairs(pairs, vocab_size, batch_size=size or MINI_PAIRS, context=32, seed=seed), vocab_size


def _of_transformers(name: str, seed: int, size: int | None) -> Network:
    """A language model and the labels that its own loss asks for."""
    [pairs], vocab_size = _pairs(seed, size)
    model = named(name, vocab_size=vocab_size)
    kind = type(model).__name__
    next_sentence = "next_sentence_label" in inspect.signature(model.forward).parameters
    if next_sentence or kind.endswith("MaskedLM"):
        batch = {"input_ids": pairs.tokens, "attention_mask": (pairs.tokens != PADDING).long(), "labels": pairs.labels}
        if next_sentence:
            # Segments are counted from 0 there, padding among the first; label 0 says that B follows A.
            batch |= {"token_type_ids": (pairs.segments == 2).long(), "next_sentence_label": 1 - pairs.is_next}
        return Network(name, model, batch, None, PAIRS)
    if not kind.endswith(("CausalLM", "LMHeadModel")):
        raise ValueError(
            f"network: hf:TYPE must have a causal, masked or next-sentence language model, got {name!r}, a {kind}"
        )
    [(tokens, _)] = shakespeare().batches(batch_size=size or MINI_WINDOWS, seed=seed)
    return Network(name, model, {"input_ids": tokens, "labels": tokens}, None, "Shakespeare, by character")


def _at_paper_size(name: str, seed: int, data: str | PathLike[str] | None, size: int | None) -> Network:
    model = named(name)
    if name == "gpt2-nano":
        text = shakespeare()
        model = named(name, vocab_size=len(text.vocabulary))
        return Network(name, model, _windows(text.batches, name, 256, seed, size), next_token_loss, "Shakespeare")
    if data is None:
        raise ValueError(
            f"network: {name} at the paper's size needs --data FOLDER with imagenet/CLASS/*.JPEG, "
            "cornell/movie_*.txt or openwebtext/train.bin, got none"
        )
    folder = Path(data)
    if name == "gpt2":
        from blockhess.text_files import TokenFile

        tokens = TokenFile(folder / "openwebtext" / "train.bin", CONFIGS[name][1].vocab_size)
        return Network(name, model, _windows(tokens.batches, name, 1024, seed, size), next_token_loss, "OpenWebText")
    if name == "bert":
        from blockhess.text_files import cornell_dialogs

        pairs, vocab_size = cornell_dialogs(folder / "cornell", CONFIGS[name][1].vocab_size - SPECIAL)
        count, at_once = size or TOKENS[name] // 64, TOKENS_AT_ONCE // 64
        batches = masked_pairs(
            pairs, vocab_size + SPECIAL, -(-count // at_once), batch_size=min(count, at_once), context=64, seed=seed
        )
        return Network(name, model, batches, masked_pair_loss, "Cornell Movie-Dialogs")
    from blockhess.image_files import image_folder

    images, labels = image_folder(folder / "imagenet", size or IMAGES, side=224, seed=seed)
    parts = list(zip(torch.split(images, IMAGES_AT_ONCE), torch.split(labels, IMAGES_AT_ONCE)))
    return Network(name, model, parts, nn.CrossEntropyLoss(), "ImageNet")


def _windows(draw: Callable[..., Any], name: str, context: int, seed: int, size: int | None) -> list[Any]:
    """The paper's tokens as windows, in batches that one graph holds."""
    count, at_once = size or TOKENS[name] // context, TOKENS_AT_ONCE // context
    return partial(draw, context=context, seed=seed)(-(-count // at_once), batch_size=min(count, at_once))  # type: ignore[no-any-return]
