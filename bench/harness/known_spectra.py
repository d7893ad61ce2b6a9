"""Operators with known eigenvalues: six synthetic densities, and exact block Hessians of small models.

Synthetic operators are diagonal, with the quantiles of the density as eigenvalues; the basis does not matter, since
Gaussian probes are invariant under rotations. Hessians are computed column by column by double backward in float64,
independently of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockhess.datasets import fashion_mnist, shakespeare
from blockhess.models import GPT, GPTConfig, ResNet, ResNetConfig, next_token_loss


def marchenko_pastur(u: np.ndarray[Any, Any], ratio: float = 0.5) -> np.ndarray[Any, Any]:
    """Return quantiles of the Marchenko-Pastur law with a ratio below 1, from its integrated density."""
    low, high = (1 - ratio**0.5) ** 2, (1 + ratio**0.5) ** 2
    t = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0, np.pi, 200_001))
    density = np.sqrt(np.clip((high - t) * (t - low), 0, None)) / (2 * np.pi * ratio * t)
    cdf = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2 * np.diff(t))])
    return np.interp(u, cdf / cdf[-1], t)


def synthetic(n: int) -> dict[str, Tensor]:
    """Return the eigenvalues (n,) float64 of six known densities."""
    u = (np.arange(n) + 0.5) / n
    spikes = 0.1 * stats.semicircular.ppf(u)
    spikes[-5:] = [0.5, 0.6, 0.8, 1.0, -0.7]
    half = u[: n // 2] * 2
    return {
        "semicircle": torch.from_numpy(stats.semicircular.ppf(u)),
        "Marchenko-Pastur": torch.from_numpy(marchenko_pastur(u)),
        "uniform": torch.from_numpy(2 * u - 1),
        "spikes and bulk": torch.from_numpy(spikes),
        "power law": torch.from_numpy((1e-4 + (1 - 1e-4) * u) ** -0.75 / 1e3),
        "bimodal": torch.from_numpy(
            np.concatenate([stats.norm.ppf(half) * 0.1 - 1, stats.semicircular.ppf(half) * 0.3 + 1])
        ),
    }


def dense_hessian(loss: Tensor, parameter: Tensor) -> Tensor:
    """Return d^2 loss / d parameter^2, exactly symmetric."""
    rows = torch.empty(parameter.numel(), parameter.numel(), dtype=parameter.dtype)
    (gradient,) = torch.autograd.grad(loss, parameter, create_graph=True)
    gradient = gradient.flatten()
    for i in range(len(gradient)):
        rows[i] = torch.autograd.grad(gradient[i], parameter, retain_graph=True)[0].flatten()
    return (rows + rows.T) / 2


def hessians(quick: bool) -> dict[str, Tensor]:
    """Return exact Hessians of blocks of an untrained GPT, MLP, ResNet and, if transformers is installed, BERT."""
    width = 8 if quick else 32
    text = shakespeare()
    batch = text.batches(batch_size=4, context=32, seed=0)[0]
    images, labels = fashion_mnist(16 if quick else 64)
    torch.manual_seed(0)
    gpt = GPT(GPTConfig(len(text.vocabulary), 32, num_layers=2, num_heads=2, width=width)).double()
    resnet = ResNet(ResNetConfig(width // 4, (1, 1, 1), num_classes=10, in_channels=1, stem="small")).double()
    mlp = nn.Sequential(nn.Flatten(), nn.AvgPool1d(4, 4), nn.Linear(196, 10), nn.GELU(), nn.Linear(10, 10)).double()
    resnet.train()  # batch statistics
    cases: list[tuple[str, nn.Module, Callable[[], Tensor], list[str]]] = [
        (
            "GPT", gpt, lambda: next_token_loss(gpt, batch)[0],
            ["layers.0.attn.query.weight", "layers.1.attn.value.weight", "layers.1.mlp.fc.weight", "tok.weight"],
        ),
        (
            "ResNet", resnet, lambda: F.cross_entropy(resnet(images.double()), labels),
            ["layers.1.conv1.weight", "layers.1.conv2.weight", "layers.2.shortcut.0.weight"],
        ),
        ("MLP", mlp, lambda: F.cross_entropy(mlp(images.double()), labels), ["2.weight", "4.weight"]),
    ]  # fmt: skip
    try:
        from transformers import BertConfig, BertForMaskedLM
    except ImportError:
        pass
    else:
        config = BertConfig(
            vocab_size=len(text.vocabulary), hidden_size=width, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=2 * width, max_position_embeddings=32, attn_implementation="eager",
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        bert = BertForMaskedLM(config).double()
        names = ["bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.0.intermediate.dense.weight"]
        cases.append(("BERT", bert, lambda: bert(input_ids=batch[0], labels=batch[1]).loss, names))
    found = {}
    with sdpa_kernel(SDPBackend.MATH):
        for model_name, model, loss, names in cases:
            parameters = dict(model.named_parameters())
            for name in names:
                short = ".".join(
                    part for part in name.split(".") if part not in ("weight", "bert", "encoder", "attention")
                )
                found[f"{model_name} {short}"] = dense_hessian(loss(), parameters[name])
    return found


def model_spectra() -> dict[str, dict[str, Tensor]]:
    """Return model -> block -> all eigenvalues, ascending, of the parameter blocks of eight small models.

    They are untrained, in float64; the blocks have up to 640 elements.
    """
    text = shakespeare()
    tokens = text.batches(batch_size=4, context=16, seed=0)[0]
    images, labels = fashion_mnist(64)
    images = F.avg_pool2d(images.double(), 4)
    letters = F.one_hot(tokens[0], len(text.vocabulary)).double()
    torch.manual_seed(0)

    def mlp(*layers: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Flatten(), *layers)

    def classify(model: nn.Module) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(images), labels)

    def gpt(layer_norm: bool) -> nn.Module:
        config = GPTConfig(len(text.vocabulary), 16, num_layers=1, num_heads=2, width=8, layer_norm=layer_norm)
        return GPT(config).double()

    def pooled() -> list[nn.Module]:
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)]

    batch_norm = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *pooled()
    )
    models: dict[str, nn.Module] = {
        "logistic regression": mlp(nn.Linear(49, 10)),
        "MLP, ReLU": mlp(nn.Linear(49, 12), nn.ReLU(), nn.Linear(12, 10)),
        "MLP, tanh": mlp(nn.Linear(49, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 10)),
        "CNN": nn.Sequential(nn.Conv2d(1, 8, 3), nn.SiLU(), nn.Conv2d(8, 8, 3), nn.SiLU(), *pooled()),
        "CNN, BatchNorm": batch_norm,
        "autoencoder": mlp(nn.Linear(49, 8), nn.GELU(), nn.Linear(8, 49)),
    }
    losses = {name: classify(model.double()) for name, model in models.items()}
    losses["autoencoder"] = lambda: F.mse_loss(models["autoencoder"](images), images.flatten(1))
    models["GPT"], models["LSTM"] = gpt(layer_norm=True), nn.LSTM(len(text.vocabulary), 2, proj_size=0).double()
    losses["GPT"] = lambda: next_token_loss(models["GPT"], tokens)[0]
    losses["LSTM"] = lambda: F.mse_loss(models["LSTM"](letters)[0], letters[..., :2])
    with sdpa_kernel(SDPBackend.MATH):
        return {
            model: {
                name: torch.linalg.eigvalsh(dense_hessian(losses[model](), parameter))
                for name, parameter in models[model].named_parameters()
            }
            for model in models
        }
