"""Block spectra behind docs/findings.md on BatchNorm: ResNet18 at its real width under three policies, and GPT2-nano.

The ResNet18 is the paper's (11M, ImageNet stem) on 8 images of Fashion-MNIST enlarged to 56 x 56, with the same
weights under three BatchNorm policies; the GPT is the paper's GPT2-nano (10.7M) on 512 characters of Shakespeare. A
seed determines weights, images or text windows, and probes. The influence of the number of images, and of further
seeds, is measured on small versions of both.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import blockhess
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess_paper.models import named

IMAGES, IMAGE_SIDE, WINDOWS = 8, 56, 2
NUM_PROBES, NUM_STEPS, SEEDS = 3, 20, (0, 1)

# Statistics of the batch, as in training; of eval mode, as in the paper's code; of the batch, held fixed.
POLICIES = ("batch", "eval", "frozen_batch_stats")

# Of the small networks: numbers of images with seed 0, further seeds, and all (images, seed).
MINI_IMAGES, MINI_SEEDS = (8, 64, 256), (1, 2)
MINI_RUNS = (*((count, 0) for count in MINI_IMAGES), *((MINI_IMAGES[1], seed) for seed in MINI_SEEDS))


def weights(model: nn.Module) -> dict[str, str]:
    """Return a block for every parameter tensor of two dimensions or more: no biases, no normalization layers."""
    return {name: name for name, parameter in model.named_parameters() if parameter.ndim > 1}


def stem(name: str, seed: int) -> str:
    """Return the stem of the result file of a network at full width."""
    return name + (f"_seed{seed}" if seed else "")


def small_jobs() -> dict[str, dict[str, Any]]:
    """Return the jobs of the small ResNet, for numbers of images and seeds, and of the small GPT for the same seeds."""
    found: dict[str, dict[str, Any]] = {}
    for count, seed in MINI_RUNS:
        torch.manual_seed(seed)
        resnet = named("resnet18-mini")
        data = fashion_mnist(count)
        for policy in POLICIES:
            found[f"mini_resnet_{policy}_{count}_seed{seed}"] = {
                "model": resnet,
                "data": data,
                "loss_fn": nn.CrossEntropyLoss(),
                "blocks": weights(resnet),
                "batchnorm": policy,
            }
    text = shakespeare()
    for seed in (0, *MINI_SEEDS):
        torch.manual_seed(seed)
        gpt = named("gpt2-nano-mini", vocab_size=len(text.vocabulary), fused_qkv=False)
        windows = text.batches(batch_size=8, context=64, seed=seed)
        found[f"mini_gpt_seed{seed}"] = {
            "model": gpt,
            "data": windows,
            "loss_fn": next_token_loss,
            "blocks": weights(gpt),
        }
    return found


def full_jobs(seed: int) -> dict[str, dict[str, Any]]:
    """Return the jobs of ResNet18 under every policy and of GPT2-nano."""
    text = shakespeare()
    shown = slice(seed * IMAGES, (seed + 1) * IMAGES)
    images, labels = (t[shown] for t in fashion_mnist())
    images = F.interpolate(images, size=(IMAGE_SIDE, IMAGE_SIDE), mode="bilinear")
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(len(text.vocabulary)))
    resnet = ResNet(ResNetConfig(num_classes=10, in_channels=1))
    windows = text.batches(batch_size=WINDOWS, context=gpt.config.context, seed=seed)
    on_images = {
        "model": resnet,
        "data": (images, labels),
        "loss_fn": nn.CrossEntropyLoss(),
        "blocks": weights(resnet),
        "seed": seed,
    }
    on_text = {"model": gpt, "data": windows, "loss_fn": next_token_loss, "blocks": weights(gpt), "seed": seed}
    policies = {stem(f"resnet18_{policy}", seed): {**on_images, "batchnorm": policy} for policy in POLICIES}
    return {**policies, stem("gpt2_nano", seed): on_text}


def jobs() -> dict[str, dict[str, Any]]:
    """Return name of the job -> arguments of spectrum."""
    return {name: job for seed in SEEDS for name, job in full_jobs(seed).items()} | small_jobs()


def measure(
    folder: Path,
    environment: Callable[[], Mapping[str, object]],
    names: Sequence[str] = (),
    num_probes: int = NUM_PROBES,
) -> None:
    """Measure the spectra that FOLDER lacks, one probe after the other, each saved as soon as it is done.

    Args:
        folder: FOLDER/NAME.npz holds the spectra of a job; they are extended to num_probes.
        environment: returns what is recorded of the machine with every probe, such as the commit.
        names: prefixes of the names of the jobs; none means all.
        num_probes: probes of every block.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = {name: job for name, job in jobs().items() if name.startswith(tuple(names) or "")}
    same: dict[str, Any] = {"num_steps": NUM_STEPS, "engine": "autograd", "reorthogonalize": "none"}
    for count in range(1, num_probes + 1):
        for name, job in todo.items():
            path = folder / f"{name}.npz"
            if not path.exists():
                spectra = blockhess.spectrum(**job, **same, num_probes=1)
            elif (before := blockhess.load(path)).quadrature.num_probes < count:
                spectra = blockhess.extend(before, **job, **same, num_probes=count)
            else:
                continue
            spectra.provenance.setdefault("made_at", []).append({**environment(), "date": str(datetime.date.today())})
            spectra.save(path)
            print(f"{path.name}: {spectra!r}; {spectra.provenance['seconds']:.0f} s", flush=True)
