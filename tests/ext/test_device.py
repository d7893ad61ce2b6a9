"""Devices that the build does not support, and memory that runs out, raise errors that say what to do."""

from __future__ import annotations

import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch

from blockhess_ext import batched_slq, device
from blockhess_ext.device import has_cuda


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Simulate two GPUs of a compute capability, and a build for some architectures."""

    def make(capability: tuple[int, int], compiled: str) -> None:
        build = {"cuda": "13.0", "cuda_architectures": compiled}
        monkeypatch.setattr(device, "_C", SimpleNamespace(build_info=lambda: build))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)

    return make


@pytest.mark.parametrize(
    ("capability", "compiled"),
    [
        ((8, 0), "sm_80,sm_90,compute_90"),
        ((8, 9), "sm_80,sm_90,compute_90"),  # machine code of the same major version
        ((9, 0), "sm_80,sm_90"),
        ((12, 0), "sm_80,sm_90,compute_90"),  # PTX for whatever is newer
        ((12, 0), "sm_120"),
        ((9, 0), "sm_90a"),
    ],
)
def test_an_architecture_that_runs(capability, compiled, gpu):
    gpu(capability, compiled)
    assert device.check_device("cuda") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("capability", "compiled"),
    [
        ((7, 5), "sm_80,sm_90,compute_90"),  # older than all
        ((10, 0), "sm_80,sm_90"),  # newer, without PTX
        ((8, 0), "sm_86"),  # machine code of a later minor version
        ((8, 9), "sm_90,compute_90"),
        ((10, 0), "sm_90a,compute_90a"),  # both are for one architecture only
        ((12, 0), "sm_100"),
    ],
)
def test_an_architecture_missing_from_the_build(capability, compiled, gpu):
    gpu(capability, compiled)
    here = ".".join(map(str, capability))
    text = (
        f"batched_slq: device must have an architecture of this build, {compiled.replace(',', ', ')}, "
        f"got cuda:0 of compute capability {here}; in blockhess' source folder, with a CUDA build of torch, run: "
        f"TORCH_CUDA_ARCH_LIST={here} BLOCKHESS_CUDA=1 pip install --no-build-isolation ."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        batched_slq(lambda v: v, [3], device="cuda:0")


@pytest.mark.skipif(has_cuda(), reason="this build has CUDA")
def test_a_build_without_cuda_says_how_to_rebuild():
    with pytest.raises(
        ValueError, match=r"device must be cpu in a build without CUDA, got cuda:1; .* BLOCKHESS_CUDA=1"
    ):
        batched_slq(lambda v: v, [3], device="cuda:1")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("blockhess_ext::lanczos_step", "CUDA")


@pytest.mark.skipif(not has_cuda() or torch.cuda.is_available(), reason="needs a build with CUDA and no GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="device must be one of the 0 CUDA devices that torch sees, got cuda"):
        batched_slq(lambda v: v, [3], device="cuda")


def test_running_out_of_memory_is_explained_and_memory_is_freed():
    vectors = []

    def hvp(v: torch.Tensor) -> torch.Tensor:
        vectors.append(weakref.ref(v))
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError, match=r"3 sets of vectors, 12 MiB.*num_probes") as error:
        batched_slq(hvp, [2**20], num_probes=1, num_steps=2)
    del error
    gc.collect()
    assert vectors[0]() is None


@pytest.mark.parametrize("given", [False, True])
def test_running_out_of_memory_for_the_first_vectors_is_explained(given, monkeypatch):
    def full(*args: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("blockhess_ext.ops.random_probes", full)
    monkeypatch.setattr("blockhess_ext.arguments.unit_probes", full)
    probes = torch.ones(2, 2**18) if given else None
    with pytest.raises(torch.OutOfMemoryError, match=r"3 sets of vectors, 6 MiB, the Krylov basis, 0 MiB"):
        batched_slq(lambda v: v, [2**18], num_probes=2, probes=probes, reorthogonalize="none")
