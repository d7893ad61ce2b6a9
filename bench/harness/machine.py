"""Where rows are measured and how large, and the limits of that machine, measured in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness.timing import CPU, measure

SIZES = ("full", "quick", "tiny")


class TooSmall(RuntimeError):
    """The machine cannot hold a workload."""


@dataclass(frozen=True)
class Machine:
    """Where to measure, how large ("full", "quick" or "tiny"), and the limits measured there.

    Attributes:
        limits: bytes a second: "copy" (read and written), on a CPU also "triad" and "read"; and "gemm", operations a
            second of a float32 matrix product.
    """

    device: torch.device
    size: str
    limits: dict[str, float]

    @staticmethod
    def measured(device: torch.device, size: str) -> Machine:
        if device.type != "cpu":
            return Machine(device, size, {"copy": copy_bandwidth(device, {"full": 2**29, "quick": 2**26}[size])})
        return Machine(device, size, cpu_limits({"full": 2**26, "quick": 2**22, "tiny": 2**14}[size]))

    def pick(self, full: int, quick: int, tiny: int) -> int:
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    def generator(self) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(0)

    def share(self, amount: float, seconds: float, limit: str = "copy") -> float:
        """What part of a limit so many bytes, or operations, in so many seconds are."""
        return amount / seconds / self.limits[limit]

    def require(self, n_bytes: float) -> None:
        """Raise TooSmall unless so many bytes of memory are free."""
        free = free_bytes()
        if self.device.type == "cpu" and n_bytes > free:
            raise TooSmall(f"takes {n_bytes / 2**30:.3g} GiB of memory, {free / 2**30:.3g} GiB are free")


def free_bytes() -> int:
    """Memory that can be had without swapping; Linux only."""
    (line,) = (s for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Bytes read and written a second by a copy of float32 from memory of the device to another place in it."""
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device).median


def cpu_limits(elements: int) -> dict[str, float]:
    """What PyTorch's own kernels reach on vectors of so many float32: the fastest of some calls each.

    copy: b = a. triad: c = a + s b, three vectors (that a write may first read is not counted). read: <a, b>. gemm: a
    product of square matrices of 2^11 rows, or fewer where there are fewer elements.
    """
    a, b, c = torch.rand(elements), torch.rand(elements), torch.empty(elements)
    rows = min(2048, int(elements**0.5))
    A, B = a[: rows * rows].view(rows, rows), b[: rows * rows].view(rows, rows)
    C = torch.empty(rows, rows)
    works: dict[str, tuple[float, Callable[[], object]]] = {
        "copy": (2 * a.nbytes, lambda: c.copy_(a)),
        "triad": (3 * a.nbytes, lambda: torch.add(a, b, alpha=0.5, out=c)),
        "read": (2 * a.nbytes, lambda: torch.dot(a, b)),
        "gemm": (2.0 * rows**3, lambda: torch.mm(A, B, out=C)),
    }
    return {name: amount / min(measure(work, CPU, seconds=1.0).seconds) for name, (amount, work) in works.items()}
