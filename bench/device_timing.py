"""Times of work on a device: medians by CUDA events, or by the host's clock on a CPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Times:
    """Seconds of one call, several times measured."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Difference of the slowest and the fastest, in parts of the median; less than this is noise."""
        return (max(self.seconds) - min(self.seconds)) / self.median

    def summary(self) -> dict[str, float | int]:
        """For the JSON."""
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "repeats": len(self.seconds),
        }


class Mark:
    """A point in the work of a device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = time.perf_counter()
        if self._event is not None:
            self._event.record()

    def until(self, later: Mark) -> float:
        """Seconds to a later mark that the device has passed."""
        if self._event is None:
            return later._time - self._time
        return float(self._event.elapsed_time(later._event)) / 1e3


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    run: Callable[[], object], device: torch.device, *, calls: int = 1, repeats: int = 15, seconds: float = 4.0
) -> Times:
    """Times `calls` calls in a row, `repeats` times or at least thrice until `seconds` are spent; three warm up.

    A call slower than the whole allowance warms up once and is measured once.
    """
    start = time.perf_counter()
    for _ in range(3):
        run()
        synchronize(device)
        if time.perf_counter() - start > seconds:
            break
    slow = time.perf_counter() - start > seconds
    start, found = time.perf_counter(), []
    for i in range(1 if slow else repeats):
        before = Mark(device)
        for _ in range(calls):
            run()
        after = Mark(device)
        synchronize(device)
        found.append(before.until(after) / calls)
        if i >= 2 and time.perf_counter() - start > seconds:
            break
    return Times(found)


def replayed(run: Callable[[], object], device: torch.device, calls: int) -> Times | None:
    """Times of the call replayed from a CUDA graph, without the gaps between launches; None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return measure(graph.replay, device, calls=calls)


def copy_bandwidth(device: torch.device, elements: int) -> float:
    """Bytes read and written a second by a copy of float32 from memory of the device to another place in it."""
    source = torch.rand(elements, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device).median
