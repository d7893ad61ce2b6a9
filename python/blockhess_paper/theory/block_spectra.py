"""The spectra behind cases 1 and 2: four blocks of a GPT and four convolutions of a ResNet18, at initialization.

They replace the paper's GPT-2 (125M) on OpenWebText and ResNet18 on ImageNet, which are too large for a CPU: the
paper's GPT2-nano (10.7M, 6 layers of width 384) on Shakespeare, and ResNet18 (11M) on Fashion-MNIST, at full width and
depth. The shipped files were written by `measure`, which is `blockhess paper spectra`.
"""

from __future__ import annotations

from importlib.resources import as_file, files
from os import PathLike
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import blockhess
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess.problem.batches import map_tensors
from blockhess.spectra import Spectra

# The blocks of the paper's case 1 (embedding, 3rd query, 3rd value, 3rd MLP) and case 2 (1st to 4th convolution).
GPT_BLOCKS = ("tok.weight", "layers.2.attn.query.weight", "layers.2.attn.value.weight", "layers.2.mlp.fc.weight")
RESNET_BLOCKS = ("conv1.weight", "layers.0.conv1.weight", "layers.0.conv2.weight", "layers.1.conv1.weight")

GPT_FILE, RESNET_FILE = "paper_gpt_nano.npz", "paper_resnet18.npz"

WINDOWS, IMAGES, IMAGE_SIDE = 2, 32, 56
NUM_PROBES, NUM_STEPS = 3, 80


def gpt_spectra() -> Spectra:
    """Return the shipped spectra of GPT_BLOCKS.

    Example:
        >>> gpt_spectra().names == GPT_BLOCKS
        True
    """
    return _shipped(GPT_FILE)


def resnet_spectra() -> Spectra:
    """Return the shipped spectra of RESNET_BLOCKS, BatchNorm in eval mode as in the paper's code."""
    return _shipped(RESNET_FILE)


def _shipped(name: str) -> Spectra:
    with as_file(files("blockhess_paper") / "data" / name) as path:
        return blockhess.load(path)


def measure(folder: str | PathLike[str], *, seed: int = 0, quick: bool = False, device: str = "cpu") -> list[Path]:
    """Compute the spectra of both models and save them in a folder; some minutes on one core.

    Args:
        folder: folder of GPT_FILE and RESNET_FILE.
        seed: seed of weights, text windows and probes.
        quick: narrow models and few steps, for a smoke test.
        device: of models and data.

    Returns:
        The two files.
    """
    text = shakespeare()
    images, labels = fashion_mnist(4 if quick else IMAGES)
    images = F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        size = GPTConfig(len(text.vocabulary), context=16, num_layers=3, num_heads=2, width=16)
        gpt = GPT(size if quick else GPTConfig(len(text.vocabulary)))
        resnet = ResNet(ResNetConfig(width=4 if quick else 64, num_classes=10, in_channels=1))
    windows = text.batches(batch_size=WINDOWS, context=gpt.config.context, seed=seed)

    written = []
    for file, model, data, loss, blocks in (
        (GPT_FILE, gpt, windows, next_token_loss, GPT_BLOCKS),
        (RESNET_FILE, resnet, (images, labels), nn.CrossEntropyLoss(), RESNET_BLOCKS),
    ):
        spectra = blockhess.spectrum(
            model.to(device),
            map_tensors(lambda tensor: tensor.to(device), data),
            loss,
            blocks={name: name for name in blocks},
            num_probes=1 if quick else NUM_PROBES,
            num_steps=10 if quick else NUM_STEPS,
            seed=seed,
        )
        written.append(spectra.save(Path(folder) / file))
    return written
