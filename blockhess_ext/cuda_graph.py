"""The steps of the loop as CUDA graphs: captured once, then replayed by one launch a step.

A step is the same work on the same addresses each time, but for the exchange of v and v_prev: so there are two graphs,
for even and for odd steps. The first step of each kind runs as it is, which loads its kernels; the second is captured.
Graphs are replayed on the stream that is current, among what the host gives it between two steps.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

Work = Callable[[], None]
Step = Callable[[Tensor, Tensor], None]


class Recorder(Protocol):
    """What records the work that a device is given."""

    def warm_up(self, work: Work) -> None:
        """Does the work where it would be recorded."""

    def record(self, work: Work) -> Work:
        """Records the work without doing it; each call of the result does it."""


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures, as libraries keep scratch memory for every stream that they have seen."""
    stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream


_SIDE_STREAMS = threading.RLock()  # held while one is used; torch too allows one capture at a time


class CudaRecorder:
    """Captures CUDA graphs, on a stream beside the current one.

    What is allocated during a capture is the graphs' own. They share it, so they must be replayed in turn, in the order
    of their captures. What they read or write besides must live as long as they do.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = _side_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        """As in `Recorder`. The streams wait for each other, the host for neither."""
        current = torch.cuda.current_stream(self._stream.device)
        with _SIDE_STREAMS:
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                work()
            current.wait_stream(self._stream)

    def record(self, work: Work) -> Work:
        """As in `Recorder`. Waits for the device.

        Raises:
            RuntimeError: the work cannot be captured.
        """
        graph = torch.cuda.CUDAGraph()
        # The outer context chooses the device that torch waits for, and restores the stream where a capture fails.
        with _SIDE_STREAMS, torch.cuda.stream(self._stream):
            try:
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    work()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise RuntimeError(
                    "batched_slq: hvp must be fit for capture in a CUDA graph where hvp.capturable is True, "
                    f"got: {error}"
                ) from error
        replay: Work = graph.replay
        return replay


def recorder_of(device: torch.device) -> Recorder:
    """The recorder of the device.

    Raises:
        ValueError: it has none.
    """
    if device.type != "cuda":
        raise ValueError(f"batched_slq: cuda_graph must be False where vectors are not on a CUDA device, got {device}")
    return CudaRecorder(device)


class Replayed:
    """A step whose two arguments are exchanged from call to call, replayed from the third call on."""

    def __init__(self, step: Step, recorder: Recorder) -> None:
        self._step, self._recorder = step, recorder
        self._graphs: list[Work] = []
        self._calls = 0

    def __call__(self, v: Tensor, v_prev: Tensor) -> None:
        """Makes the step."""

        def work() -> None:
            self._step(v, v_prev)

        if self._calls < 2:
            self._recorder.warm_up(work)
        else:
            if self._calls < 4:
                self._graphs.append(self._recorder.record(work))
            self._graphs[self._calls % 2]()
        self._calls += 1


def replayed(
    recorder: Recorder,
    product: Callable[[Tensor], Tensor],
    advance: Callable[[Tensor, Tensor, Tensor], None],
    like: Tensor,
    with_product: bool,
) -> Step:
    """The step advance(product(v), v, v_prev), replayed.

    Args:
        recorder: of the device.
        product: w = H v.
        advance: the rest of the step, given w, v and v_prev.
        like: a set of vectors.
        with_product: replay the product too. Otherwise it runs as it is, and its result is copied to where the graphs
            read it: one more set of vectors, and two more elements moved per element.
    """
    if with_product:
        return Replayed(lambda v, v_prev: advance(product(v), v, v_prev), recorder)
    w = torch.empty_like(like)
    rest = Replayed(lambda v, v_prev: advance(w, v, v_prev), recorder)

    def step(v: Tensor, v_prev: Tensor) -> None:
        w.copy_(product(v))
        rest(v, v_prev)

    return step
