"""A context in which a model is deterministic and twice differentiable.

On exit, also after an exception or Ctrl-C, the model is what it was to the bit (snapshot.py), and so are the random
number generators and the settings of the process. The settings belong to one thread at a time: others wait.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup
from blockhess.problem.shards import reshard
from blockhess.problem.snapshot import Snapshot

T = TypeVar("T")

BATCHNORM = ("eval", "batch", "frozen_batch_stats")

# Held while settings of the process are changed: torch's default dtype, its switches, and random number generators.
_SETTINGS = threading.RLock()


def has_batchnorm(model: nn.Module) -> bool:
    """Return whether the model has a BatchNorm layer."""
    return any(map(_is_batchnorm, model.modules()))


def batchnorm_policy(model: nn.Module, requested: str) -> str:
    """Return the effective BatchNorm policy, one of BATCHNORM, or "none" for a model without BatchNorm.

    Layers without running statistics use those of the batch in any mode, so "eval" becomes "batch" for them.

    Raises:
        ValueError: `requested` needs running statistics that some layers, or all, do not have, or that a ScriptModule
            changes its mode.
    """
    scripted = [name for name, m in model.named_modules() if "BatchNorm" in getattr(m, "original_name", "")]
    if scripted and requested != "eval":
        raise ValueError(
            f"spectrum: batchnorm must be 'eval' where a layer is a ScriptModule, as {scripted[0]!r}, got "
            f"{requested!r}; pass the module that was scripted"
        )
    keeps = {name: m.running_mean is not None for name, m in model.named_modules() if _is_batchnorm(m)}
    if not keeps:
        return requested if scripted else "none"
    if requested == "batch" or all(keeps.values()):
        return requested
    if requested == "eval" and not any(keeps.values()):
        return "batch"
    raise ValueError(
        "spectrum: batchnorm must be 'batch' where a layer keeps no running statistics, as "
        f"{next(name for name, kept in keeps.items() if not kept)!r} (track_running_stats=False), got {requested!r}"
    )


def _is_batchnorm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@contextmanager
def fixed_state(model: nn.Module, batchnorm: str = "eval", second_order: bool = True) -> Iterator[None]:
    """Make a model deterministic and, by default, twice differentiable within the context.

    Every module is in eval mode, so dropout is off. Attention uses the math backend, compiled modules run eagerly and
    RNNs without cuDNN, because the fused implementations have no second derivative. Embeddings have dense gradients.
    Gradients of parameters are None. Another thread that enters such a context waits for the end of this one.

    Args:
        model: the model, wrapped or not.
        batchnorm: "eval": BatchNorm uses its running statistics, where it has them. "batch": it uses the statistics
            of each batch, through which gradients flow. "frozen_batch_stats": as "eval", with running statistics from
            `freeze_batch_statistics`.
        second_order: whether second derivatives are needed; otherwise attention and RNNs are computed as in training.

    Raises:
        ValueError: `batchnorm` is none of these.
    """
    if batchnorm not in BATCHNORM:
        raise ValueError(f"spectrum: batchnorm must be one of {', '.join(BATCHNORM)}, got {batchnorm!r}")
    modules = list(model.modules())
    devices = sorted({p.get_device() for p in model.parameters() if p.is_cuda})
    with ExitStack() as stack:
        stack.enter_context(_SETTINGS)
        stack.enter_context(torch.inference_mode(False))  # this also enables gradients
        stack.enter_context(fixed_random_numbers(devices))
        stack.enter_context(setting(torch.get_default_dtype, torch.set_default_dtype, torch.get_default_dtype()))
        if second_order:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        mha: Any = torch.backends.mha
        stack.enter_context(setting(mha.get_fastpath_enabled, mha.set_fastpath_enabled, False))
        for device_type in ("cpu", *(["cuda"] if devices else [])):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if "torch._dynamo" in sys.modules:  # loaded if a module is compiled; importing it takes a second
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        snapshot = Snapshot([model])
        stack.callback(snapshot.restore)
        stack.callback(reshard, model)  # before it: FSDP has other parameters in the modules meanwhile
        snapshot.drop_gradients()
        for module in modules:
            # Not by train() and eval(), which some models override with side effects, such as merging LoRA weights.
            # With batch statistics, BatchNorm updates its running statistics, which are restored on exit.
            if hasattr(module, "training"):  # frozen ScriptModules have none
                _set(stack, module, "training", batchnorm == "batch" and _is_batchnorm(module))
            if _is_embedding(module):
                vars(module)["sparse"] = False
            if second_order and isinstance(module, nn.RNNBase):
                _set(stack, torch.backends.cudnn, "enabled", False)
        if second_order:
            _switch_attention(stack, modules)
        yield


@contextmanager
def fixed_random_numbers(devices: Sequence[int] = ()) -> Iterator[None]:
    """Restore the random number generators of torch, Python and NumPy on exit; other threads that do so wait.

    Args:
        devices: CUDA devices whose generators are restored too.
    """
    numpy = sys.modules.get("numpy")
    with _SETTINGS, torch.random.fork_rng(devices=devices):
        python, legacy = random.getstate(), numpy and numpy.random.get_state()
        try:
            yield
        finally:
            random.setstate(python)
            if numpy:
                numpy.random.set_state(legacy)


def apply_max_norm(model: nn.Module, evaluate: Callable[[], object]) -> bool:
    """Rescale the rows of embeddings with max_norm as evaluating the model does, and do so no more.

    Call it within `fixed_state`, which restores weights and max_norm. The rows are rescaled in other memory.

    Args:
        model: the model.
        evaluate: runs the model on all data, perhaps with other weights of the same values.

    Returns:
        Whether the model has such embeddings.
    """
    bounded: list[Any] = [m for m in model.modules() if getattr(m, "max_norm", None) and _is_embedding(m)]
    with ExitStack() as stack:
        for module in bounded:
            weight = module.weight
            weight.data = weight.data.clone()

            def rescale(module: Any, args: Any, kwargs: Any, weight: Tensor = weight) -> None:
                ids = (*args, *kwargs.values())[0]
                torch.embedding_renorm_(weight.data, ids.flatten(), module.max_norm, module.norm_type)

            stack.callback(module.register_forward_pre_hook(rescale, with_kwargs=True).remove)
        if bounded:
            before = Snapshot([model], tensors=False)
            evaluate()
            before.restore()
    for module in bounded:
        module.max_norm = None
    return bool(bounded)


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def freeze_batch_statistics(
    model: nn.Module, evaluate: Callable[[Any], object], batches: Sequence[Any], ranks: ProcessGroup = SINGLE_PROCESS
) -> None:
    """Set the running statistics of BatchNorm to the mean of the batch statistics at the current parameters.

    Call it within `fixed_state`, which restores the previous statistics.

    Args:
        model: the model.
        evaluate: runs the model on a batch.
        batches: all data, or this rank's part.
        ranks: the processes whose batches enter the mean, with equal weights.
    """
    layers: list[Any] = [m for m in model.modules() if _is_batchnorm(m)]
    with ExitStack() as stack:  # with gradients, which the loss may contain
        stack.callback(Snapshot([model], tensors=False).restore)
        for layer in layers:
            _set(stack, layer, "training", True)
            _set(stack, layer, "momentum", None)  # cumulative mean over batches
            layer.reset_running_stats()
        for batch in batches:
            evaluate(batch)
        averages = [b for layer in layers for b in (layer.running_mean, layer.running_var)]
        if ranks.data_size > 1:
            found = ranks.gather_data_ranks((len(batches), [average.cpu() for average in averages]))
            total = sum(count for count, _ in found)
            for number, average in enumerate(averages):
                average.copy_(sum(count / total * parts[number].to(average) for count, parts in found))


@contextmanager
def setting(get: Callable[[], T], set_to: Callable[[T], None], value: T) -> Iterator[None]:
    """Change a global setting of torch within the context, unless it has this value."""
    before = get()
    if value != before:
        set_to(value)
    try:
        yield
    finally:
        if get() != before:
            set_to(before)


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products and convolutions within the context.

    Args:
        precision: "highest": all are computed in float32. "high": TF32 on CUDA, in convolutions too, and in matrix
            products on CPUs with AMX-FP16. "medium": as "high" on CUDA, and bfloat16 in matrix products on CPUs with
            AVX-512 or AMX instructions for it. Convolutions on a CPU are always computed in float32.
    """
    backends: Any = torch.backends
    cuda, cpu = (backends.cudnn.conv, backends.cudnn.rnn), (backends.mkldnn.conv, backends.mkldnn.rnn)
    owners: list[Any] = [backends.cuda.matmul, backends.mkldnn.matmul, *cuda, *cpu]
    before = [owner.fp32_precision for owner in owners]
    # The older settings, which torch refuses to read where the newer ones contradict them.
    products, tf32 = "highest", True
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    with suppress(RuntimeError):
        tf32 = backends.cudnn.allow_tf32

    def set_older(products: str, tf32: bool) -> None:
        torch.set_float32_matmul_precision(products)
        backends.cudnn.allow_tf32 = tf32

    try:
        set_older(precision, precision != "highest")
        for owner in (*cuda, *cpu):
            owner.fp32_precision = "tf32" if owner in cuda and precision != "highest" else "ieee"
        yield
    finally:
        set_older(products, tf32)
        for owner, value in zip(owners, before):
            owner.fp32_precision = "none"  # inherits that of the backend
            if owner.fp32_precision != value:
                owner.fp32_precision = value


def _set(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    stack.callback(setattr, owner, name, getattr(owner, name))
    setattr(owner, name, value)


def _switch_attention(stack: ExitStack, modules: list[nn.Module]) -> None:
    """Select PyTorch's attention in Transformers models, which look up the implementation at every call."""
    owners: dict[int, Any] = {id(owner): owner for m in modules for owner in (getattr(m, "config", None), m)}
    named = [(owner, name) for owner in owners.values() if (name := getattr(owner, "_attn_implementation", None))]
    for owner, name in reversed(named):
        # Restored in the order of `named`, since setting the name in a configuration also sets it in its parts.
        stack.callback(setattr, owner, "_attn_implementation", name)
    for owner, name in named:
        if name not in ("eager", "sdpa"):  # these have a second derivative
            owner._attn_implementation = "sdpa"
