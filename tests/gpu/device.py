"""The device under test, and how arguments get there.

BLOCKHESS_TEST_DEVICE=cpu rehearses what is not CUDA's own on the CPU twins: it proves that the tests run, not the
kernels. BLOCKHESS_REQUIRE_GPU=1 makes a missing GPU an error instead of a skip.
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
    """Why nothing can be proven on a GPU here, or None."""
    if not has_cuda():
        return "needs a GPU: this build of blockhess_ext has no CUDA kernels"
    if not torch.cuda.is_available():
        return "needs a GPU: torch sees no CUDA device"
    return None


def require(cuda: bool = True) -> None:
    """Skips the calling module where its tests cannot run; those that need no CUDA of their own can be rehearsed."""
    reason = obstacle() if DEVICE == "cuda" or cuda else None
    if reason and os.environ.get("BLOCKHESS_REQUIRE_GPU") == "1":
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(reason, allow_module_level=True)


def on(device: torch.device | str, value: Any) -> Any:
    """A deep copy whose tensors, in dataclasses or sequences too, lie on the device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: on(device, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return type(value)(**fields)
    if isinstance(value, (list, tuple)):
        return type(value)(on(device, part) for part in value)
    return copy.deepcopy(value)


def misaligned(x: Tensor, by: int) -> Tensor:
    """A contiguous copy that begins `by` elements after a 16-byte boundary, between margins of NaN."""
    room = x.new_full((x.numel() + 2 * MARGIN,), float("nan"))
    moved = room[MARGIN + by :][: x.numel()].view_as(x)
    moved.copy_(x)
    return moved


def margins_untouched(x: Tensor) -> bool:
    """Whether the NaN around a `misaligned` tensor is all there."""
    room = x.new_empty(0).set_(x.untyped_storage())
    start = x.storage_offset()
    return bool(room[:start].isnan().all() and room[start + x.numel() :].isnan().all())


def synchronize() -> None:
    """Waits for the device, so that an error in a kernel belongs to the test that launched it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def assert_near(got: list[Tensor], expected: list[Tensor], rtol: float) -> None:
    """Equal within rtol, relative or absolute, wherever they lie."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=rtol, atol=rtol)


def assert_same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    """Equal to the last bit, wherever they lie; NaN equals NaN."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)
