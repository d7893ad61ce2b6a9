"""Networks for the demo and the tests: a GPT and a ResNet."""

from __future__ import annotations

from blockhess.models.gpt import GPT, GPTConfig, next_token_loss
from blockhess.models.resnet import ResNet, ResNetConfig

__all__ = ["GPT", "GPTConfig", "ResNet", "ResNetConfig", "next_token_loss"]
