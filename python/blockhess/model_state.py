"""A model made deterministic and twice differentiable for a while, then put back as it was.

Promises: whatever happens inside, an exception or Ctrl-C included, afterwards every module's mode, every buffer, the
random number generators, the attention backends and every other switch are as before; parameters, their .grad and
requires_grad are never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_TWICE_DIFFERENTIABLE = ("eager", "sdpa")


def has_batchnorm(model: nn.Module) -> bool:
    """Whether the model has a BatchNorm layer, and so depends on the policy."""
    return any(map(_is_batchnorm, model.modules()))


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@contextmanager
def fixed_state(model: nn.Module, batchnorm: str = "eval") -> Iterator[None]:
    """Within the context, the model draws no random numbers and has second derivatives.

    Every module is in eval mode (no dropout), attention runs on the math backend (fused ones have no second
    derivative) and compiled modules run eagerly (for the same reason), as do RNNs without cuDNN.

    Args:
        model: the model; wrapped or not.
        batchnorm: "eval": BatchNorm uses its running statistics; "batch": the statistics of each batch.

    Raises:
        ValueError: another `batchnorm`.
    """
    if batchnorm not in ("eval", "batch"):
        raise ValueError(f"spectrum: batchnorm must be 'eval' or 'batch', got {batchnorm!r}")
    modules = list(model.modules())
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))  # and gradients on
        stack.enter_context(torch.random.fork_rng(devices=devices))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for device_type in ("cpu", *(["cuda"] if devices else [])):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if "torch._dynamo" in sys.modules:  # whoever compiled a module has loaded it; loading it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(_kept_buffers(modules))
        for module in modules:
            # Not by train() and eval(): some models override them with side effects (merging LoRA weights).
            _set(stack, module, "training", False)
            if batchnorm == "batch" and _is_batchnorm(module):
                _set(stack, module, "training", True)  # its running statistics are buffers, restored at the end
            if isinstance(module, nn.RNNBase):
                _set(stack, torch.backends.cudnn, "enabled", False)
        _switch_attention(stack, modules)
        yield


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _switch_attention(stack: ExitStack, modules: list[nn.Module]) -> None:
    """Make Transformers models use PyTorch's attention; they read the name of their own at every call."""
    owners: dict[int, Any] = {id(owner): owner for m in modules for owner in (getattr(m, "config", None), m)}
    named = [(owner, name) for owner in owners.values() if (name := getattr(owner, "_attn_implementation", None))]

    def restore() -> None:
        # In this order: a configuration hands the name down to its parts, which then get back their own.
        for owner, name in named:
            owner._attn_implementation = name

    stack.callback(restore)
    for owner, name in named:
        if name not in _TWICE_DIFFERENTIABLE:
            owner._attn_implementation = "sdpa"


@contextmanager
def _kept_buffers(modules: list[nn.Module]) -> Iterator[None]:
    kept = [(m, name, b, b.clone()) for m in modules for name, b in m._buffers.items() if b is not None]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in kept:
                module._buffers[name] = buffer
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
