"""How the six networks are trained at the paper's size, for Figures 1, 10 and 11. Nobody has run it at full size yet.

From the paper (appendix C.1): networks, data sets, code bases; "all the models under the default configurations"; on
CNNs AdamW's rate is SGD's recommended one over 100; gradients of language models are clipped whatever the optimizer;
SGD and AdamW are its Algorithms 1 and 2, so SGD has momentum 0.9 and no weight decay. The batches of 1,024 images and
so on are those whose Hessian is measured.

From the code bases that it names, as they are by default: ResNet18 and VGG16 (PyTorch's ImageNet example): 90 epochs of
256 images, rate 0.1 and, for networks without BatchNorm, 0.01, divided by 10 every 30 epochs. GPT2-nano and GPT2
(nanoGPT's train_shakespeare_char and train_gpt2): steps, windows, rates, warm-up, beta2, decay, clipping.

Chosen here, since the paper is silent or its words fit no number: SGD's grid on Transformers; one seed; ViT's numbers,
which are DeiT's for a batch of 1,024, over as many epochs as the axis of Figure 11 (a) shows; BERT's steps, the end of
the axis of Figure 11 (b), which calls them epochs, its batch of 32 pairs, and rate, decay and warm-up of its authors.
Different from the code bases: no augmentation of images, no dropout; the cosine ends at 0, not at a tenth; AdamW decays
all parameters alike.

Source: https://github.com/pytorch/examples/tree/main/imagenet; https://github.com/karpathy/nanoGPT; Touvron et al. 2021
(DeiT); Devlin et al. 2018, appendix A.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from blockhess_paper.networks.networks import NETWORKS, Network, Selection, model_of, network
from blockhess_paper.networks.sources import Source, Stream, source
from blockhess_paper.training.optimizers import BETA2
from blockhess_paper.training.training_runs import QUICK, Settings

# SGD on Transformers: decades around the rates of AdamW and of SGD on CNNs.
GRID = (1e-3, 1e-2, 1e-1, 1.0)

# What a smoke test trains on; its numbers mean nothing.
QUICK_BATCH = 4


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        batch: samples: images, windows or sentence pairs.
        at_once: of these that one graph holds.
        rates: optimizer -> the rates that are tried; the first is that of Figure 1.
        steps: how many; or epochs, with as many steps as the data have batches.
        schedule, warmup, clip, weight_decay, beta2: of train.
    """

    batch: int
    at_once: int
    rates: Mapping[str, Sequence[float]]
    schedule: str
    steps: int = 0
    epochs: int = 0
    warmup: int = 0
    clip: float | None = None
    weight_decay: float = 0.0
    beta2: float = BETA2


RECIPES = {
    "resnet18": Recipe(256, 256, {"SGD": (0.1,), "AdamW": (0.1 / 100,)}, "thirds", epochs=90),
    "vgg16": Recipe(256, 64, {"SGD": (0.01,), "AdamW": (0.01 / 100,)}, "thirds", epochs=90),
    "vit-base": Recipe(
        1024, 128, {"SGD": GRID, "AdamW": (1e-3,)}, "cosine", epochs=45, warmup=6_250, weight_decay=0.05
    ),
    "bert": Recipe(
        32, 32, {"SGD": GRID, "AdamW": (1e-4,)}, "cosine", 140_000, warmup=10_000, clip=1.0, weight_decay=0.01
    ),
    "gpt2-nano": Recipe(
        64, 64, {"SGD": GRID, "AdamW": (1e-3,)}, "cosine", 5_000,
        warmup=100, clip=1.0, weight_decay=0.1, beta2=0.99,
    ),
    "gpt2": Recipe(
        480, 12, {"SGD": GRID, "AdamW": (6e-4,)}, "cosine", 600_000,
        warmup=2_000, clip=1.0, weight_decay=0.1, beta2=0.95,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class PaperTrainee:
    """A network at the paper's size that can be made and trained: as architectures.Architecture.

    Attributes:
        name: of NETWORKS.
        found: its data.
        recipe: how it is trained.
        selection: data folder and device.
        quick: whether few samples and steps are taken.
    """

    name: str
    found: Source
    recipe: Recipe
    selection: Selection
    quick: bool

    @property
    def transformer(self) -> bool:
        """Whether it is one."""
        return NETWORKS[self.name][2]

    @property
    def loss_fn(self) -> Any:
        """Of spectrum and train."""
        return self.found.loss_fn

    @property
    def batch(self) -> int:
        """Samples a step."""
        return QUICK_BATCH if self.quick else self.recipe.batch

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of train."""
        recipe = self.recipe
        return {
            "clip": recipe.clip,
            "weight_decay": recipe.weight_decay,
            "beta2": recipe.beta2,
            "at_once": min(recipe.at_once, self.batch),
        }

    @property
    def told(self) -> dict[str, Any]:
        """What else tells its trainings from others."""
        return {**self.options, "batch": self.batch, "data": self.found.words, "identity": self.found.identity}

    def settings(self, seed: int) -> Settings:
        """Steps, schedule, rates and the one seed.

        Raises:
            ValueError: the data have no batch.
        """
        recipe = self.recipe
        grids = {optimizer: list(rates) for optimizer, rates in recipe.rates.items()}
        if self.quick:
            first = {optimizer: rates[:2] for optimizer, rates in grids.items()}
            return Settings(QUICK.num_steps, 1, recipe.schedule, (seed,), first, 0, False)
        steps = recipe.steps
        if recipe.epochs:
            steps = recipe.epochs * ((self.found.num_samples or 0) // recipe.batch)
            if not steps:
                raise ValueError(
                    f"network: the images of {self.name} must be a batch of {recipe.batch:,}, got "
                    f"{self.found.num_samples:,}"
                )
        return Settings(steps, min(recipe.warmup, steps - 1), recipe.schedule, (seed,), grids, 0, False)

    def model(self, seed: int) -> nn.Module:
        """Return the model at the initialisation of a seed."""
        return model_of(self.name, self.found, seed).to(self.selection.device)

    def batches(self, num_batches: int, seed: int) -> Stream:
        """Return the batches of a training, each drawn when it is asked for."""
        return Stream(self.found, num_batches, self.batch, seed, torch.device(self.selection.device))

    def measured_batch(self, seed: int) -> Network:
        """Return the network with the batch whose Hessian is measured: as of Figures 3 and 4."""
        return network(self.name, self.selection, seed=seed, size=QUICK_BATCH if self.quick else None)


def trainees(names: Sequence[str], selection: Selection, quick: bool) -> dict[str, PaperTrainee]:
    """Return networks that can be trained, the data of all of them looked for first.

    Raises:
        ValueError: see sources.source.
    """
    return {name: PaperTrainee(name, source(name, selection.data), RECIPES[name], selection, quick) for name in names}
