"""Networks, data and blocks of the jobs on a GPU.

Weights and tokens are drawn by NumPy, whose streams are the same on every machine, so that results can be compared with
a file made on another one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness.machine import Machine
from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig

Blocks = dict[str, list[str]]


@dataclass(frozen=True)
class Network:
    """A model on a device with its data, loss and blocks."""

    model: nn.Module
    data: Any
    loss_fn: nn.Module
    blocks: Blocks | str
    batchnorm: str = "eval"

    @property
    def n_blocks(self) -> int:
        return len(self.blocks) if isinstance(self.blocks, dict) else len(list(self.model.parameters()))

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `spectrum`."""
        return dict(vars(self))

    def fingerprint(self) -> list[float]:
        """Return sums over weights and data, which tell whether two machines have the same."""
        weights = sum(float(p.detach().double().abs().sum()) for p in self.model.parameters())
        return [weights, *(float(x.double().sum()) for x in self.data)]


def _drawn(model: nn.Module) -> nn.Module:
    """Return the model with random matrices of standard deviation 0.02, or 1 / sqrt(fan in) for convolutions."""
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                std = 0.02 if p.ndim == 2 else (2 / p[0].numel()) ** 0.5
                p.copy_(torch.from_numpy(std * rng.standard_normal(p.shape)))
    return model


def _windows(tokens: Tensor, count: int, length: int) -> tuple[Tensor, Tensor]:
    """Return inputs (count, length) and the next tokens (count length,) at random positions."""
    starts = np.random.default_rng(1).integers(len(tokens) - length - 1, size=count)
    rows = torch.stack([tokens[s : s + length + 1] for s in starts.tolist()])
    return rows[:, :-1].contiguous(), rows[:, 1:].flatten()


def _gpt(config: GPTConfig, tokens: Tensor, windows: int, machine: Machine, dtype: torch.dtype) -> Network:
    model = nn.Sequential(_drawn(GPT(config)), nn.Flatten(0, 1)).to(machine.device, dtype)
    inputs, targets = _windows(tokens, windows, config.context)
    data = inputs.to(machine.device), targets.to(machine.device)
    matrices: Blocks = {name: [name] for name, p in model.named_parameters() if p.ndim == 2}
    return Network(model, data, nn.CrossEntropyLoss(), matrices)


def nano(machine: Machine, dtype: torch.dtype = torch.float32) -> Network:
    """Return GPT2-nano of 10.7M parameters, its 38 matrices as blocks, and 1,024 tokens of Shakespeare."""
    text = shakespeare()
    tiny = machine.size == "tiny"
    config = GPTConfig(len(text.vocabulary), 8, 1, 2, 16) if tiny else GPTConfig(len(text.vocabulary))
    return _gpt(config, text.tokens, 4, machine, dtype)


def small(machine: Machine) -> Network:
    """Return a GPT of 0.8M parameters and 512 tokens."""
    text = shakespeare()
    config = GPTConfig(
        len(text.vocabulary), machine.pick(64, 64, 8), machine.pick(4, 4, 1), 4, machine.pick(128, 128, 16)
    )
    return _gpt(config, text.tokens, machine.pick(8, 8, 2), machine, torch.float32)


def gpt2(machine: Machine, windows: int = 1) -> Network:
    """Return GPT-2 124M with random weights and tokens.

    Blocks are the embeddings, and attention and MLP of each layer, with their LayerNorm.
    """
    full = GPTConfig(50_257, 1024, 12, 12, 768, bias=True)
    config = GPTConfig(11, 8, 2, 2, 16, bias=True) if machine.size == "tiny" else full
    tokens = torch.from_numpy(np.random.default_rng(2).integers(config.vocab_size, size=200_000))
    network = _gpt(config, tokens, windows, machine, torch.float32)
    groups: Blocks = {}
    for name, _ in network.model.named_parameters():
        found = re.search(r"layers\.(\d+)\.(\w+)", name)
        part = "attention" if found and found[2] in ("attn", "ln_1") else "MLP"
        key = f"{part} of layer {found[1]}" if found else "embedding"
        groups.setdefault(key, []).append(name)
    return Network(network.model, network.data, network.loss_fn, groups)


def resnet(machine: Machine) -> Network:
    """Return a ResNet18 of width 64 with batch statistics and 256 images of Fashion-MNIST."""
    config = ResNetConfig(machine.pick(64, 64, 4), (2, 2, 2, 2) if machine.size != "tiny" else (1,), 10, 1, "small")
    model = _drawn(ResNet(config)).to(machine.device)
    images, labels = fashion_mnist(machine.pick(256, 64, 8))
    data = images.to(machine.device), labels.to(machine.device)
    return Network(model, data, nn.CrossEntropyLoss(), "parameter", "batch")
