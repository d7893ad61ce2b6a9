"""What a user may get wrong in the arguments of results, said once: `op: argument rule, got value`."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def real(op: str, name: str, value: Any) -> float:
    """The value as a float: a real number, or a tensor of one.

    Raises:
        TypeError: it is none.
    """
    scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool) or not (scalar or isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {reprlib.repr(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be a number that float64 holds, got {reprlib.repr(value)}") from None


def reals(op: str, name: str, value: Any) -> Tensor:
    """The values as a float64 tensor on the CPU: a tensor or array of any shape, a sequence, or one number.

    Raises:
        TypeError: they are no real numbers.
    """
    try:
        tensor = torch.as_tensor(value)
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError
        return torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{op}: {name} must hold real numbers, got {reprlib.repr(value)}") from None


def names(value: Any) -> tuple[str, ...]:
    """Names of blocks.

    Raises:
        TypeError: it is no sequence of texts.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"blocks: must be a sequence of names, got {reprlib.repr(value)}")
    return tuple(value)
