"""Networks, losses and data whose products are measured; text and images from blockhess.datasets, random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.hvp.rivals import Case
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig

SEED = 0


def gpt(name: str, config: GPTConfig, windows: int, stride: int = 1) -> Case:
    """Return a GPT with next-token cross-entropy on Shakespeare; measures every stride-th block."""
    torch.manual_seed(SEED)
    text = shakespeare()
    [(tokens, targets)] = text.batches(batch_size=windows, context=config.context, seed=SEED)
    model = nn.Sequential(GPT(dataclasses.replace(config, vocab_size=len(text.vocabulary))), nn.Flatten(0, 1))
    return _case(name, model, (tokens, targets.flatten()), stride)


def resnet(name: str, config: ResNetConfig, images: int, stride: int = 1) -> Case:
    """Return a ResNet with cross-entropy on Fashion-MNIST and BatchNorm with running statistics."""
    torch.manual_seed(SEED)
    return _case(name, ResNet(config), fashion_mnist(images), stride)


class Logits(nn.Module):
    """A model of Transformers that returns its logits as (samples, classes)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).logits.flatten(0, -2)  # type: ignore[no-any-return]


def gpt_2(name: str, shape: tuple[int, int], stride: int = 1, **config: Any) -> Case:
    """Return Transformers' GPT-2 with next-token cross-entropy on random tokens (windows, length)."""
    import transformers

    torch.manual_seed(SEED)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(use_cache=False, **config)).eval()
    tokens, targets = torch.randint(model.config.vocab_size, (2, *shape))
    return _case(name, Logits(model), (tokens, targets.flatten()), stride)


def vit(name: str, **config: Any) -> Case:
    """Return Transformers' ViT with cross-entropy on a random image."""
    import transformers

    torch.manual_seed(SEED)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**config)).eval()
    size = model.config.image_size
    return _case(name, Logits(model), (torch.randn(1, 3, size, size), torch.randint(2, (1,))), 1)


def _case(name: str, model: nn.Module, batch: tuple[Tensor, Tensor], stride: int) -> Case:
    names = [parameter for parameter, _ in model.named_parameters()]
    return Case(name, model, nn.CrossEntropyLoss(), batch, tuple(names[stride // 2 :: stride]))


_GPT = GPTConfig(context=64, num_layers=4, num_heads=4, width=128)
_FUSED = GPTConfig(context=64, num_layers=3, num_heads=4, width=104, fused_qkv=True)
_GPT_2 = {"n_layer": 4, "n_head": 4, "n_embd": 88, "n_positions": 64, "vocab_size": 65, "tie_word_embeddings": False}
_VIT = {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_labels": 1000}
# Strides are coprime to the 8 blocks of a GPT's layer and the 6 of a ResNet's, so that all kinds of blocks take part.
CASES: dict[str, Callable[[], Case]] = {
    "gpt": lambda: gpt("GPT 0.8M, 512 tokens", _GPT, 8),
    "resnet": lambda: resnet("ResNet18 width 16, 64 images", ResNetConfig(16, (2, 2, 2, 2), 10, 1, "small"), 64, 5),
    "nano": lambda: gpt("GPT2-nano 10.7M, 1024 tokens", GPTConfig(), 4, 13),
    "nano, 32 tokens": lambda: gpt("GPT2-nano, 32 tokens", GPTConfig(context=8), 4),
    "fused": lambda: gpt("GPT 0.4M, 384 tokens", _FUSED, 6),
    "hf": lambda: gpt_2("GPT-2 of 0.4M parameters, 384 tokens", (6, 64), **_GPT_2),
    "gpt-2": lambda: gpt_2("GPT-2 124M, 64 tokens", (1, 64), 16),
    "vit": lambda: vit("ViT-small, 1 image", **_VIT),
}
_TINY_GPT = GPTConfig(context=8, num_layers=1, num_heads=2, width=16)
_TINY_GPT_2 = {"n_layer": 1, "n_head": 2, "n_embd": 16, "n_positions": 8, "vocab_size": 11}
_TINY_VIT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
QUICK: dict[str, Callable[[], Case]] = {
    **dict.fromkeys(("gpt", "nano", "nano, 32 tokens", "fused"), lambda: gpt("GPT, tiny", _TINY_GPT, 2, 3)),
    "resnet": lambda: resnet("ResNet, tiny", ResNetConfig(4, (1,), 10, 1, "small"), 4, 4),
    **dict.fromkeys(("hf", "gpt-2"), lambda: gpt_2("GPT-2, tiny", (2, 8), 4, **_TINY_GPT_2)),
    "vit": lambda: vit("ViT, tiny", image_size=8, patch_size=4, num_labels=3, **_TINY_VIT),
}


def case_of(key: str, size: str) -> Case:
    """Return a case at size "full", or a tiny one."""
    return (CASES if size == "full" else QUICK)[key]()
