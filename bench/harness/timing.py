"""Timing: results are compared before anything is timed, rivals take turns, and times are medians with their range.

A rival with a wrong result is reported with its error and not timed. A rival that is not installed or does not compile
is reported as absent. GPU times are taken with CUDA events, CPU times with the wall clock or the process's CPU time.
"""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.harness.memory import growth

CPU = torch.device("cpu")


class WrongResult(RuntimeError):
    """A result differs from the reference by more than the tolerance."""


_collected: list[str] | None = None


@contextmanager
def wrong_results() -> Iterator[list[str]]:
    """Collect what `check` finds wrong in the block, instead of raising: times of a scarce machine are kept."""
    global _collected
    _collected = found = []
    try:
        yield found
    finally:
        _collected = None


def check(what: str, error: float, tolerance: float) -> float:
    """Return the error.

    Raises:
        WrongResult: The error exceeds the tolerance or is NaN, and wrong results are not collected.
    """
    if not error <= tolerance:
        text = f"{what} differs by {error:.3g}, tolerance {tolerance:.3g}"
        if _collected is None:
            raise WrongResult(f"{text}; nothing was timed")
        _collected.append(text)
    return error


def difference(a: Tensor, b: Tensor) -> float:
    """Return max |a - b| / max |b|, computed row by row to save memory."""
    pairs = list(zip(a.reshape(len(a), -1), b.reshape(len(b), -1)))
    size = max(float(y.abs().max()) for _, y in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs) / max(size, 1e-300)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = "wall"


def use_clock(name: str) -> None:
    """Select the "wall" clock, or "cpu": CPU seconds of this process, which exclude time spent waiting."""
    global _clock
    _clock = name


def now() -> float:
    """Return the seconds of the selected clock."""
    return CLOCKS[_clock]()


@dataclass(frozen=True)
class Times:
    """Repeated measurements of one call, in seconds."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """Return the entry of the JSON file."""
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "repeats": len(self.seconds),
        }


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one call on the CPU."""
    start = now()
    run()
    return now() - start


def alternate(calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float = math.inf) -> Iterator[None]:
    """Make every call once per round, starting with another one each round, until `seconds` have passed.

    Yields after each round.
    """
    order, start = list(calls), now()
    for _ in range(rounds):
        for name in order:
            calls[name]()
        yield
        if now() - start > seconds:
            return
        order = order[1:] + order[:1]


@dataclass(frozen=True)
class Rival:
    """One implementation of the work of a row."""

    make: Callable[[], Callable[[], Any]]  # sets it up and returns what does the work; ImportError if not installed
    error: Callable[[Any], float]  # of a result
    tolerance: float  # largest error of a correct result
    scale: float = 1.0  # ratio of the whole work to the part that is timed
    limit: float = math.inf  # seconds allowed for set-up and first call


@dataclass
class Entry:
    """Measurements of one rival."""

    failure: str = ""  # why it was not timed
    error: float | None = None  # of its result
    first: float = 0.0  # seconds of set-up and first call, including compilation
    seconds: list[float] = field(default_factory=list)  # of each further call, scaled to the whole work
    peak_bytes: int | None = None  # growth of memory during a call, if measured

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, Any]:
        """Return the entry of the JSON file."""
        if self.failure:
            return {"failure": self.failure, "error": self.error}
        return Times(self.seconds).summary() | {
            "first_ms": 1e3 * self.first,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / 2**20,
            "error": self.error,
        }


def failure_reason(error: Exception) -> str:
    """Return one line that says why a rival was not timed: "absent (...)" if not installed or not compiled."""
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    if isinstance(error, ImportError):
        return f"absent ({error})"
    compiler = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return f"absent ({line})" if compiler or isinstance(error, TimeoutError) else line


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after so many seconds."""
    if seconds == math.inf:
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError(f"not ready within {seconds:.0f} s")

    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401, an import that is interrupted breaks all later compilations

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compare_and_time(rivals: Mapping[str, Rival], *, rounds: int = 15, seconds: float = 4.0) -> dict[str, Entry]:
    """Check the results of all rivals, then time the correct ones in turn on the CPU.

    Args:
        rivals: By name.
        rounds: Timed calls per rival; fewer, but at least one, if together they exceed `seconds` per rival.

    Returns:
        An entry for every rival.
    """
    entries = {name: Entry() for name in rivals}
    works: dict[str, Callable[[], Any]] = {}
    for name, rival in rivals.items():
        entry, start = entries[name], now()
        try:
            with _time_limit(rival.limit):
                work = rival.make()
                result = work()
            entry.first = now() - start
            entry.error = float(rival.error(result))
        except Exception as error:  # measure the other rivals
            entry.failure = failure_reason(error)
            continue
        if not entry.error <= rival.tolerance:  # also if NaN
            entry.failure = f"wrong by {entry.error:.2g}, tolerance {rival.tolerance:.2g}"
            continue
        del result
        entry.peak_bytes = growth(work)  # also warms up
        works[name] = work

    time_in_turn(
        entries, {name: lambda name=name: rivals[name].scale * timed(works[name]) for name in works}, rounds, seconds
    )
    return entries


def time_in_turn(
    entries: Mapping[str, Entry], seconds_of: Mapping[str, Callable[[], float]], rounds: int, seconds: float = math.inf
) -> None:
    """Append the seconds that every function returns to its entry, round by round."""

    def call(name: str) -> Callable[[], None]:
        return lambda: entries[name].seconds.append(seconds_of[name]())

    for _ in alternate({name: call(name) for name in seconds_of}, rounds, seconds * len(seconds_of)):
        pass


class Mark:
    """A point in time of a device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = now()
        if self._event is not None:
            self._event.record()

    def until(self, later: Mark) -> float:
        """Return the seconds to a later mark. Synchronize the device first."""
        if self._event is None:
            return later._time - self._time
        return float(self._event.elapsed_time(later._event)) / 1e3


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(
    run: Callable[[], object], device: torch.device, *, calls: int = 1, repeats: int = 15, seconds: float = 4.0
) -> Times:
    """Time `calls` consecutive calls `repeats` times, or at least three times until `seconds` have passed.

    Three calls warm up. A call that takes longer than `seconds` warms up once and is measured once.
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
    """Time the call replayed from a CUDA graph, without gaps between launches; return None on a CPU."""
    if device.type != "cuda":
        return None
    run()
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return measure(graph.replay, device, calls=calls)
