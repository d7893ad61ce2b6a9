"""The device and problem size of a measurement, and the limits of the machine, measured in the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness.timing import CPU, measure


class TooSmall(RuntimeError):
    """The machine has too little free memory for a workload."""


@dataclass(frozen=True)
class Machine:
    """Where and at what size to measure."""

    device: torch.device
    size: str  # "full", "quick" or "tiny"
    # Bytes per second: "copy" (read and written), on a CPU also "triad" and "read"; operations per second: "gemm".
    limits: dict[str, float]
    until: float = math.inf  # of time.monotonic(), at which measurements are ended

    @staticmethod
    def measured(device: torch.device, size: str) -> Machine:
        """Return the machine with its limits measured."""
        if device.type != "cpu":
            return Machine(device, size, {"copy": copy_bandwidth(device, {"full": 2**29, "quick": 2**26}[size])})
        return Machine(device, size, cpu_limits({"full": 2**26, "quick": 2**22, "tiny": 2**14}[size]))

    def pick(self, full: int, quick: int, tiny: int) -> int:
        """Return the value for this size."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    def generator(self) -> torch.Generator:
        """Return a random number generator on the device, seeded with 0."""
        return torch.Generator(self.device).manual_seed(0)

    def share(self, amount: float, seconds: float, limit: str = "copy") -> float:
        """Return the rate `amount / seconds` (bytes or operations per second) as a share of a limit."""
        return amount / seconds / self.limits[limit]

    def require(self, n_bytes: float) -> None:
        """Raise TooSmall if less memory is available without swapping. Linux only."""
        (line,) = (s for s in Path("/proc/meminfo").read_text().splitlines() if s.startswith("MemAvailable"))
        free = int(line.split()[1]) * 1024
        if self.device.type == "cpu" and n_bytes > free:
            raise TooSmall(f"takes {n_bytes / 2**30:.3g} GiB of memory, {free / 2**30:.3g} GiB are free")


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Return the bytes per second, read and written, of a float32 copy within the memory of the device."""
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device).median


def cpu_limits(elements: int) -> dict[str, float]:
    """Return the rates of PyTorch's own kernels on float32 vectors with so many elements; the fastest of several calls.

    copy: b = a. triad: c = a + s b, counted as three vectors. read: <a, b>. gemm: a product of square matrices with at
    most 2048 rows.
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
