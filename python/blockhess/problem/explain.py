"""Errors of a user's model or loss in one line that names the module and the tensor, with torch's error as cause."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from blockhess.problem.batches import Batch, first_line, tensors
from blockhess.problem.losses import Loss


@contextmanager
def explained(
    loss: Loss,
    computation: nn.Module,
    index: int,
    batch: Batch,
    repeat: Callable[[], object],
    like: Tensor,
    rule: str = "run on the data",
) -> Iterator[None]:
    """Replace an exception of the model or loss by one of this package's.

    Exceptions of this package, interruptions and exhausted memory pass unchanged.

    Args:
        loss: what is evaluated.
        computation: holds `model` and perhaps `criterion`, whose modules are named.
        index, batch: what the loss is evaluated on.
        repeat: evaluates it again, to find the tensors of a failing operation.
        like: a parameter, which has the dtype and device that all tensors should have.
        rule: what the loss must do, other than the default where it is differentiated.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if str(error).startswith("spectrum:"):
            raise
        if "can't allocate memory" in str(error):  # on the CPU, a RuntimeError
            raise torch.OutOfMemoryError(first_line(error)) from error
        where = _where(error, computation)
        place, advice = f"in {where} ", loss.advice
        if isinstance(batch, tuple) and all(isinstance(part, tuple | Mapping) for part in batch):
            advice = f"a tuple is one batch, several are a list; {advice}"
        if rule != "run on the data":
            # The operations of a backward pass have no frames.
            place, advice = "" if where == "loss_fn" else place, "write the operations in plain PyTorch"
        text = _mismatch(error, repeat, where, index, batch, like) or (
            f"spectrum: {loss.call} must {rule}, got {type(error).__name__} {place}for batch {index}: "
            f"{first_line(error)}; {advice}"
        )
        if "backward through the graph a second time" in str(error):
            text = (
                f"spectrum: {loss.call} must compute all of the loss in every call, got a part with a graph of its own "
                f"for batch {index}, such as a penalty computed before, an output that a module stores, or a weight in "
                "parametrize.cached(); compute it in the call"
            )
        kinds = (NotImplementedError, TypeError)
        raise next((kind for kind in kinds if isinstance(error, kind)), ValueError)(text) from error


def _where(error: BaseException, computation: nn.Module) -> str:
    """Return the innermost module or torch.autograd.Function that raised an error, or "loss_fn"."""
    names = {id(module): name for name, module in computation.named_modules()}
    found: nn.Module | FunctionCtx | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        owner, context = frame.f_locals.get("self"), frame.f_locals.get("ctx")
        if isinstance(owner, nn.Module) and owner is not computation:
            found = owner
        elif isinstance(context, FunctionCtx):
            found = context
    if isinstance(found, FunctionCtx):
        return f"the torch.autograd.Function {getattr(type(found), '_forward_cls', type(found)).__qualname__}"
    if found is None:
        return "loss_fn"
    kind, path = type(found).__name__, names.get(id(found))
    if path is None:
        return f"a {kind} that is no part of the model"
    owner_name, _, name = path.partition(".")
    if owner_name == "criterion":
        return f"{name!r} of loss_fn ({kind})" if name else f"loss_fn ({kind})"
    return f"{name!r} ({kind})" if name else f"the model ({kind})"


def _mismatch(
    error: Exception, repeat: Callable[[], object], where: str, index: int, batch: Batch, like: Tensor
) -> str | None:
    """Return text that names the tensor whose dtype or device is not that of the parameters, or None."""
    if not isinstance(error, RuntimeError) or not re.search("type|device", str(error)):
        return None
    dtype, device = like.dtype, like.device
    with _FailingOperation() as operation, suppress(Exception):
        repeat()
    floating = [t for t in operation.operands if t.is_floating_point()]
    of_data = {id(t) for t in tensors(batch)}
    for odd in sorted((t for t in floating if t.dtype != dtype), key=lambda t: t.dim() == 0):
        if len({t.dtype for t in floating}) == 1:
            break
        if id(odd) in of_data:
            return (
                f"spectrum: data must have the dtype of the parameters, {dtype}, got a tensor of shape "
                f"{tuple(odd.shape)} in {odd.dtype} in batch {index}, used by {operation.name} in {where}; "
                f"convert it, or pass dtype={dtype}, to which data are converted"
            )
        return (
            f"spectrum: all tensors must have the dtype of the parameters, {dtype}, got one of shape "
            f"{tuple(odd.shape)} in {odd.dtype}, used by {operation.name} in {where} for batch {index}; dtype= "
            "converts parameters, buffers and data: register the tensor as a buffer, or convert it where it is used"
        )
    for odd in sorted((t for t in operation.operands if t.device != device), key=lambda t: t.dim() == 0):
        return (
            f"spectrum: all tensors must be on the model's device {device}, got one of shape {tuple(odd.shape)} on "
            f"{odd.device}, used by {operation.name} in {where} for batch {index}; move it there"
        )
    return None


class _FailingOperation(TorchFunctionMode):
    """Records the operation that raises an exception.

    Attributes:
        name: of the operation.
        operands: its tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.operands: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except Exception:
            if not self.name:
                self.name = getattr(func, "__name__", "an operation")
                self.operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            raise
