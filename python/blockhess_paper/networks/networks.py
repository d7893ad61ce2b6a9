"""The paper's six networks with data and loss, for Table 1 and Figures 3 and 4: at the paper's size or CPU-sized.

    scale "mini"     the "-mini" models of the registry, on the shipped data
    scale "paper"    the paper's sizes and batches (appendix C.1), on data in a folder of the user: see sources.py

Weights, text windows and images depend only on the seed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import nn

from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import next_token_loss
from blockhess.problem.batches import known_device, map_tensors, split_batch
from blockhess_ext.arguments import choice
from blockhess_paper.datasets.sentence_pairs import PADDING, SPECIAL, line_pairs, masked_pairs
from blockhess_paper.models import MaskedPairs, masked_pair_loss, named
from blockhess_paper.networks.sources import Source, source

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

# Batch of a mini network: images, text windows, sentence pairs.
MINI_IMAGES, MINI_WINDOWS, MINI_PAIRS = 32, 4, 16

# The paper's batches, in images and tokens, and the part of them that fits into one autograd graph.
IMAGES = 1024
TOKENS = {"bert": 327_680, "gpt2-nano": 163_840, "gpt2": 245_760}
IMAGES_AT_ONCE, TOKENS_AT_ONCE = 32, 8_192


@dataclass(frozen=True)
class Selection:
    """The networks of a command, their scale and device.

    Attributes:
        models: names; empty means the networks of the figure or table.
        scale: one of SCALES.
        data: folder with the data of scale "paper".
        device: torch device, such as "cuda".
        precision: precision of float32 matrix products; `matmul_precision` of spectrum.
    """

    models: Sequence[str] = ()
    scale: str = "mini"
    data: str | PathLike[str] | None = None
    device: str = "cpu"
    precision: str = "highest"

    def __post_init__(self) -> None:
        choice("scale", self.scale, SCALES, op="network")
        known_device(self.device, "network")

    def of(self, known: Iterable[str], figure: str) -> list[str]:
        """Return the selected names, in the order of a figure; all names of the figure if none was selected.

        Raises:
            ValueError: the figure has no such network.
        """
        names = list(known)
        for name in self.models:
            if name not in names:
                raise ValueError(f"{figure}: model must be one of {', '.join(names)}, got {name!r}")
        return [name for name in names if name in self.models] if self.models else names


@dataclass(frozen=True)
class Network:
    """A network at initialization with its data and loss.

    Attributes:
        name: a key of NETWORKS, or PACKAGE:NAME.
        model, data, loss_fn: arguments of spectrum.
        source: short description of the data.
    """

    name: str
    model: nn.Module
    data: Any
    loss_fn: Callable[..., Any] | None
    source: str


def network(
    name: str, selection: Selection | None = None, *, seed: int = 0, size: int | None = None, at_once: int | None = None
) -> Network:
    """Build a network and its data.

    Args:
        name: a key of NETWORKS; or hf:TYPE for a Transformers language model, torchvision:NAME or timm:NAME.
        selection: scale, data and device; by default mini, on the CPU.
        seed: seed of weights and data.
        size: number of images, windows or pairs, at least 1; None means that of the scale.
        at_once: how many of them form one part of the batch, at least 1; None means that of the scale.

    Raises:
        ValueError: the name is unknown, a number is below 1, or the data are missing.

    Example:
        >>> network("bert").source
        'line pairs of Shakespeare, by character'
    """
    selection = selection or Selection()
    if name not in NETWORKS and ":" not in name:
        raise ValueError(f"network: name must be one of {', '.join(NETWORKS)} or PACKAGE:NAME, got {name!r}")
    for argument, value in (("size", size), ("at_once", at_once)):
        if value is not None and value < 1:
            raise ValueError(f"network: {argument} must be at least 1, got {value}")
    if selection.scale == "paper":
        net = _at_paper_size(name, selection, seed, size, at_once)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = _mini(name, seed, size)
    return to_device(net, torch.device(selection.device))


def to_device(net: Network, device: torch.device) -> Network:
    """Return the network with model and data on a device."""
    data = map_tensors(lambda tensor: tensor.to(device), net.data)
    return Network(net.name, net.model.to(device), data, net.loss_fn, net.source)


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
        # Models of timm record their input size.
        channels, *sides = getattr(model, "default_cfg", {}).get("input_size", (3, 224, 224))
        enlarged = nn.functional.interpolate(images.expand(-1, channels, -1, -1), size=sides, mode="bilinear")
        source = f"Fashion-MNIST, {sides[0]} x {sides[1]}"
        return Network(name, model, (enlarged, labels), nn.CrossEntropyLoss(), source)
    return Network(name, named(f"{name}-mini"), (images, labels), nn.CrossEntropyLoss(), "Fashion-MNIST")


PAIRS = "line pairs of Shakespeare, by character"


def _pairs(seed: int, size: int | None) -> tuple[list[MaskedPairs], int]:
    """Return one batch of line pairs, and the size of its vocabulary."""
    text = shakespeare()
    newline = text.encode("\n")
    ends = (text.tokens == newline).nonzero().flatten()
    pairs = line_pairs([line[line != newline] for line in torch.tensor_split(text.tokens, ends)])
    vocab_size = len(text.vocabulary) + SPECIAL
    return masked_pairs(pairs, vocab_size, batch_size=size or MINI_PAIRS, context=32, seed=seed), vocab_size


def _of_transformers(name: str, seed: int, size: int | None) -> Network:
    """Return a Transformers language model with the labels that its loss needs."""
    [pairs], vocab_size = _pairs(seed, size)
    model = named(name, vocab_size=vocab_size)
    kind = type(model).__name__
    next_sentence = "next_sentence_label" in inspect.signature(model.forward).parameters
    if next_sentence or kind.endswith("MaskedLM"):
        batch = {"input_ids": pairs.tokens, "attention_mask": (pairs.tokens != PADDING).long(), "labels": pairs.labels}
        if next_sentence:
            # Transformers counts segments from 0, padding included in the first; label 0 means that B follows A.
            batch |= {"token_type_ids": (pairs.segments == 2).long(), "next_sentence_label": 1 - pairs.is_next}
        return Network(name, model, batch, None, PAIRS)
    if not kind.endswith(("CausalLM", "LMHeadModel")):
        raise ValueError(
            f"network: hf:TYPE must have a causal, masked or next-sentence language model, got {name!r}, a {kind}"
        )
    [(tokens, _)] = shakespeare().batches(batch_size=size or MINI_WINDOWS, seed=seed)
    return Network(name, model, {"input_ids": tokens, "labels": tokens}, None, "Shakespeare, by character")


def samples(name: str, found: Source) -> tuple[int, int]:
    """Return the number of samples in the paper's batch, and in each part of it."""
    if found.num_samples is not None:
        return IMAGES, IMAGES_AT_ONCE
    return TOKENS[name] // found.tokens, max(1, TOKENS_AT_ONCE // found.tokens)


def model_of(name: str, found: Source, seed: int) -> nn.Module:
    """Return a network at the paper's size, initialized from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return named(name, **found.sizes)


def _at_paper_size(name: str, selection: Selection, seed: int, size: int | None, at_once: int | None) -> Network:
    if name.startswith("hf:"):
        raise ValueError(
            f"network: name at the paper's size must be one of {', '.join(NETWORKS)}, timm:NAME or torchvision:NAME, "
            f"got {name!r}"
        )
    found = source(name, selection.data)
    count, together = samples(name, found)
    count, together = size or count, at_once or together
    parts = split_batch(found.draw(count, seed, 0), -(-count // together))
    return Network(name, model_of(name, found, seed), parts, found.loss_fn, found.description)
