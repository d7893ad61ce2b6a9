"""Checks that the compiled kernels run on a device, and the message for running out of its memory."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

import blockhess_ext._C as _C


def build_command(architecture: str = "") -> str:
    """Return the command that builds with CUDA, for a GPU architecture such as "9.0" or the default ones."""
    setting = f"TORCH_CUDA_ARCH_LIST={architecture} " if architecture else ""
    return (
        f"in blockhess' source folder, with a CUDA build of torch, run: {setting}BLOCKHESS_CUDA=1 "
        "pip install --no-build-isolation ."
    )


def has_cuda() -> bool:
    """Return whether the extension was compiled with CUDA."""
    return _C.build_info()["cuda"] is not None


def _runs_on(capability: tuple[int, int], name: str) -> bool:
    """Return whether code compiled for the named architecture runs on a device of this compute capability.

    Machine code (sm_80) runs on the same major version with an equal or higher minor version, PTX (compute_90) on any
    newer architecture as well, and either with the suffix "a" (sm_90a) on that architecture only.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)(a?)", name)
    assert match
    kind, major, minor, exact = match.groups()
    compiled = int(major), int(minor)
    if exact:
        return capability == compiled
    return capability >= compiled and (kind == "compute" or capability[0] == compiled[0])


def check_device(device: torch.device | str) -> torch.device:
    """Return the device with its index, checked to be one on which the kernels run.

    Raises:
        ValueError: this build has no kernels for the device, or the device does not exist.
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
        raise ValueError(f"batched_slq: device must be cpu in a build without CUDA, got {device}; {build_command()}")
    found = torch.cuda.device_count()
    if not found or (device.index or 0) >= found:
        raise ValueError(f"batched_slq: device must be one of the {found} CUDA devices that torch sees, got {device}")
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    capability = torch.cuda.get_device_capability(device)
    compiled = str(_C.build_info()["cuda_architectures"]).split(",")
    if not any(_runs_on(capability, name) for name in compiled):
        here = ".".join(map(str, capability))
        raise ValueError(
            f"batched_slq: device must have an architecture of this build, {', '.join(compiled)}, got {device} "
            f"of compute capability {here}; {build_command(here)}"
        )
    return device


def normal_mode() -> AbstractContextManager[None]:
    """Leave `torch.inference_mode`, whose tensors do not count their changes; this also enables gradients."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def explain_out_of_memory(sets: int, set_bytes: int, basis_bytes: int) -> Iterator[None]:
    """Release memory after an OutOfMemoryError, and raise one that states the bytes needed and how to reduce them."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        torch.cuda.empty_cache()
        raise torch.OutOfMemoryError(
            f"batched_slq: device memory must hold {sets} sets of vectors, {sets * set_bytes / 2**20:.0f} MiB, the "
            f"Krylov basis, {basis_bytes / 2**20:.0f} MiB, and what hvp needs; lower num_probes, or num_steps or "
            "reorthogonalize='none' for the basis" + ("; cuda_graph=False needs one set less" if sets > 3 else "")
        ) from None
