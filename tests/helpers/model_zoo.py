"""One tiny model of every kind that people use, each with data and a loss, for tests of engines.

A `Case` makes (model, data, loss_fn) as `blockhess.spectrum` takes them. All are in torch's default dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.helpers.tiny_models import CASES, labeled, mlp


@dataclass(frozen=True)
class Case:
    """How to make a model, data and a loss; what BatchNorm does; whether a Transformers model is in it."""

    make: Callable[[], tuple[nn.Module, Any, Any]]
    batchnorm: str = "eval"
    transformers: bool = False


def images(n: int = 4, channels: int = 2, size: int = 4, classes: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(n, channels, size, size), torch.randint(classes, (n,))


def group_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def max_pooled() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
        nn.ReLU(),
        nn.Linear(4, 3),
    )


class ConvNeXtLike(nn.Module):
    """Depthwise convolution, LayerNorm over channels, inverted bottleneck, layer scale, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 2, stride=2)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.full((4,), 0.5))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        x = x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)
        return self.head(x.mean((2, 3)))


class ResidualBlock(nn.Module):
    """As in torchvision: convolution, BatchNorm, ReLU in place, and a shortcut with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 3, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.shortcut = nn.Sequential(nn.Conv2d(2, 3, 1, stride=2, bias=False), nn.BatchNorm2d(3))
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(3, 3)
        self(torch.randn(8, 2, 4, 4))  # running statistics that are not those of the batch

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.head(torch.flatten(F.adaptive_avg_pool2d(self.relu(out), 1), 1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 3, batch_first=True, bidirectional=True)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


class MixtureOfExperts(nn.Module):
    """Every sample goes to its best two of four experts; some get none of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(3, 4)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.SiLU(), nn.Linear(3, 3)) for _ in range(4))
        with torch.no_grad():
            self.router.bias.copy_(torch.tensor([2.0, 1.5, 1.0, -50.0]))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            if len(rows):
                out = out.index_add(0, rows, weights[rows, slot, None] * expert(x[rows]))
        return out


class DataDependent(nn.Module):
    """Depth and branch chosen by the values of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1 + int(x.abs().max() > 1)):
            x = torch.tanh(self.a(x))
        if x.shape[0] > 100:
            x = self.b(x)
        return self.head(x)


class ActivationDependent(DataDependent):
    """A branch chosen by an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.a(x))
        return self.head(self.b(x).sigmoid() if x.mean() > -1 else x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), nn.Linear(3, 3)
        self.run = functools.partial(checkpoint, use_reentrant=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.run(self.body, x)))


def pinn() -> tuple[nn.Module, Any, Any]:
    """-u'' = sin on points, u = 0 on the boundary; the loss differentiates twice."""
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1))

    def loss_fn(m: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        x = batch[0].clone().requires_grad_()
        u = m(x)
        (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
        return (ddu + torch.sin(x)).square().mean() + m(batch[1]).square().mean(), len(x)

    return model, (torch.rand(5, 1), torch.tensor([[0.0], [1.0]])), loss_fn


def _with_cross_entropy(make_model: Callable[[], nn.Module], make_data: Callable[[], Any]) -> Case:
    return Case(lambda: (make_model(), make_data(), nn.CrossEntropyLoss()))


def _tokens() -> dict[str, Tensor]:
    ids = torch.randint(1, 7, (2, 4))
    labels = ids.clone()
    labels[1, 2:] = -100
    return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]), "labels": labels}


def _transformer(kind: str) -> tuple[nn.Module, Any, Any]:
    import transformers

    size = {"hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 4}
    text = {"vocab_size": 7, "max_position_embeddings": 5}
    if kind == "GPT2LMHeadModel":
        config = transformers.GPT2Config(vocab_size=7, n_embd=4, n_layer=1, n_head=2, n_positions=5, n_inner=4)
    elif kind == "LlamaForCausalLM":
        config = transformers.LlamaConfig(**size, **text, num_key_value_heads=1)
    elif kind == "ViTForImageClassification":
        config = transformers.ViTConfig(**size, image_size=4, patch_size=2, num_channels=1, num_labels=3)
        model = transformers.ViTForImageClassification(config)
        return _livelier(model), {"pixel_values": torch.randn(3, 1, 4, 4), "labels": torch.randint(3, (3,))}, None
    elif kind == "MambaForCausalLM":
        config = transformers.MambaConfig(
            vocab_size=7, hidden_size=4, state_size=3, num_hidden_layers=1, conv_kernel=2, time_step_rank=2
        )
    else:
        config = transformers.BertConfig(**size, **text, type_vocab_size=1)
    return _livelier(getattr(transformers, kind)(config)), _tokens(), None


def _livelier(model: nn.Module) -> nn.Module:
    """Weights of usual size: at the initial 0.02 a Hessian of so narrow a model is nearly zero."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.to(torch.get_default_dtype())


ZOO: dict[str, Case] = {
    **{name: _with_cross_entropy(*made) for name, made in CASES.items()},
    "BatchNorm residual, eval": _with_cross_entropy(ResidualBlock, images),
    "BatchNorm residual, batch": Case(lambda: (ResidualBlock(), images(), nn.CrossEntropyLoss()), "batch"),
    "BatchNorm residual, frozen": Case(
        lambda: (ResidualBlock(), [images(), images(2)], nn.CrossEntropyLoss()), "frozen_batch_stats"
    ),
    "GroupNorm": _with_cross_entropy(group_norm, images),
    "ReLU and max-pooling": _with_cross_entropy(max_pooled, images),
    "ConvNeXt-like": _with_cross_entropy(ConvNeXtLike, images),
    "GRU": _with_cross_entropy(Gated, lambda: (torch.randn(2, 3, 3), torch.randint(2, (2,)))),
    "mixture of experts": _with_cross_entropy(MixtureOfExperts, lambda: labeled(5)),
    "control flow on data": _with_cross_entropy(DataDependent, lambda: labeled(5)),
    "control flow on activations": _with_cross_entropy(ActivationDependent, lambda: labeled(5)),
    "activation checkpointing": _with_cross_entropy(Checkpointed, lambda: labeled(5)),
    "PINN": Case(pinn),
    "squared error": Case(lambda: (mlp(), (torch.randn(6, 3), torch.randn(6, 3)), nn.MSELoss())),
    **{
        kind: Case(lambda kind=kind: _transformer(kind), transformers=True)  # type: ignore[misc]
        for kind in (
            "GPT2LMHeadModel",
            "BertForMaskedLM",
            "ViTForImageClassification",
            "LlamaForCausalLM",
            "MambaForCausalLM",
        )
    },
}
