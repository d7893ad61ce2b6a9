"""How the six networks are trained at the paper's size, for Figures 1, 10 and 11; never run at full size.

From the paper (appendix C.1): networks, data sets and code bases; "all the models under the default configurations"; on
CNNs the rate of AdamW is the recommended rate of SGD over 100; gradients of language models are clipped with every
optimizer. SGD and AdamW are its Algorithms 1 and 2, so SGD has momentum 0.9 and no weight decay. Its batches of 1,024
images and so on are those of the Hessian, not of the training.

Defaults of the code bases it names: ResNet18 and VGG16 (PyTorch's ImageNet example): 90 epochs, batches of 256 images,
rate 0.1, or 0.01 without BatchNorm, divided by 10 every 30 epochs. GPT2-nano and GPT2 (nanoGPT's train_shakespeare_char
and train_gpt2): steps, windows, rates, warm-up, beta2, weight decay and clipping.

Chosen here, since the paper does not say: the grid of SGD on Transformers; one seed; for ViT the settings of DeiT for a
batch of 1,024, over the epochs on the axis of Figure 11 (a); for BERT the steps at the end of the axis of Figure 11
(b), which calls them epochs, a batch of 32 pairs, and the rate, weight decay and warm-up of its authors. Unlike in the
code bases: no data augmentation, no dropout, a cosine that ends at 0 instead of a tenth, and AdamW decays all
parameters.

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

# Batch of a smoke test.
QUICK_BATCH = 4


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        batch: number of images, windows or sentence pairs per step.
        at_once: samples per autograd graph.
        rates: optimizer -> rates to try; Figure 1 uses the first.
        steps, epochs: number of steps, or of passes over the data.
        schedule, warmup, clip, weight_decay, beta2: arguments of train.
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
    """A network at the paper's size that can be built and trained, like architectures.Architecture.

    Attributes:
        name: a key of NETWORKS.
        found: its data.
        recipe: how it is trained.
        selection: data folder and device.
        quick: whether to use few samples and steps.
    """

    name: str
    found: Source
    recipe: Recipe
    selection: Selection
    quick: bool

    @property
    def transformer(self) -> bool:
        """Whether the network is a Transformer."""
        return NETWORKS[self.name][2]

    @property
    def loss_fn(self) -> Any:
        """The argument of spectrum and train."""
        return self.found.loss_fn

    @property
    def batch(self) -> int:
        """Samples per step."""
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
    def extra_settings(self) -> dict[str, Any]:
        """Settings that identify its trainings besides training_runs.Settings."""
        return {**self.options, "batch": self.batch, "data": self.found.description, "identity": self.found.identity}

    def settings(self, seed: int) -> Settings:
        """Return steps, schedule and rates for one seed.

        Raises:
            ValueError: there are fewer images than a batch has.
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
        """Return the model at the initialization of a seed."""
        return model_of(self.name, self.found, seed).to(self.selection.device)

    def batches(self, num_batches: int, seed: int) -> Stream:
        """Return the batches of a training, each drawn on access."""
        return Stream(self.found, num_batches, self.batch, seed, torch.device(self.selection.device))

    def measured_batch(self, seed: int) -> Network:
        """Return the network with the batch of its Hessian, as in Figures 3 and 4."""
        return network(self.name, self.selection, seed=seed, size=QUICK_BATCH if self.quick else None)


def trainees(names: Sequence[str], selection: Selection, quick: bool) -> dict[str, PaperTrainee]:
    """Return the networks as PaperTrainee, after checking that the data of all of them exist.

    Raises:
        ValueError: see sources.source.
    """
    return {name: PaperTrainee(name, source(name, selection.data), RECIPES[name], selection, quick) for name in names}
