"""VGG of any width and depth, with torchvision's parameter names and initialization, optionally with BatchNorm.

x = pool(relu(conv3x3(... x)))  per stage;  logits = linear(relu(linear(relu(linear(avgpool(x))))))
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from blockhess.models.resnet import check_images


@dataclass(frozen=True)
class VGGConfig:
    """Sizes of a `VGG`; the defaults are VGG16 on 1000 classes (138.36M).

    Stage s has `convs_per_stage[s]` convolutions of width min(2^s, 8) x `width` and halves the image; the last image is
    averaged to `pooled` x `pooled` pixels. `batch_norm` adds a BatchNorm after every convolution (vgg16_bn).
    """

    width: int = 64
    convs_per_stage: tuple[int, ...] = (2, 2, 3, 3, 3)
    hidden: int = 4096
    pooled: int = 7
    num_classes: int = 1000
    in_channels: int = 3
    batch_norm: bool = False

    def __post_init__(self) -> None:
        for name in ("width", "hidden", "pooled", "num_classes", "in_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"VGGConfig: {name} must be at least 1, got {getattr(self, name)}")
        if not self.convs_per_stage or min(self.convs_per_stage) < 1:
            raise ValueError(f"VGGConfig: convs_per_stage must hold counts of at least 1, got {self.convs_per_stage}")


class VGG(nn.Module):
    """Plain convolutional image classifier.

    Initialized from torch's global generator: convolutions Kaiming normal with fan_out, linear layers N(0, 0.01^2),
    biases 0.

    Args:
        config: sizes; the default is VGG16 for ImageNet.

    Source: Simonyan and Zisserman 2014; torchvision.models.vgg16.

    Example:
        >>> import torch
        >>> model = VGG(VGGConfig(width=4, convs_per_stage=(1, 1), hidden=8, pooled=2, num_classes=10, in_channels=1))
        >>> model(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: VGGConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or VGGConfig()
        features: list[nn.Module] = []
        channels = config.in_channels
        for stage, convs in enumerate(config.convs_per_stage):
            width = config.width * min(1 << stage, 8)
            for _ in range(convs):
                features.append(nn.Conv2d(channels, width, 3, padding=1))
                features += [nn.BatchNorm2d(width)] if config.batch_norm else []
                features.append(nn.ReLU())
                channels = width
            features.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*features)
        self.avgpool = nn.AdaptiveAvgPool2d(config.pooled)
        hidden = config.hidden
        self.classifier = nn.Sequential(
            nn.Linear(channels * config.pooled**2, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(hidden, config.num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, nn.Conv2d | nn.Linear):
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, num_classes) of images (batch, in_channels, height, width).

        Raises:
            ValueError: images have another number of channels, or are too small for the number of stages.
        """
        check_images("VGG", images, self.config.in_channels)
        least = 1 << len(self.config.convs_per_stage)
        if min(images.shape[-2:]) < least:
            raise ValueError(f"VGG: images must be at least {least} x {least}, got {tuple(images.shape[-2:])}")
        x = self.avgpool(self.features(images))
        return self.classifier(x.flatten(1))  # type: ignore[no-any-return]

    def paper_blocks(self, figure: bool) -> dict[str, str]:
        """Return block name -> parameter: all but BatchNorm; for Figure 4 (d), the 16 weights."""
        norms = {f"features.{i}" for i, module in enumerate(self.features) if isinstance(module, nn.BatchNorm2d)}
        names = [name for name, _ in self.named_parameters() if name.rpartition(".")[0] not in norms]
        if figure:
            return {name.removesuffix(".weight"): name for name in names if name.endswith("weight")}
        return {name: name for name in names}
