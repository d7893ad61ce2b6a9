"""Models by name: the paper's six at its sizes, a CPU-sized "-mini" of each, and those of other packages.

    gpt2-nano, bert-mini, ...    blockhess.models            hf:gpt2                     Transformers
    torchvision:resnet18         torchvision                 timm:vit_base_patch16_224   timm

Every model is built from a configuration and initialised from torch's global generator; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torch import nn

from blockhess.models.bert import BERT, BERTConfig
from blockhess.models.gpt import GPT, GPTConfig
from blockhess.models.resnet import ResNet, ResNetConfig
from blockhess.models.vgg import VGG, VGGConfig
from blockhess.models.vit import ViT, ViTConfig

# The paper's models, each with its small relative for images of 28 x 28 grey pixels or small vocabularies.
CONFIGS: Mapping[str, tuple[type[nn.Module], Any]] = {
    "resnet18": (ResNet, ResNetConfig()),
    "vgg16": (VGG, VGGConfig()),
    "vit-base": (ViT, ViTConfig()),
    "bert": (BERT, BERTConfig()),
    "gpt2-nano": (GPT, GPTConfig(fused_qkv=True)),
    "gpt2": (GPT, GPTConfig(vocab_size=50_304, context=1024, num_layers=12, num_heads=12, width=768)),
    "resnet18-mini": (ResNet, ResNetConfig(8, (1, 1, 1), num_classes=10, in_channels=1, stem="small")),
    "vgg16-mini": (VGG, VGGConfig(8, (1, 1, 2), hidden=64, pooled=3, num_classes=10, in_channels=1)),
    "vit-base-mini": (ViT, ViTConfig(28, 7, depth=3, num_heads=4, width=64, num_classes=10, in_channels=1)),
    "bert-mini": (BERT, BERTConfig(256, context=32, num_heads=4, width=64)),
    "gpt2-nano-mini": (GPT, GPTConfig(76, context=64, num_layers=2, num_heads=4, width=64, fused_qkv=True)),
    "gpt2-mini": (GPT, GPTConfig(256, context=64, num_layers=4, num_heads=4, width=64)),
}


def named(name: str, **sizes: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: a key of CONFIGS, or PACKAGE:NAME for hf (a model type of Transformers), timm or torchvision.
        sizes: fields of the configuration that shall differ, such as vocab_size or num_classes.

    Raises:
        ValueError: no model has this name, or no configuration this field; the field's own rule.
        ImportError: the package is not installed.

    Example:
        >>> model = named("gpt2-nano-mini", num_layers=1)
        >>> sum(parameter.numel() for parameter in model.parameters())
        58304
    """
    package, _, rest = name.rpartition(":")
    if package:
        if package not in _PACKAGES:
            raise ValueError(f"model: PACKAGE:NAME must be of {', '.join(_PACKAGES)}, got {name!r}")
        return _PACKAGES[package](rest, sizes)
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"model: name must be one of {', '.join(CONFIGS)} or PACKAGE:NAME, got {name!r}{hint}")
    kind, config = CONFIGS[name]
    unknown = sizes.keys() - {field.name for field in dataclasses.fields(config)}
    if unknown:
        raise ValueError(f"model: {type(config).__name__} has no field {sorted(unknown)[0]!r}")
    return kind(dataclasses.replace(config, **sizes))


def _imported(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(f"model: {name!r} needs {package}; type: pip install {package}") from None


def _transformers(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    transformers: Any = _imported("transformers", f"hf:{name}")
    if name not in transformers.CONFIG_MAPPING:
        raise ValueError(f"model: hf:NAME must be a model type of Transformers, such as gpt2 or bert, got {name!r}")
    config = transformers.CONFIG_MAPPING[name](**sizes)
    return transformers.AutoModelForPreTraining.from_config(config)  # type: ignore[no-any-return]


def _timm(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    timm: Any = _imported("timm", f"timm:{name}")
    if not timm.is_model(name):
        raise ValueError(f"model: timm:NAME must be one of timm.list_models(), got {name!r}")
    return timm.create_model(name, pretrained=False, **sizes)  # type: ignore[no-any-return]


def _torchvision(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    _imported("torchvision", f"torchvision:{name}")
    models = importlib.import_module("torchvision.models")
    if name not in models.list_models():
        raise ValueError(f"model: torchvision:NAME must be one of torchvision.models.list_models(), got {name!r}")
    return models.get_model(name, weights=None, **sizes)  # type: ignore[no-any-return]


_PACKAGES: Mapping[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "hf": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
}
