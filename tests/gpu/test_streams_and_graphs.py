"""CUDA semantics: no synchronization or allocation in the loop, graphs, streams, several devices, out of memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from blockhess_ext import Quadrature, batched_slq, ops
from tests.gpu import device
from tests.gpu.cases import OPS, RAGGED, call_of, projection, state, step_case
from tests.gpu.device import assert_same_bits, on

device.require()

DIMS = (300, 1, 70_000, 5, 33_000)
STEPS = 20


def eigenvalues(where: str | torch.device) -> Tensor:
    return torch.linspace(-1, 2, sum(DIMS), dtype=torch.float64).float().to(where)


def run(hvp: Callable[[Tensor], Tensor], where: str = "cuda", **options: object) -> list[Tensor]:
    q: Quadrature = batched_slq(hvp, DIMS, num_probes=3, num_steps=STEPS, device=where, **options)
    return [q.nodes, q.weights, q.alpha, q.beta, q.steps]


def diagonal(where: str | torch.device = "cuda") -> Callable[[Tensor], Tensor]:
    scales = eigenvalues(where)
    return lambda v: v * scales


@pytest.mark.parametrize("op", OPS)
def test_another_stream_has_the_same_bits(op, dtype):
    expected = call_of(op, "cuda", dtype)[0]()
    again = call_of(op, "cuda", dtype)[0]()
    torch.cuda.synchronize()
    call, _ = call_of(op, "cuda", dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = call()
    stream.synchronize()
    assert_same_bits(again, expected)
    assert_same_bits(got, expected)


@pytest.mark.parametrize("op", OPS)
def test_an_op_runs_on_the_current_stream(op):
    """Work queued behind a long kernel waits for it; on the default stream it would not."""
    call, _ = call_of(op, "cuda")
    torch.cuda.synchronize()
    stream, done = torch.cuda.Stream(), torch.cuda.Event()
    with torch.cuda.stream(stream):
        call()  # loads the kernels, and takes memory for this stream
        stream.synchronize()
        torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
        call()
        done.record()
    assert not done.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("op", OPS)
def test_a_captured_op_replays_with_the_same_bits(op, dtype):
    """A capture also rejects synchronization and allocation outside torch, also by the kernels themselves."""
    eager = call_of(op, "cuda", dtype)[0]
    eager()
    expected = [x.clone() for x in eager()]
    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        call_of(op, "cuda", dtype)[0]()
    torch.cuda.current_stream().wait_stream(warm)
    call, _ = call_of(op, "cuda", dtype)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(results, expected)


@pytest.mark.parametrize("reorthogonalize", ["none", "full"])
def test_the_loop_never_synchronizes(reorthogonalize):
    """No torch call synchronizes from the first product to the last step; captures check the kernels' own calls."""
    scales = eigenvalues("cuda")

    def hvp(v: Tensor) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return v * scales

    def on_step(step: int, running: int) -> None:
        if step == STEPS or running == 0:
            torch.cuda.set_sync_debug_mode("default")

    try:
        got = run(hvp, reorthogonalize=reorthogonalize, on_step=on_step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_same_bits(got, run(diagonal(), reorthogonalize=reorthogonalize))


def test_a_synchronization_in_the_loop_is_detected():
    def hvp(v: Tensor) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        v.sum().item()
        return v

    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            run(hvp)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_allocates_nothing():
    case, start = on("cuda", step_case(torch.float32, RAGGED)), on("cuda", projection(torch.float32, RAGGED, 3, 5))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    ops.lanczos_step(*case.arguments())
    start.run(ops)
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_two_threads_on_two_streams(cuda_graph):
    expected = run(diagonal())
    results: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results[i] = run(diagonal(), cuda_graph=cuda_graph)
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(2):
        assert_same_bits(results[i], expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_is_used():
    here, there = run(diagonal("cuda:0"), "cuda:0"), run(diagonal("cuda:1"), "cuda:1")
    assert torch.cuda.current_device() == 0 and there[0].device.index == 1
    if torch.cuda.get_device_name(0) == torch.cuda.get_device_name(1):
        assert_same_bits(there, here)
    assert_same_bits(run(diagonal("cuda:1"), "cuda:1", cuda_graph=True), there)
    with pytest.raises(RuntimeError, match="v must be on the device of the first argument"):
        case = on("cuda:0", step_case(torch.float32, RAGGED))
        case.v = case.v.to("cuda:1")
        ops.lanczos_step(*case.arguments())


@pytest.mark.parametrize("steps", [3, 4000], ids=["vectors", "basis"])
def test_running_out_of_memory_is_explained_and_the_process_continues(steps):
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((before + 2**28) / total)
    n = 2**26 if steps == 3 else 2**20  # one probe: 256 MiB per vector set, or 4 MiB per row of the basis
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"3 sets of vectors, \d+ MiB.*lower num_probes"):
            batched_slq(lambda v: 2 * v, [n], num_probes=1, num_steps=steps, reorthogonalize="full", device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert torch.isfinite(run(diagonal())[0]).all()


def test_the_state_is_finite_after_all():
    """The tests above left no sticky error."""
    case = on("cuda", step_case(torch.float32, RAGGED))
    ops.lanczos_step(*case.arguments())
    torch.cuda.synchronize()
    assert all(x.isfinite().all() for x in state(case))
