"""Steps replayed from graphs equal the eager loop bitwise, with a recorder that emulates CUDA graphs on the CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from blockhess_ext import batched_slq, completion, cuda_graph
from blockhess_ext.device import explain_out_of_memory
from tests.helpers.call_recorder import CallRecorder
from tests.helpers.replay_cases import FAILS_AT, STEPS, Operator, run


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CallRecorder:
    made = CallRecorder()
    monkeypatch.setattr("blockhess_ext.slq.recorder_of", lambda device: made)
    return made


class NeverKnown(completion.Completion):
    """Completion that never reports a finished recurrence: the longest possible delay."""

    def poll(self, step: int) -> Tensor:
        return torch.zeros(self._status.shape, dtype=torch.bool)


@pytest.mark.parametrize("reorthogonalize", ["none", "full", "auto"])
@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("tracker", [completion.Completion, NeverKnown])
def test_a_replayed_loop_has_the_same_bits(reorthogonalize, capturable, tracker, dtype, recorder, monkeypatch):
    options = {"reorthogonalize": reorthogonalize, "dtype": dtype}
    expected = run(Operator(dtype), **options)
    monkeypatch.setattr(completion, "track", tracker)
    operator = Operator(dtype, capturable)
    assert same_bits(run(operator, cuda_graph=True, **options), expected)
    eager = 3 if capturable else 2  # the first two steps, and the product that is compared in the fourth one
    assert (recorder.warm_ups, recorder.records, recorder.replays) == (eager, 2, STEPS - eager)
    assert operator.calls == (eager + 2 if capturable else STEPS)
    steps, failed = expected[4:]
    assert steps[0].tolist() == [1, 2, 1, STEPS, STEPS, STEPS]  # some finish long before the last replay
    assert steps[1, 4] == FAILS_AT - 1 and failed.sum() == 1  # and one becomes non-finite in a replay


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("capturable", [False, True])
def test_few_steps(num_steps, capturable, recorder):
    expected = run(Operator(), num_steps=num_steps)
    assert same_bits(run(Operator(capturable=capturable), num_steps=num_steps, cuda_graph=True), expected)
    assert recorder.records == len({step % 2 for step in range(2, num_steps) if not (capturable and step == 3)})


def test_several_runs(recorder):
    def run_once(seed: int, **options: object) -> list[Tensor]:
        return run(Operator(capturable=True), seed=seed, reorthogonalize="full", **options)

    for seed in range(3):
        assert same_bits(run_once(seed, cuda_graph=True), run_once(seed))


def test_it_stops_when_all_are_finished(recorder):
    seen = []
    batched_slq(lambda v: v * v.new_tensor([1.0, 2, 3, 4, 5]), [5], num_steps=50, cuda_graph=True,
                on_step=lambda step, running: seen.append((step, running)))  # fmt: skip
    assert seen[-1] == (5, 0) and recorder.replays == 3


def test_replaying_one_graph_for_both_parities_is_detected(recorder, monkeypatch):
    record, first = recorder.record, []

    def first_only(work: Callable[[], None]) -> Callable[[], None]:
        first.append(record(work))
        return first[0]

    monkeypatch.setattr(recorder, "record", first_only)
    assert not same_bits(run(Operator(), cuda_graph=True), run(Operator()))


def test_an_operator_with_state_on_the_host_is_not_capturable(recorder):
    """Values computed on the host are fixed at capture."""

    class Counting(Operator):
        def __call__(self, v: Tensor) -> Tensor:
            self.calls += 1
            return v * self.scales * (1 + self.calls)

    expected = run(Counting(), check=False)
    assert same_bits(run(Counting(), cuda_graph=True, check=False), expected)
    assert not same_bits(run(Counting(capturable=True), cuda_graph=True, check=False), expected)


def test_one_more_set_of_vectors(recorder):
    n, live = 100_000, []

    def hvp(v: Tensor) -> Tensor:
        live.append(sum(type(x) is Tensor and x.numel() == v.numel() for x in gc.get_objects()))
        return 2 * v + v.roll(1, 1) + v.roll(-1, 1)

    batched_slq(hvp, [n], num_probes=2, num_steps=6, reorthogonalize="none", cuda_graph=True)
    assert max(live) == 3  # v, v_prev and the buffer for w; the result of hvp is the fourth
    with (
        pytest.raises(torch.OutOfMemoryError, match=r"hold 4 sets of vectors, 8 MiB.*cuda_graph=False needs one set"),
        explain_out_of_memory(4, 2**21, 0),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory")


class Stream:
    """A named stream that logs what it waits for."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Cuda:
    """A mock of torch.cuda and of a graph that logs work and its stream."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.current, self.side = Stream("user", self.log), Stream("side", self.log)
        monkeypatch.setattr(cuda_graph, "_side_stream", lambda device: self.side)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(torch.cuda, "stream", self.stream)
        monkeypatch.setattr(torch.cuda, "graph", self.graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph: Cuda, pool: str, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """As in torch, the capture stream stays current if the capture fails."""
        before, self.current = self.current, stream
        self.log.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
        yield
        self.current = before

    def replay(self) -> None:
        self.log.append(f"replay on {self.current.name}")


def test_streams_wait_for_each_other(monkeypatch):
    cuda = Cuda(monkeypatch)
    recorder = cuda_graph.recorder_of(torch.device("cuda", 0))
    step = cuda_graph.GraphedStep(lambda v, v_prev: cuda.log.append(f"{v} on {cuda.current.name}"), recorder)
    for v in ("even", "odd", "even", "odd", "even"):
        step(v, None)
    assert cuda.log == [
        *("side waits for user", "even on side", "user waits for side"),
        *("side waits for user", "odd on side", "user waits for side"),
        *("capture on side into pool, thread_local", "even on side", "replay on user"),
        *("capture on side into pool, thread_local", "odd on side", "replay on user"),
        "replay on user",
    ]


@pytest.mark.parametrize(
    ("error", "raised", "text"),
    [
        (
            RuntimeError("operation not permitted"),
            RuntimeError,
            "hvp must support capture .* got: operation not",
        ),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
        (ValueError("its own"), ValueError, "its own"),
    ],
)
def test_a_capture_that_fails_is_explained_and_the_stream_restored(error, raised, text, monkeypatch):
    cuda = Cuda(monkeypatch)
    user = cuda.current

    def work() -> None:
        raise error

    with pytest.raises(raised, match=text):
        cuda_graph.recorder_of(torch.device("cuda", 0)).record(work)
    assert cuda.current is user


def test_a_warm_up_that_fails_leaves_no_stream_ahead(monkeypatch):
    cuda = Cuda(monkeypatch)
    user = cuda.current

    def work() -> None:
        cuda.log.append("queued")
        raise ValueError("its own")

    with pytest.raises(ValueError, match="its own"):
        cuda_graph.recorder_of(torch.device("cuda", 0)).warm_up(work)
    assert cuda.current is user
    assert cuda.log == ["side waits for user", "queued", "user waits for side"]
