"""Models by name: the paper's six at full size, a CPU-sized "-mini" version of each, and models of other packages.

    gpt2-nano, bert-mini, ...    blockhess.models            hf:gpt2                     Transformers
    torchvision:resnet18         torchvision                 timm:vit_base_patch16_224   timm

Every model is built from a configuration and initialized from torch's global generator; nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from blockhess.models.gpt import GPT, GPTConfig
from blockhess.models.resnet import ResNet, ResNetConfig
from blockhess_paper.models.bert import BERT, BERTConfig
from blockhess_paper.models.vgg import VGG, VGGConfig
from blockhess_paper.models.vit import ViT, ViTConfig

# The paper's models, each with a small version for images of 28 x 28 gray pixels or small vocabularies.
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
        sizes: fields of the configuration to override, such as vocab_size or num_classes.

    Raises:
        ValueError: the name, or a field of the configuration, is unknown, or the value of a field is invalid.
        ImportError: the package is not installed, or cannot be imported.

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
    _check_name(name, CONFIGS, f"name must be one of {', '.join(CONFIGS)} or PACKAGE:NAME")
    kind, config = CONFIGS[name]
    _check_fields(config, sizes)
    return kind(dataclasses.replace(config, **sizes))


def _check_name(name: str, names: Iterable[str], rule: str) -> None:
    if name not in names:
        near = difflib.get_close_matches(name, names, n=3)
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        raise ValueError(f"model: {rule}, got {name!r}{hint}")


def _check_fields(config: Any, sizes: Mapping[str, Any]) -> None:
    for field in sizes:
        if not hasattr(config, field):
            raise ValueError(f"model: {type(config).__name__} has no field {field!r}")


def _imported(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name == package:
            raise ImportError(f"model: {name!r} needs {package}; type: pip install {package}") from None
        reason: Exception = error
    except (ImportError, OSError, RuntimeError) as error:  # an extension built for another torch
        reason = error
    raise ImportError(
        f"model: {name!r} needs {package}, which is installed but does not load beside torch {torch.__version__}: "
        f"{reason}"
    ) from reason


def _transformers(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    transformers: Any = _imported("transformers", f"hf:{name}")
    types = transformers.CONFIG_MAPPING
    _check_name(name, types, "hf:NAME must be a model type of Transformers, such as gpt2 or bert")
    _check_fields(types[name](), sizes)
    config = types[name](**sizes)
    if type(config) in transformers.MODEL_FOR_PRETRAINING_MAPPING:
        return transformers.AutoModelForPreTraining.from_config(config)  # type: ignore[no-any-return]
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM.from_config(config)  # type: ignore[no-any-return]
    raise ValueError(f"model: hf:NAME must be a type with a language model, such as gpt2 or bert, got {name!r}")


def _timm(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    timm: Any = _imported("timm", f"timm:{name}")
    _check_name(name, timm.list_models(), "timm:NAME must be one of timm.list_models()")
    return timm.create_model(name, pretrained=False, **sizes)  # type: ignore[no-any-return]


def _torchvision(name: str, sizes: Mapping[str, Any]) -> nn.Module:
    models: Any = _imported("torchvision", f"torchvision:{name}").models
    # Classifiers only: the constructors of detectors download their backbones by default.
    names = models.list_models(module=models)
    _check_name(name, names, "torchvision:NAME must be one of torchvision.models.list_models(torchvision.models)")
    return models.get_model(name, weights=None, **sizes)  # type: ignore[no-any-return]


_PACKAGES: Mapping[str, Callable[[str, Mapping[str, Any]], nn.Module]] = {
    "hf": _transformers,
    "timm": _timm,
    "torchvision": _torchvision,
}
