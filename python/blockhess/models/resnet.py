"""ResNet of basic blocks (the ResNet18 family) of any width, depth and stem, initialized like torchvision's.

    y = relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x))

Stage s has width 2^s x `width`. Every stage but the first halves the image; its first shortcut is a strided 1x1
convolution with BatchNorm.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a `ResNet`; the defaults are ResNet18 on 1000 classes with ImageNet's 7x7 stem (11.69M).

    `stem="imagenet"` is a 7x7 convolution of stride 2 and a max-pool; `stem="small"`, for images of about 32 pixels,
    one 3x3 convolution of stride 1.
    """

    width: int = 64
    blocks_per_stage: tuple[int, ...] = (2, 2, 2, 2)
    num_classes: int = 1000
    in_channels: int = 3
    stem: str = "imagenet"

    def __post_init__(self) -> None:
        for name in ("width", "num_classes", "in_channels"):
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"ResNetConfig: {name} must be at least 1, got {value}")
        if not self.blocks_per_stage or min(self.blocks_per_stage) < 1:
            raise ValueError(
                f"ResNetConfig: blocks_per_stage must hold counts of at least 1, got {self.blocks_per_stage}"
            )
        if self.stem not in ("imagenet", "small"):
            raise ValueError(f'ResNetConfig: stem must be "imagenet" or "small", got {self.stem!r}')


def check_images(op: str, images: Tensor, channels: int) -> None:
    """Raise ValueError, naming `op`, unless images are (batch, channels, height, width)."""
    if images.ndim != 4 or images.shape[1] != channels:
        raise ValueError(f"{op}: images must be (batch, {channels}, height, width), got {tuple(images.shape)}")


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut around them."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels_in != channels_out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 1, stride, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual image classifier.

    Initialized from torch's global generator: convolutions Kaiming normal with fan_out, BatchNorm weights 1 and biases
    0, the output layer as by nn.Linear.

    Args:
        config: sizes; the default is ResNet18 for ImageNet.

    Source: He et al. 2016; torchvision.models.resnet18.

    Example:
        >>> import torch
        >>> config = ResNetConfig(width=4, num_classes=10, in_channels=1, stem="small")
        >>> model = ResNet(config)
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: ResNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ResNetConfig()
        width = config.width
        size, stride = (7, 2) if config.stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(config.in_channels, width, size, stride, padding=size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(width)

        layers: list[nn.Module] = []
        channels = width
        for stage, depth in enumerate(config.blocks_per_stage):
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                layers.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.layers = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, config.num_classes)

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, num_classes) of images (batch, in_channels, height, width).

        Raises:
            ValueError: images have another shape.
        """
        check_images("ResNet", images, self.config.in_channels)
        x = F.relu(self.bn1(self.conv1(images)))
        if self.config.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        x = self.layers(x)
        return self.fc(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]

    def paper_blocks(self, figure: bool = False) -> dict[str, str]:
        """Return the blocks that the paper compares, as a dict from block name to parameter name.

        All parameters but BatchNorm's.

        Args:
            figure: those of Figure 4 (a), under its names (layer1.0.conv1): convolutions but shortcuts, and fc.weight.
        """
        norms = {name for name, module in self.named_modules() if isinstance(module, nn.BatchNorm2d)}
        names = [name for name, _ in self.named_parameters() if name.rpartition(".")[0] not in norms]
        if not figure:
            return {name: name for name in names}
        layers = [
            f"layer{stage}.{i}" for stage, depth in enumerate(self.config.blocks_per_stage, 1) for i in range(depth)
        ]
        return {
            re.sub(r"^layers\.(\d+)", lambda found: layers[int(found[1])], name).removesuffix(".weight"): name
            for name in names
            if name.endswith("weight") and "shortcut" not in name
        }
