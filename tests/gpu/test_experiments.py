"""What the experiments of blockhess_paper compute on the GPU equals what they compute on the CPU."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from blockhess_paper.scaled_mlp.mlp import Images, train
from blockhess_paper.structure.figure2 import transformer_hessian
from blockhess_paper.training import loop
from blockhess_paper.training.architectures import ARCHITECTURES
from tests.gpu import device
from tests.gpu.device import DEVICE, assert_near

device.require(cuda=False)


def images(seed: int = 0) -> Images:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(256) % 10
    pixels = torch.randn(10, 784, generator=generator)[labels] + torch.randn(256, 784, generator=generator)
    return Images((pixels, labels), (pixels, labels), "noise")


def test_scaled_mlps_are_trained() -> None:
    for optimizer in ("SGD", "Adam"):
        found = [
            train(images().to(where), [1, 3], [1e-3], optimizer, num_steps=12, points=2) for where in (DEVICE, "cpu")
        ]
        # Rounding may change the class of one of 256 images.
        assert float((found[0].accuracy - found[1].accuracy).abs().max()) <= 1 / 256
        assert float(found[0].accuracy.max()) > 0.5 and not found[0].diverged.any()


def test_exact_hessians() -> None:
    (found, _), (expected, _) = transformer_hessian(1, 0, DEVICE), transformer_hessian(1, 0)
    assert_near([found], [expected], 2**10 * torch.finfo(torch.float64).eps)


def test_small_networks_are_trained() -> None:
    losses = []
    for where in (DEVICE, "cpu"):
        network = dataclasses.replace(ARCHITECTURES["gpt-1"], device=where)
        model: nn.Module = network.model(0)
        made = loop.train(model, network.batches(3, 0), network.loss_fn, optimizer="AdamW", rate=1e-3, num_steps=3)
        losses.append(torch.tensor(made.losses))
    assert_near(losses[:1], losses[1:], 2**10 * torch.finfo(torch.float32).eps)
