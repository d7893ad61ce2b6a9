"""Block sizes: the parameter tensors of well-known networks, and artificial ones."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise


def gpt2(vocabulary: int, context: int, width: int, layers: int, bias: bool) -> list[int]:
    """Return the sizes for a GPT-2 with separate query, key and value, and embeddings tied to the output."""
    return [vocabulary * width, context * width, *layers * _layer(width, bias), *_norm(width, bias)]


def _norm(width: int, bias: bool = True) -> list[int]:
    return [width, width] if bias else [width]


def _linear(inputs: int, outputs: int, bias: bool = True) -> list[int]:
    return [inputs * outputs, outputs] if bias else [inputs * outputs]


def _layer(width: int, bias: bool = True) -> list[int]:
    """Return the sizes of attention and an MLP four times as wide, with a LayerNorm each."""
    attention = 4 * _linear(width, width, bias)
    mlp = _linear(width, 4 * width, bias) + _linear(4 * width, width, bias)
    return _norm(width, bias) + attention + _norm(width, bias) + mlp


def bert() -> list[int]:
    """Return the sizes for BERT base with its pooler."""
    width = 768
    embeddings = [30_522 * width, 512 * width, 2 * width, *_norm(width)]
    return embeddings + 12 * _layer(width) + _linear(width, width)


def vit() -> list[int]:
    """Return the sizes for ViT-B/16 with images of 224 x 224 and 1,000 classes."""
    width = 768
    embeddings = [width, 197 * width, *_linear(3 * 16 * 16, width)]
    return embeddings + 12 * _layer(width) + _norm(width) + _linear(width, 1000)


def vgg16() -> list[int]:
    """Return the sizes for VGG16 without BatchNorm."""
    channels = [3, 64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    dims = [size for a, b in pairwise(channels) for size in _linear(9 * a, b)]
    return dims + _linear(512 * 7 * 7, 4096) + _linear(4096, 4096) + _linear(4096, 1000)


def resnet18() -> list[int]:
    """Return the sizes for ResNet18 with 1,000 classes."""
    dims, inputs = [7 * 7 * 3 * 64, *_norm(64)], 64
    for outputs in (64, 64, 128, 128, 256, 256, 512, 512):
        dims += [9 * inputs * outputs, *_norm(outputs), 9 * outputs * outputs, *_norm(outputs)]
        if inputs != outputs:
            dims += [inputs * outputs, *_norm(outputs)]
        inputs = outputs
    return dims + _linear(512, 1000)


def log_spaced(n: int, smallest: int, largest: int) -> list[int]:
    """Return n logarithmically spaced sizes."""
    ratio = (largest / smallest) ** (1 / (n - 1))
    return [round(smallest * ratio**i) for i in range(n)]


LAYOUTS: dict[str, Callable[[], list[int]]] = {
    "GPT2-nano": lambda: gpt2(65, 256, 384, 6, bias=False),
    "150 small blocks": lambda: log_spaced(150, 64, 65_536),
    "GPT-2 124M": lambda: gpt2(50_257, 1024, 768, 12, bias=True),
    "ResNet18": resnet18,
    "VGG16": vgg16,
    "ViT-base": vit,
    "BERT": bert,
    "one huge block": lambda: [100_000_000],
}
