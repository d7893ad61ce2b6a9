"""ResNet: parameter counts by formula, initialization, shapes, bad sizes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from blockhess.datasets import fashion_mnist
from blockhess.models import ResNet, ResNetConfig
from tests.models.test_gpt import count


def test_resnet18_has_torchvisions_parameter_count() -> None:
    with torch.device("meta"):
        assert count(ResNet()) == 11_689_512


def test_small_resnet_parameter_count() -> None:
    with torch.device("meta"):
        model = ResNet(ResNetConfig(width=8, blocks_per_stage=(1, 1), num_classes=10, in_channels=1, stem="small"))
    stem = 9 * 8 + 16
    stage_1 = 2 * (9 * 8 * 8 + 16)
    stage_2 = (9 * 8 * 16 + 32) + (9 * 16 * 16 + 32) + (8 * 16 + 32)
    assert count(model) == stem + stage_1 + stage_2 + 16 * 10 + 10


def test_resnet_initialization_is_torchvisions() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(width=32, blocks_per_stage=(1, 1)))
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * math.prod(module.kernel_size)
            n = module.weight.numel()
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=5 / math.sqrt(2 * n))
        elif isinstance(module, nn.BatchNorm2d):
            assert module.weight.eq(1).all() and module.bias.eq(0).all()


@pytest.mark.parametrize("stem, size", [("small", 28), ("imagenet", 64)])
def test_resnet_classifies_images_of_any_size(stem: str, size: int) -> None:
    model = ResNet(ResNetConfig(width=4, blocks_per_stage=(1, 1), num_classes=7, in_channels=1, stem=stem))
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 7)


def test_resnet_stages_halve_the_image_and_double_the_width() -> None:
    model = ResNet(ResNetConfig(width=4, blocks_per_stage=(1, 2, 1), num_classes=7, in_channels=1, stem="small"))
    x, shapes = torch.zeros(1, 4, 28, 28), []
    for layer in model.layers:
        x = layer(x)
        shapes.append(tuple(x.shape[1:]))
    assert shapes == [(4, 28, 28), (8, 14, 14), (8, 14, 14), (16, 7, 7)]


def test_resnet_starts_near_the_uniform_loss_with_batch_statistics() -> None:
    torch.manual_seed(0)
    model = ResNet(ResNetConfig(width=8, blocks_per_stage=(1, 1), num_classes=10, in_channels=1, stem="small"))
    images, labels = fashion_mnist(64)
    assert nn.functional.cross_entropy(model(images), labels).item() == pytest.approx(math.log(10), abs=0.5)


def test_resnet_refuses_bad_sizes() -> None:
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ResNetConfig(width=0)
    with pytest.raises(ValueError, match="blocks_per_stage must hold counts"):
        ResNetConfig(blocks_per_stage=())
    with pytest.raises(ValueError, match="stem must be"):
        ResNetConfig(stem="tiny")
