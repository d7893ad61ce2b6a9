"""A model made deterministic and twice differentiable for a while, then put back as it was.

Promises: whatever happens inside, an exception or Ctrl-C included, afterwards every module's mode, every buffer, the
random number generators, the attention backends and every other switch are as before; parameters, their .grad and
requires_grad are never touched.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup

_TWICE_DIFFERENTIABLE = ("eager", "sdpa")


BATCHNORM = ("eval", "batch", "frozen_batch_stats")


def has_batchnorm(model: nn.Module) -> bool:
    """Whether the model has a BatchNorm layer, and so depends on the policy."""
    return any(map(_is_batchnorm, model.modules()))


def batchnorm_policy(model: nn.Module, asked: str) -> str:
    """What the BatchNorm layers do where `asked` is asked for, one of BATCHNORM, or "none" where there is no layer.

    Layers without running statistics take the batch's in any mode, so of them "eval" makes "batch".

    Raises:
        ValueError: running statistics are asked for and only some layers keep them, or would have to be frozen.
    """
    keeps = {name: m.running_mean is not None for name, m in model.named_modules() if _is_batchnorm(m)}
    if not keeps:
        return "none"
    if asked == "batch" or all(keeps.values()):
        return asked
    if asked == "eval" and not any(keeps.values()):
        return "batch"
    raise ValueError(
        "spectrum: batchnorm must be 'batch' where a layer keeps no running statistics, as "
        f"{next(name for name, kept in keeps.items() if not kept)!r} (track_running_stats=False), got {asked!r}"
    )


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@contextmanager
def fixed_state(model: nn.Module, batchnorm: str = "eval") -> Iterator[None]:
    """Within the context, the model draws no random numbers and has second derivatives.

    Every module is in eval mode (no dropout), attention runs on the math backend (fused ones have no second
    derivative) and compiled modules run eagerly (for the same reason), as do RNNs without cuDNN.

    Args:
        model: the model; wrapped or not.
        batchnorm: "eval": BatchNorm uses its running statistics, if it has them; "batch": the statistics of each
            batch, through which the loss depends on the parameters too; "frozen_batch_stats": as "eval", for running
            statistics that `freeze_batch_statistics` sets.

    Raises:
        ValueError: another `batchnorm`.
    """
    if batchnorm not in BATCHNORM:
        raise ValueError(f"spectrum: batchnorm must be one of {', '.join(BATCHNORM)}, got {batchnorm!r}")
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


def freeze_batch_statistics(
    model: nn.Module, evaluate: Callable[[Any], object], batches: Sequence[Any], ranks: ProcessGroup = SINGLE_PROCESS
) -> None:
    """Set BatchNorm's running statistics to the averages of the batches' own, at the present parameters.

    To be called in a `fixed_state`, which puts the old ones back, where `batchnorm_policy` allows it.

    Args:
        model: the model.
        evaluate: runs the model on a batch.
        batches: all data, or this rank's part.
        ranks: whose batches count, each as much as any other.
    """
    layers: list[Any] = [m for m in model.modules() if _is_batchnorm(m)]
    with ExitStack() as stack, torch.no_grad():
        for layer in layers:
            _set(stack, layer, "training", True)
            _set(stack, layer, "momentum", None)  # the plain average over batches
            layer.reset_running_stats()
        for batch in batches:
            evaluate(batch)
        averages = [b for layer in layers for b in (layer.running_mean, layer.running_var)]
        found = ranks.row((len(batches), [average.cpu() for average in averages])) if ranks.data_size > 1 else []
        total = sum(count for count, _ in found)
        for number, average in enumerate(averages if found else ()):
            average.copy_(sum(count / total * parts[number].to(average) for count, parts in found))


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


def refuse_sharded(model: nn.Module) -> None:
    """Refuses models of which this process holds a part only.

    Raises:
        NotImplementedError: says what to do.
    """
    sharded = next((n for n, p in model.named_parameters() if type(p).__name__ in ("DTensor", "FlatParameter")), None)
    if sharded is None:
        sharded = next((n for n, p in model.named_parameters() if type(p.data).__name__ == "DTensor"), None)
    if sharded is not None:
        raise NotImplementedError(
            f"spectrum: model must hold whole parameters, got {sharded!r} as a shard (FSDP or tensor parallelism); "
            "gather them with torch.distributed.checkpoint.state_dict.get_model_state_dict(model, options="
            "StateDictOptions(full_state_dict=True)), load them into a plain model on every rank, and pass that with "
            "parallel='work' or 'data'"
        )
