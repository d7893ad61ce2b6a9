"""Which device is taken: a GPU whose architecture the build lacks is refused by name, before any kernel is launched."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from blockhess_ext import batched_slq, device


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """Makes a machine with two GPUs of a compute capability, and a build for some architectures."""

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
        ((10, 0), "sm_90a,compute_90a"),  # either is for one architecture alone
        ((12, 0), "sm_100"),
    ],
)
def test_an_architecture_that_the_build_lacks(capability, compiled, gpu):
    gpu(capability, compiled)
    here = ".".join(map(str, capability))
    text = (
        f"batched_slq: device must have an architecture of this build, {compiled.replace(',', ', ')}, "
        f"got cuda:0 of compute capability {here}; in blockhess' source folder, with a CUDA build of torch, run: "
        f"TORCH_CUDA_ARCH_LIST={here} BLOCKHESS_CUDA=1 pip install --no-build-isolation ."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        batched_slq(lambda v: v, [3], device="cuda:0")
