"""Where vectors may live: what this build and this machine can work on, and what to say when memory runs out."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import blockhess_ext._C as _C

REBUILD = (
    "in blockhess' source folder, with a CUDA build of torch, run: BLOCKHESS_CUDA=1 pip install --no-build-isolation ."
)


def has_cuda() -> bool:
    """Whether the extension was compiled with its CUDA kernels."""
    return _C.build_info()["cuda"] is not None


def usable(device: torch.device | str) -> torch.device:
    """The device, with its index, if the kernels can run there.

    Raises:
        ValueError: this build has no kernels for it, or it is not there.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"batched_slq: device must be cpu or cuda, got {device!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"batched_slq: device must be cpu or cuda, got {device}")
    if not has_cuda():
        raise ValueError(f"batched_slq: device must be cpu in a build without CUDA, got {device}; {REBUILD}")
    found = torch.cuda.device_count()
    if not found or (device.index or 0) >= found:
        raise ValueError(f"batched_slq: device must be one of the {found} CUDA devices that torch sees, got {device}")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


@contextmanager
def memory_explained(vectors: int, basis: int) -> Iterator[None]:
    """Where a device runs out of memory, frees what was taken, and says what was needed (bytes) and what lowers it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(
            f"batched_slq: device memory must hold three sets of vectors, {vectors / 2**20:.0f} MiB, the kept basis, "
            f"{basis / 2**20:.0f} MiB, and what hvp needs; lower num_probes, or num_steps or reorthogonalize='none' "
            "for the basis"
        ) from None
