"""The paper's six models, one small file each, and a registry of them by name."""

from __future__ import annotations

from blockhess.models.bert import BERT, BERTConfig, MaskedPairs, masked_pair_loss
from blockhess.models.gpt import GPT, GPTConfig, next_token_loss
from blockhess.models.registry import CONFIGS, named
from blockhess.models.resnet import ResNet, ResNetConfig
from blockhess.models.vgg import VGG, VGGConfig
from blockhess.models.vit import ViT, ViTConfig

__all__ = [
    "BERT",
    "BERTConfig",
    "CONFIGS",
    "GPT",
    "GPTConfig",
    "MaskedPairs",
    "ResNet",
    "ResNetConfig",
    "VGG",
    "VGGConfig",
    "ViT",
    "ViTConfig",
    "masked_pair_loss",
    "named",
    "next_token_loss",
]
