"""Products of the traced engine in CUDA graphs, as far as it can be tested without a GPU.

A step computes nothing on the host and reads nothing from it. An emulation of CUDA graphs gets the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import blockhess
import blockhess_ext
from blockhess.hvp import AutogradEngine, BlockOperator, TracedEngine
from blockhess.problem.model_state import fixed_state
from blockhess.problem.problem import Problem
from blockhess_ext import batched_slq, cuda_graph
from tests.helpers.call_recorder import CallRecorder
from tests.helpers.dense_hessian import problem
from tests.helpers.model_zoo import ZOO, Case
from tests.helpers.tiny_models import labeled, mlp

pytestmark = pytest.mark.usefixtures("float64_models")

aten = torch.ops.aten


def masked(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(m(x)[y != 0], y[y != 0])


def assigned(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    outputs = m(x).clone()
    outputs[y == 0] = 0.5
    outputs[(y == 1)[:, None] & (x > 0)] = m(x)[(y == 1)[:, None] & (x > 0)] ** 2
    return F.cross_entropy(outputs, y)


def listed(m: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(m(x)[[0, 2, 3]][:, torch.tensor([2, 0, 1])] * torch.tensor(0.5), y[[0, 2, 3]])


# What has no trace is not here.
CASES = {name: case for name, case in ZOO.items() if name not in ("LSTM", "control flow on activations")} | {
    loss_fn.__name__: Case(lambda loss_fn=loss_fn: (mlp(), labeled(7), loss_fn))  # type: ignore[misc]
    for loss_fn in (masked, assigned, listed)
}


class Operations(TorchDispatchMode):
    """Collects operations for which the host waits, and those with a tensor that is not on `device`."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.waiting: list[str] = []
        self.elsewhere: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        masks = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1:2]))
        if op in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default):
            waits = masks
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(op.tags))
        if waits or op in (aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.scalar_tensor.default):
            self.waiting.append(str(op))
        result = op(*args, **(kwargs or {}))
        if any(isinstance(x, Tensor) and x.device.type != self.device for x in (*leaves, *tree_leaves(result))):
            self.elsewhere.append(str(op))
        return result


@pytest.mark.parametrize("name", CASES)
def test_a_step_neither_waits_nor_reads_the_host(name: str) -> None:
    case = CASES[name]
    if case.transformers:
        pytest.importorskip("transformers")
    model, data, loss_fn = case.make()
    with fixed_state(model, case.batchnorm):
        posed = problem(model, data, loss_fn)
        for device in ("cpu", "meta"):  # "meta" has no values at all
            operator = BlockOperator(posed, TracedEngine(posed, rows=3))
            posed.device = torch.device(device)  # to which the engine moves constants
            for probes in (1, 2):
                v = torch.randn(probes, sum(operator.dims), device=device)
                if probes == 1:
                    operator(v)  # evaluates the constants
                for _ in range(2):  # the first call for this number of vectors records the kernels
                    with Operations(device) as found:
                        operator(v)
                    assert not found.waiting and not found.elsewhere


@pytest.mark.parametrize(
    ("step", "operation"),
    [
        (lambda v: v * v.sum().item(), "_local_scalar_dense"),
        (lambda v: v[v > 0], "index.Tensor"),
        (lambda v: v.masked_fill_(v > 0, 1.0).index_put_((v > 0,), v.new_zeros(())), "index_put_"),
        (lambda v: v[:, [0, 1]], "lift_fresh"),
        (lambda v: v.nonzero(), "nonzero"),
        (lambda v: v * v.new_tensor([2.0, 3.0, 4.0]), "lift_fresh"),
        (lambda v: v if (v > 0).any() else -v, "_local_scalar_dense"),
    ],
)
def test_what_waits_is_found(step: Callable[[Tensor], object], operation: str) -> None:
    with Operations("cpu") as found:
        step(torch.ones(2, 3))
    assert any(operation in name for name in found.waiting), found.waiting


def test_what_is_elsewhere_is_found() -> None:
    with Operations("meta") as found:
        torch.ones(2, 3, device="meta")[:, torch.tensor([0, 1])] * torch.tensor(2.0)
    assert {"aten.index.Tensor", "aten.mul.Tensor"} <= set(found.elsewhere)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CallRecorder:
    made = CallRecorder()
    monkeypatch.setattr("blockhess_ext.slq.recorder_of", lambda device: made)
    return made


def posed(loss_fn: Any = None, batches: int = 1) -> Problem:
    """Recurrences of at most 3, 8 and 24 steps, of which some end earlier."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
    return problem(model, [labeled(7) for _ in range(batches)], loss_fn or nn.CrossEntropyLoss())


def run(where: Problem, graph: bool, rows: int = 4) -> tuple[list[Tensor], int, int]:
    """Return the tensors of the result, and the number of products by both counts."""
    counted: list[None] = []
    operator = BlockOperator(where, TracedEngine(where, rows=rows), on_hvp=lambda: counted.append(None))
    options = {"num_probes": 3, "num_steps": 24, "dtype": where.dtype, "on_nonfinite": "mark"}
    q = batched_slq(operator, operator.dims, cuda_graph=graph, **options)
    return [q.nodes, q.weights, q.alpha, q.beta, q.steps, q.nonfinite], operator.hvps, len(counted)


def same(a: tuple[list[Tensor], int, int], b: tuple[list[Tensor], int, int]) -> bool:
    return a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("loss_fn", [None, masked, assigned])
def test_replayed_products_have_the_same_bits(rows: int, batches: int, loss_fn: Any, recorder: CallRecorder) -> None:
    where = posed(loss_fn, batches)
    expected = run(where, False, rows)
    assert same(run(where, True, rows), expected)
    steps = expected[0][4]
    assert expected[1] == expected[2] == batches * int(steps.sum())
    # Rows leave when recurrences end: graphs are recorded before and after, and replayed in between.
    assert recorder.records >= 4 and recorder.replays > recorder.records
    assert recorder.warm_ups + recorder.replays == int(steps.max())


def test_graphs_of_rows_that_have_left_are_detected(recorder: CallRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    where = posed()
    expected = run(where, False)
    monkeypatch.setattr(cuda_graph.GraphedStep, "restart", lambda self: None)
    assert not same(run(where, True), expected)


def test_who_can_be_captured() -> None:
    def capturable(engine: Any, batches: int, data_size: int = 1, **options: bool) -> bool:
        where = posed(batches=batches)
        operator = BlockOperator(where, engine(where, **options))
        where.ranks = type("Ranks", (), {"data_size": data_size})()
        return operator.capturable

    assert capturable(TracedEngine, 1) and capturable(TracedEngine, 1, retain=False) and capturable(TracedEngine, 2)
    assert not capturable(TracedEngine, 2, retain=False)  # its constants are evaluated in every product
    assert not capturable(TracedEngine, 1, data_size=2)  # sums over ranks wait for the device
    assert not capturable(AutogradEngine, 1)


@pytest.mark.parametrize("capturing", [False, True])
def test_memory_that_runs_out_in_a_capture_is_an_error(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = TracedEngine(where := posed(), rows=4)
    operator = BlockOperator(where, engine)
    v = torch.randn(3, sum(operator.dims))
    operator(v)  # evaluates the constants
    multiply, failed = engine._multiply, []

    def once(*args: Any) -> None:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError
        multiply(*args)

    monkeypatch.setattr(engine, "_multiply", once)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    where.device = torch.device("cuda")
    with pytest.raises(torch.OutOfMemoryError) if capturing else nullcontext():
        operator(v)
    assert engine.rows == (4 if capturing else 2)


@pytest.mark.parametrize("engine", ["traced", "autograd"])
def test_spectrum(engine: str, recorder: CallRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, data = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)), [labeled(4), labeled(7)]

    def result() -> tuple[list[Tensor], int]:
        spectra = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), engine=engine, num_probes=2, num_steps=20)
        q = spectra.quadrature
        return [q.nodes, q.weights, q.steps], spectra.provenance["hvps"]

    def on_cuda(hvp: Any, *args: Any, **options: Any) -> Any:
        assert options.pop("cuda_graph") is False  # on the CPU
        return batched_slq(hvp, *args, cuda_graph=hvp.capturable, **options)

    (expected, hvps), _ = result(), monkeypatch.setattr(blockhess_ext, "batched_slq", on_cuda)
    found, count = result()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)) and count == hvps
    assert (recorder.replays > 0) is (engine == "traced")
