"""Large tensors use huge pages where the system provides them, and behave as ordinary tensors."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from blockhess_ext import batched_slq, huge_pages

CPU = torch.device("cpu")
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_kib() -> int:
    """Return the huge pages of this process in KiB."""
    [line] = [x for x in Path("/proc/self/smaps_rollup").read_text().splitlines() if x.startswith("AnonHugePages")]
    return int(line.split()[1])


@pytest.mark.skipif(not SETTING.exists() or "[never]" in SETTING.read_text(), reason="needs a system with huge pages")
def test_large_tensors_use_huge_pages() -> None:
    before = huge_kib()
    x = huge_pages.zeros(4, 2**22, dtype=torch.float32, device=CPU)
    assert not x.any()
    x.fill_(1.0)
    full, size = huge_kib(), x.nbytes / 1024
    assert full - before >= 0.8 * size
    del x
    assert full - huge_kib() >= 0.5 * size  # the kernel may have merged other memory of this process meanwhile


@pytest.mark.parametrize("n", [0, 1, 2**18, 2**20 + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_they_are_ordinary_tensors(n: int, dtype: torch.dtype) -> None:
    x = huge_pages.zeros_like(torch.ones(2, n, dtype=dtype))
    assert x.shape == (2, n) and x.dtype == dtype and x.is_contiguous() and not x.any()
    x += 1
    y = x.clone()
    x.mul_(2)
    assert torch.equal(x, 2 * y)


def test_without_huge_pages_ordinary_memory_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel refuses huge pages, results are bitwise the same."""
    dims = [2**20, 3]
    scales = torch.linspace(-1, 1, sum(dims))
    found = batched_slq(lambda v: v * scales, dims, num_probes=1, num_steps=3)

    class Refused(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Refused)
    assert not huge_pages.zeros(2**21, dtype=torch.float32, device=CPU).any()
    again = batched_slq(lambda v: v * scales, dims, num_probes=1, num_steps=3)
    assert torch.equal(found.nodes, again.nodes) and torch.equal(found.weights, again.weights)


@pytest.mark.parametrize("n", [2**50, 2**61])
def test_an_impossible_size_raises_pytorchs_error(n: int) -> None:
    with pytest.raises(RuntimeError, match=r"allocate memory|overflow"):
        huge_pages.zeros(n, 4, dtype=torch.float32, device=CPU)
