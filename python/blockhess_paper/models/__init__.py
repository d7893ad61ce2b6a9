"""The paper's BERT, VGG and ViT, small networks, and a registry of all models by name."""

from __future__ import annotations

from blockhess_paper.models.bert import BERT, BERTConfig, MaskedPairs, masked_pair_loss
from blockhess_paper.models.registry import CONFIGS, named
from blockhess_paper.models.vgg import VGG, VGGConfig
from blockhess_paper.models.vit import ViT, ViTConfig

__all__ = [
    "BERT",
    "BERTConfig",
    "CONFIGS",
    "MaskedPairs",
    "VGG",
    "VGGConfig",
    "ViT",
    "ViTConfig",
    "masked_pair_loss",
    "named",
]
