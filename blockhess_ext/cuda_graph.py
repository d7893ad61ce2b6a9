"""Lanczos steps as CUDA graphs: captured once, then replayed with a single launch per step.

Every step does the same work on the same addresses, except that v and v_prev are swapped. So there are two graphs, for
even and for odd steps. The first step of each parity runs eagerly, which loads the kernels; the second is captured.
A step can also be made eagerly between replays.
Graphs are replayed on the current stream, in order with other work that the caller queues there.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]


class Step(Protocol):
    """Makes one step of all recurrences."""

    def __call__(self, v: Tensor, v_prev: Tensor, eager: bool = False) -> None:
        """Make one step; if `eager`, call the operator rather than replay it."""


class Recorder(Protocol):
    """Records device work for replay."""

    def warm_up(self, work: Work) -> None:
        """Run the work eagerly on the stream on which it would be recorded."""

    def record(self, work: Work) -> Work:
        """Record the work without running it, and return a function that replays it."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the one stream used for all captures: libraries allocate workspace for every stream they see."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


_SIDE_STREAMS = threading.RLock()  # held while a side stream is in use; torch allows one capture at a time


class CudaRecorder:
    """Captures CUDA graphs on a side stream.

    Memory allocated during a capture belongs to a pool that all graphs of this recorder share, so they must be replayed
    in the order of their captures. All other memory that they read or write must outlive them.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        """See `Recorder`. The streams wait for each other; the host does not wait."""
        current = torch.cuda.current_stream(self._stream.device)
        with _SIDE_STREAMS:
            self._stream.wait_stream(current)
            try:
                with torch.cuda.stream(self._stream):
                    work()
            finally:  # also what was queued before an exception precedes later work
                current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """See `Recorder`. Synchronizes with the device.

        Raises:
            RuntimeError: the work cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # The outer context selects the device that torch synchronizes, and restores the stream if the capture fails.
        with _SIDE_STREAMS, torch.cuda.stream(self._stream):
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    f"batched_slq: hvp must support capture in a CUDA graph if hvp.capturable is True, got: {error}"
                ) from error
        replay: Work = graph.replay
        return replay


def recorder_of(device: torch.device) -> Recorder:
    """Return the recorder for a device.

    Raises:
        ValueError: it is not a CUDA device.
    """
    if device.type != "cuda":
        raise ValueError(f"batched_slq: cuda_graph must be False unless device is a CUDA device, got device {device}")
    return CudaRecorder(device)


class GraphedStep:
    """A step whose two arguments are swapped from call to call.

    The first call of each parity runs eagerly, the second is recorded, and later ones are replayed.

    Args:
        step: makes one step.
        recorder: recorder for the device.
        replayed: called after every step that was made without calling `step`.
    """

    def __init__(
        self, step: Callable[[Tensor, Tensor], None], recorder: Recorder, replayed: Callable[[], object] = lambda: None
    ) -> None:
        self._step, self._recorder, self._replayed = step, recorder, replayed
        self._graphs: dict[int, Work] = {}
        self._parity, self._warm, self._recorded = 0, {0: False, 1: False}, {0: False, 1: False}

    def restart(self) -> None:
        """Run the next two steps eagerly and record again, because the work of a step changes.

        Until then the old graphs stay: the memory pool that they share with the new ones must not lose its last graph.
        """
        self._warm, self._recorded = {0: False, 1: False}, {0: False, 1: False}

    def __call__(self, v: Tensor, v_prev: Tensor, eager: bool = False) -> None:
        """Make one step; if `eager`, without a graph."""

        def work() -> None:
            self._step(v, v_prev)

        parity, self._parity = self._parity, 1 - self._parity
        if eager or not self._warm[parity]:
            self._recorder.warm_up(work)
            self._warm[parity] = True
            return
        recorded, self._recorded[parity] = self._recorded[parity], True
        if not recorded:
            self._graphs[parity] = self._recorder.record(work)
        self._graphs[parity]()
        if recorded:
            self._replayed()


def graphed_step(
    recorder: Recorder,
    product: Callable[[Tensor], Tensor],
    advance: Callable[[Tensor, Tensor, Tensor], None],
    like: Tensor,
    with_product: bool,
    replayed: Callable[[], object],
) -> Step:
    """Return the step advance(product(v), v, v_prev), replayed from CUDA graphs.

    Args:
        recorder: recorder for the device.
        product: computes w = H v.
        advance: the rest of the step, given w, v and v_prev.
        like: a tensor of the vectors' shape.
        with_product: whether the graphs include the product. Otherwise it runs eagerly and its result is copied to a
            buffer that the graphs read: one more set of vectors, and one more read and write per element.
        replayed: called after every step that was made without calling `product`.
    """
    if with_product:
        return GraphedStep(lambda v, v_prev: advance(product(v), v, v_prev), recorder, replayed)
    w = torch.empty_like(like)
    rest = GraphedStep(lambda v, v_prev: advance(w, v, v_prev), recorder)

    def step(v: Tensor, v_prev: Tensor, eager: bool = False) -> None:
        w.copy_(product(v))
        rest(v, v_prev)

    return step
