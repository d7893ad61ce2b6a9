"""Checks of arguments, with messages `op: argument rule, got value`."""

from __future__ import annotations

import numbers
import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def real(op: str, name: str, value: Any) -> float:
    """Return a real number, or a tensor with one element, as a float.

    Raises:
        TypeError: value is not a real number.
        ValueError: value overflows float64.
    """
    scalar = isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()
    if isinstance(value, bool) or not (scalar or isinstance(value, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number, got {reprlib.repr(value)}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{op}: {name} must be a number that float64 holds, got {reprlib.repr(value)}") from None


def reals(op: str, name: str, value: Any) -> Tensor:
    """Return a number, sequence, array or tensor of any shape as a float64 tensor on the CPU.

    Raises:
        TypeError: value does not hold real numbers.
    """
    try:
        tensor = torch.as_tensor(value, device="cpu")
        if tensor.is_complex() or tensor.dtype == torch.bool:
            raise TypeError
        return tensor.detach().to(torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{op}: {name} must hold real numbers, got {reprlib.repr(value)}") from None


def names(value: Any) -> tuple[str, ...]:
    """Return names of blocks as a tuple.

    Raises:
        TypeError: value is not a sequence of str.
    """
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(name, str) for name in value):
        raise TypeError(f"blocks: must be a sequence of names, got {reprlib.repr(value)}")
    return tuple(value)
