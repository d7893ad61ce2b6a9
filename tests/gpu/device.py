"""The device under test, and copies of arguments on it.

BLOCKHESS_TEST_DEVICE=cpu runs the tests that do not need CUDA on the CPU implementations, to test the tests themselves.
BLOCKHESS_REQUIRE_GPU=1 makes a missing GPU an error instead of a skip.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from typing import Any

import pytest
import torch
from torch import Tensor

from blockhess_ext.device import has_cuda

DEVICE = os.environ.get("BLOCKHESS_TEST_DEVICE", "cuda")
MARGIN = 16  # elements of NaN on both sides of a misaligned vector


def obstacle() -> str | None:
    """Return the reason why GPU tests cannot run here, or None."""
    if not has_cuda():
        return "needs a GPU: this build of blockhess_ext has no CUDA kernels"
    if not torch.cuda.is_available():
        return "needs a GPU: torch sees no CUDA device"
    return None


def require(cuda: bool = True) -> None:
    """Skip the calling module if its tests cannot run; cuda=False allows BLOCKHESS_TEST_DEVICE=cpu."""
    reason = obstacle() if DEVICE == "cuda" or cuda else None
    if reason and os.environ.get("BLOCKHESS_REQUIRE_GPU") == "1":
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason, allow_module_level=True)


def on(device: torch.device | str, value: Any) -> Any:
    """Return a deep copy with all tensors, also in dataclasses and sequences, on the device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: on(device, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, part) for part in value)
    return copy.deepcopy(value)


def misaligned(x: Tensor, by: int) -> Tensor:
    """Return a contiguous copy that starts `by` elements after a 16-byte boundary, between margins of NaN."""
    room = x.new_full((x.numel() + 2 * MARGIN,), float("nan"))
    moved = room[MARGIN + by :][: x.numel()].view_as(x)
    moved.copy_(x)
    return moved


def margins_untouched(x: Tensor) -> bool:
    """Return whether the NaN margins of a `misaligned` tensor are unchanged."""
    room = x.new_empty(0).set_(x.untyped_storage())
    start = x.storage_offset()
    return bool(room[:start].isnan().all() and room[start + x.numel() :].isnan().all())


def synchronize() -> None:
    """Synchronize, so that an error in a kernel fails the test that launched it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def assert_near(got: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Assert equality within rtol, relative or absolute, on any devices."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=rtol)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    """Assert bitwise equality, on any devices; NaN equals NaN."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)
