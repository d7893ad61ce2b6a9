"""A Vision Transformer with the layout, parameter names and initialization of timm's vit_base_patch16_224.

    x = [cls, patches] + pos;  x += proj(attn(qkv(norm1(x))));  x += fc2(gelu(fc1(norm2(x))))  per block
    logits = head(norm(x)_cls)

Query, key and value are one parameter, qkv, as in timm; `blockhess.heads(model, "blocks.0.attn.qkv.weight", 1,
roles=("q", "k", "v"))` splits it into three blocks. There is no dropout, as in timm by default.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blockhess.models.resnet import check_images


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a `ViT`; the defaults are ViT-base with patches of 16 on 224 x 224 pixels and 1000 classes (86.57M)."""

    image_size: int = 224
    patch_size: int = 16
    depth: int = 12
    num_heads: int = 12
    width: int = 768
    num_classes: int = 1000
    in_channels: int = 3

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"ViTConfig: {name} must be at least 1, got {value}")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"ViTConfig: image_size must be a multiple of patch_size = {self.patch_size}, got {self.image_size}"
            )
        if self.width % self.num_heads:
            raise ValueError(f"ViTConfig: width must be a multiple of num_heads = {self.num_heads}, got {self.width}")


class Attention(nn.Module):
    """Multi-head self-attention over (batch, tokens, width)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """MLP with one hidden layer of 4 x width and GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """One pre-LayerNorm residual layer."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=1e-6)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=1e-6)
        self.mlp = MLP(config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class PatchEmbed(nn.Module):
    """Patches of an image as tokens: (batch, channels, height, width) -> (batch, tokens, width)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(config.in_channels, config.width, config.patch_size, stride=config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class ViT(nn.Module):
    """Image classifier with a class token.

    Initialized from torch's global generator: linear weights and positions truncated normal of 0.02, the class token
    N(0, 1e-12), biases 0, the patch convolution as nn.Conv2d does.

    Args:
        config: sizes; the default is ViT-base for ImageNet.

    Source: Dosovitskiy et al. 2020; timm's vit_base_patch16_224.

    Example:
        >>> model = ViT(ViTConfig(image_size=8, patch_size=4, depth=1, num_heads=2, width=16, num_classes=10))
        >>> model(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, config: ViTConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ViTConfig()
        tokens = 1 + (config.image_size // config.patch_size) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, config.width))
        self.patch_embed = PatchEmbed(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.num_classes)

        nn.init.normal_(self.cls_token, std=1e-6)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (batch, num_classes) of images (batch, in_channels, image_size, image_size).

        Raises:
            ValueError: images have another size or number of channels.
        """
        check_images("ViT", images, self.config.in_channels)
        size = self.config.image_size
        if images.shape[-2:] != (size, size):
            raise ValueError(f"ViT: images must be {size} x {size}, got {tuple(images.shape[-2:])}")
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])  # type: ignore[no-any-return]

    def paper_blocks(self, figure: bool) -> dict[str, str]:
        """Return block name -> parameter: embedding, head, attention and MLP of the first, a middle and the last block.

        Of 12 blocks, the text names the 1st, 6th and 12th, weights and biases; Figure 4 (e) shows indices 0, 6 and 11,
        weights only.
        """
        depth = self.config.depth
        shown = {0, depth // 2 if figure else (depth - 1) // 2, depth - 1}
        blocks = [
            f"blocks.{i}.{part}" for i in sorted(shown) for part in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
        ]
        owners = ["patch_embed.proj", *blocks, "head"]
        if figure:
            return {owner: f"{owner}.weight" for owner in owners}
        return {f"{owner}.{kind}": f"{owner}.{kind}" for owner in owners for kind in ("weight", "bias")}
