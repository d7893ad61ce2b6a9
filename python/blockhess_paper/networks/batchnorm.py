"""Measures what docs/findings.md says of BatchNorm: block spectra of ResNet18 at its real width, and of GPT2-nano.

python -m blockhess_paper.networks.batchnorm             # all, 3 probes of 20 steps; about two hours on one thread
python -m blockhess_paper.networks.batchnorm mini        # those whose name begins so
python -m blockhess_paper.networks.batchnorm --probes 4  # adds probes to what is there, and to that alone

The ResNet18 is the paper's (11M, ImageNet stem) on 8 images of Fashion-MNIST enlarged to 56 x 56, with the same
weights under three BatchNorm policies; the GPT the paper's GPT2-nano (10.7M) on 512 characters of Shakespeare. A seed
decides weights, images or windows, and probes. What the number of images and more seeds change is measured on the
small relatives of both. After every probe the spectra are written to docs/results/findings, with where and
when that was done, so what was interrupted goes on where it stopped.
"""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import blockhess
from bench.harness.environment import describe
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss
from blockhess_paper.models import named

RESULTS = Path("docs/results/findings")
IMAGES, IMAGE_SIDE, WINDOWS = 8, 56, 2
NUM_PROBES, NUM_STEPS, SEEDS = 3, 20, (0, 1)

# Of training, of the paper's code, and the statistics of training held fixed.
POLICIES = ("batch", "eval", "frozen_batch_stats")

# Of the small relatives: images with seed 0, and (images, seed).
MINI_IMAGES, MINI_SEEDS = (8, 64, 256), (1, 2)
MINI_RUNS = (*((count, 0) for count in MINI_IMAGES), *((MINI_IMAGES[1], seed) for seed in MINI_SEEDS))


def weights(model: nn.Module) -> dict[str, str]:
    """Every parameter tensor of two dimensions or more, under its own name: no biases, no normalisation."""
    return {name: name for name, parameter in model.named_parameters() if parameter.ndim > 1}


def stem(name: str, seed: int) -> str:
    """Of the result file of a network at full width."""
    return name + (f"_seed{seed}" if seed else "")


def small_jobs() -> dict[str, dict[str, Any]]:
    """The small ResNet for several numbers of images and seeds, and the small GPT for the same seeds."""
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
    """ResNet18 under every policy and GPT2-nano."""
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
    """Stem of the result file -> arguments of spectrum."""
    return {name: job for seed in SEEDS for name, job in full_jobs(seed).items()} | small_jobs()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--probes", type=int, default=NUM_PROBES, help="of every block")
    parser.add_argument("names", nargs="*", default=[""], help="beginnings of the names of results; default: all")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    todo = {name: job for name, job in jobs().items() if name.startswith(tuple(arguments.names))}
    same: dict[str, Any] = {"num_steps": NUM_STEPS, "engine": "autograd", "reorthogonalize": "none"}
    for num_probes in range(1, arguments.probes + 1):
        for name, job in todo.items():
            path = RESULTS / f"{name}.npz"
            if not path.exists():
                spectra = blockhess.spectrum(**job, **same, num_probes=1)
            elif (before := blockhess.load(path)).quadrature.num_probes < num_probes:
                spectra = blockhess.extend(before, **job, **same, num_probes=num_probes)
            else:
                continue
            spectra.provenance.setdefault("made_at", []).append({**describe(), "date": str(datetime.date.today())})
            spectra.save(path)
            print(f"{path.name}: {spectra!r}; {spectra.provenance['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
