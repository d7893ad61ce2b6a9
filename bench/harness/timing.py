"""The stopwatch: whoever is timed is compared first, rivals take turns, and times are medians with their range.

A rival whose result is wrong is shown with its error and not timed; one that is not installed, or does not compile,
is shown as absent. On a GPU time is taken by CUDA events, on a CPU by the host's clock, or the process's.
"""

from __future__ import annotations

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
    """A result differs from the reference, so its speed says nothing."""


def check(what: str, error: float, most: float) -> float:
    """The error, if it is at most `most`.

    Raises:
        WrongResult: it is more, or NaN.
    """
    if not error <= most:
        raise WrongResult(f"{what} differs by {error:.3g}, at most {most:.3g} is right; nothing was timed")
    return error


def difference(a: Tensor, b: Tensor) -> float:
    """Largest |a - b| over the largest |b|, by rows so that large tensors need little memory."""
    pairs = list(zip(a.reshape(len(a), -1), b.reshape(len(b), -1)))
    size = max(float(y.abs().max()) for _, y in pairs)
    return max(float((x - y).abs().max()) for x, y in pairs) / max(size, 1e-300)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = "wall"


def use_clock(name: str) -> None:
    """Time by "wall", or by "cpu": the processor's seconds of this process, where other programs keep it waiting."""
    global _clock
    _clock = name


def now() -> float:
    """Seconds by the clock in use."""
    return CLOCKS[_clock]()


@dataclass(frozen=True)
class Times:
    """Seconds of one call, several times measured."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, float | int]:
        """For the JSON."""
        return {
            "median_ms": 1e3 * self.median,
            "min_ms": 1e3 * min(self.seconds),
            "max_ms": 1e3 * max(self.seconds),
            "repeats": len(self.seconds),
        }


def timed(run: Callable[[], object]) -> float:
    """Seconds of one call on a CPU."""
    start = now()
    run()
    return now() - start


def alternate(clocks: Mapping[str, Callable[[], float]], rounds: int, seconds: float = float("inf")) -> Iterator[None]:
    """Calls every clock once a round, beginning with another one each round, until `seconds` are spent.

    Yields after each round; clocks keep what they measure.
    """
    order, start = list(clocks), now()
    for _ in range(rounds):
        for name in order:
            clocks[name]()
        yield
        if now() - start > seconds:
            return
        order = order[1:] + order[:1]


@dataclass(frozen=True)
class Rival:
    """One way to do the work of a row.

    Attributes:
        make: sets it up and returns what does the work, again and again; raises ImportError where a peer is absent.
        error: of the result of the work; at most `most` is right.
        scale: the whole work, in units of what is timed, where a rival is so slow that a part must do.
        limit: seconds that its set-up and first call may take.
    """

    make: Callable[[], Callable[[], Any]]
    error: Callable[[Any], float]
    most: float
    scale: float = 1.0
    limit: float = float("inf")


@dataclass
class Entry:
    """What one rival gave.

    Attributes:
        failure: why it was not timed. error: of its result. first: seconds of its set-up and first call, compiling
            included. seconds: of each further call, scaled to the whole work. peak_bytes: growth of memory in a call,
            where it was looked at.
    """

    failure: str = ""
    error: float | None = None
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None

    @property
    def absent(self) -> bool:
        return self.failure.startswith("absent")

    @property
    def wrong(self) -> bool:
        return self.failure.startswith("wrong")

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def summary(self) -> dict[str, Any]:
        """For the JSON."""
        if self.failure:
            return {"failure": self.failure, "error": self.error}
        return Times(self.seconds).summary() | {
            "first_ms": 1e3 * self.first,
            "peak_mib": None if self.peak_bytes is None else self.peak_bytes / 2**20,
            "error": self.error,
        }


def told(error: Exception) -> str:
    """One line on why a rival was not timed: absent, where it is not installed or does not compile; or its error."""
    line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"
    if isinstance(error, ImportError):
        return f"absent ({error})"
    uncompiled = isinstance(error, TimeoutError) or type(error).__module__.startswith(
        ("torch._dynamo", "torch._inductor")
    )
    return f"absent ({line})" if uncompiled else line


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the block once it has taken so long."""
    if seconds == float("inf"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"not ready within {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def contest(rivals: Mapping[str, Rival], *, rounds: int = 15, seconds: float = 4.0) -> dict[str, Entry]:
    """Compares the results of all rivals, then times those that are right in turn, on the CPU.

    Args:
        rivals: by name.
        rounds: calls of each that are timed; fewer, but at least one, where together they take longer than
            `seconds` for each rival.

    Returns:
        An entry for every rival.
    """
    entries = {name: Entry() for name in rivals}
    works: dict[str, Callable[[], Any]] = {}
    for name, rival in rivals.items():
        entry, start = entries[name], now()
        try:
            with _limited(rival.limit):
                work = rival.make()
                result = work()
            entry.first = now() - start
            entry.error = float(rival.error(result))
        except Exception as error:  # a rival may fail in any way, and others should still be measured
            entry.failure = told(error)
            continue
        if not entry.error <= rival.most:  # NaN neither
            entry.failure = f"wrong by {entry.error:.2g}, at most {rival.most:.2g} is right"
            continue
        del result
        entry.peak_bytes = growth(work)  # warms up, too
        works[name] = work

    def clock(name: str) -> Callable[[], float]:
        def call() -> float:
            entries[name].seconds.append(rivals[name].scale * timed(works[name]))
            return entries[name].seconds[-1]

        return call

    for _ in alternate({name: clock(name) for name in works}, rounds, seconds * len(works)):
        pass
    return entries


class Mark:
    """A point in the work of a device."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self._time = now()
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
