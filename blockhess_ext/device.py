"""Where vectors may live: what this build and this machine can work on, and what to say when memory runs out."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import blockhess_ext._C as _C


def rebuild(architecture: str = "") -> str:
    """What to type for a build with CUDA, for the GPU architecture, such as "9.0", or the usual ones."""
    setting = f"TORCH_CUDA_ARCH_LIST={architecture} " if architecture else ""
    return (
        f"in blockhess' source folder, with a CUDA build of torch, run: {setting}BLOCKHESS_CUDA=1 "
        "pip install --no-build-isolation ."
    )


def has_cuda() -> bool:
    """Whether the extension was compiled with its CUDA kernels."""
    return _C.build_info()["cuda"] is not None


def _runs_on(capability: tuple[int, int], name: str) -> bool:
    """Whether what nvcc compiled for the architecture of this name runs on a device.

    Machine code (sm_80) runs within its major version, from its minor version on; PTX (compute_90) on everything
    newer too; either with an "a" (sm_90a) on that architecture alone.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", name)
    assert match
    kind, major, minor, exact = match.groups()
    compiled = int(major), int(minor)
    if exact:
        return capability == compiled
    return capability >= compiled and (kind == "compute" or capability[0] == compiled[0])


def usable(device: torch.device | str) -> torch.device:
    """The device, with its index, if the kernels can run there.

    Raises:
        ValueError: this build has no kernels for it, or it is not there.
    """
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"batched_slq: device must be cpu or cuda, got {device!r}") from None
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise ValueError(f"batched_slq: device must be cpu or cuda, got {device}")
    if not has_cuda():
        raise ValueError(f"batched_slq: device must be cpu in a build without CUDA, got {device}; {rebuild()}")
    found = torch.cuda.device_count()
    if not found or (device.index or 0) >= found:
        raise ValueError(f"batched_slq: device must be one of the {found} CUDA devices that torch sees, got {device}")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    capability = torch.cuda.get_device_capability(device)
    compiled = str(_C.build_info()["cuda_architectures"]).split(",")
    if not any(_runs_on(capability, name) for name in compiled):
        here = ".".join(map(str, capability))
        raise ValueError(
            f"batched_slq: device must have an architecture that was compiled in, {', '.join(compiled)}, got {device} "
            f"of compute capability {here}; {rebuild(here)}"
        )
    return device


@contextmanager
def memory_explained(sets: int, set_bytes: int, basis_bytes: int) -> Iterator[None]:
    """Where a device runs out of memory, frees what was taken, and says what was needed and what lowers it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(
            f"batched_slq: device memory must hold {sets} sets of vectors, {sets * set_bytes / 2**20:.0f} MiB, the "
            f"kept basis, {basis_bytes / 2**20:.0f} MiB, and what hvp needs; lower num_probes, or num_steps or "
            "reorthogonalize='none' for the basis" + ("; cuda_graph=False takes one set less" if sets > 3 else "")
        ) from None
