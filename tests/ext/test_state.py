"""Resuming from a state gives bitwise the results of an uninterrupted run, also with more steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from blockhess_ext import Quadrature, State, batched_slq
from tests.helpers import replay_cases
from tests.helpers.call_recorder import CallRecorder

DIMS = (1, 2, 7, 40, 300)
MODES = ("none", "full", "partial", "auto")


class Operator:
    """Diagonal, block 2 zero, one recurrence gets NaN in its 6th step; counts the products of running recurrences."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.scales = torch.linspace(-1, 3, sum(DIMS), dtype=dtype) ** 3
        self.scales[3:10] = 0.0
        self.step, self.products, self.finished = 0, 0, torch.zeros(2, len(DIMS), dtype=torch.bool)

    def mark_finished(self, finished: Tensor) -> None:
        self.finished = finished

    def __call__(self, v: Tensor) -> Tensor:
        self.step += 1
        self.products += int((~self.finished).sum())
        w = v * self.scales
        if self.step == 6:
            w[1, 20] = torch.nan
        return w


def run(operator: Operator, num_steps: int, **options: Any) -> Quadrature:
    return batched_slq(
        operator, DIMS, num_probes=2, num_steps=num_steps, on_nonfinite="mark", dtype=operator.scales.dtype, **options
    )


def tensors(q: Quadrature) -> list[Tensor]:
    return [q.nodes, q.weights, q.alpha, q.beta, q.steps, q.nonfinite]


def assert_same(a: Quadrature, b: Quadrature) -> None:
    for x, y in zip(tensors(a), tensors(b), strict=True):
        assert torch.equal(x, y)


def states(operator: Operator, num_steps: int, **options: Any) -> list[State]:
    found: list[State] = []
    run(operator, num_steps, on_state=lambda state: found.append(state.copy()), **options)
    return found


@pytest.mark.parametrize("tol", [None, 0.02])
@pytest.mark.parametrize("modes", MODES)
def test_resuming_from_any_step_gives_the_same_bits(modes, tol, dtype):
    options = {"reorthogonalize": modes, "tol": tol}
    whole = Operator(dtype)
    expected = run(whole, 30, **options)
    found = states(Operator(dtype), 30, **options)
    assert [state.step for state in found] == list(range(1, len(found) + 1))
    for state in found[::4] + found[-1:]:
        operator = Operator(dtype)
        operator.step = state.step
        assert_same(run(operator, 30, state=state, **options), expected)
    # Products of finished recurrences are not repeated.
    operator, state = Operator(dtype), found[10]
    operator.step = state.step
    first = Operator(dtype)
    run(first, state.step, **options)
    run(operator, 30, state=state, **options)
    assert first.products + operator.products == whole.products


@pytest.mark.parametrize("tol", [None, 0.005])
@pytest.mark.parametrize("modes", MODES)
def test_resuming_with_more_steps_equals_a_longer_run(modes, tol, dtype):
    """Beyond the size of the smaller blocks and the checkpoints of tol, with a larger basis."""
    requested = modes
    if modes == "auto":  # depends on num_steps: a state fixes the modes of its run
        requested = run(Operator(dtype), 12).reorthogonalize
        assert len(set(requested)) == 2
    expected = run(Operator(dtype), 50, reorthogonalize=requested, tol=tol, check=False)  # NaN in the sixth call
    last = states(Operator(dtype), 12, reorthogonalize=modes, tol=tol)[-1]
    assert last.step == 12
    for middle in (12, 31):
        operator = Operator(dtype)
        operator.step = 12
        found: list[State] = []
        options = {"reorthogonalize": modes, "tol": tol}
        run(operator, middle, state=last, on_state=lambda s, found=found: found.append(s.copy()), **options)
        state = found[-1] if found else last
        assert_same(run(operator, 50, state=state, **options), expected)
    assert int(expected.steps.max()) > 31


def test_the_state_is_not_copied_and_the_last_one_is_final():
    live: list[State] = []
    q = batched_slq(lambda v: v * torch.arange(1.0, 9.0), [8], num_steps=4, on_state=live.append)
    assert [state.step for state in live] == [1, 2, 3, 4]
    assert len({state.tensors["norm"].data_ptr() for state in live}) == 1
    assert live[0].tensors["v"].data_ptr() == live[2].tensors["v"].data_ptr()
    assert not torch.equal(live[0].copy().tensors["v"], live[1].tensors["v"])
    torch.testing.assert_close(live[-1].tensors["v"].norm(dim=1), torch.ones(10))
    assert torch.equal(live[-1].tensors["alpha"].permute(1, 2, 0), q.alpha)
    assert live[-1].nbytes == sum(t.nbytes for t in live[-1].tensors.values())


@pytest.mark.parametrize("change", [lambda t: t.add_(1), lambda t: t.data.add_(1), lambda t: t.numpy().fill(7)])
@pytest.mark.parametrize("name", ["v", "v_prev", "basis", "alpha", "beta", "norm", "steps", "status"])
def test_a_state_must_not_be_changed(name: str, change: Callable[[Tensor], object]) -> None:
    with pytest.raises(ValueError, match=f"^batched_slq: on_state must not change its state, got a changed {name}$"):
        batched_slq(lambda v: 2 * v, [8], reorthogonalize="full", on_state=lambda state: change(state.tensors[name]))


def test_states_can_be_compared_and_put_into_sets() -> None:
    first, second = states(Operator(torch.float32), 2)
    assert first == first and first != second and len({first, second}) == 2


def test_a_state_without_further_steps_is_a_quadrature():
    def never(v: Tensor) -> Tensor:
        raise AssertionError("no product is needed")

    state = states(Operator(torch.float32), 7)[-1]
    q = batched_slq(never, DIMS, num_probes=2, num_steps=7, state=state, on_nonfinite="mark")
    assert_same(q, run(Operator(torch.float32), 7))


def test_graphs_can_be_replayed_from_a_state(monkeypatch):
    recorder = CallRecorder()
    monkeypatch.setattr("blockhess_ext.slq.recorder_of", lambda device: recorder)
    expected = replay_cases.run(replay_cases.Operator())
    found: list[State] = []
    operator = replay_cases.Operator()
    replay_cases.run(operator, on_state=lambda s: found.append(s.copy()), cuda_graph=True)
    for state in (found[2], found[7]):
        operator = replay_cases.Operator()
        operator.count += state.step
        for a, b in zip(replay_cases.run(operator, state=state, cuda_graph=True), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_steps": 4}, "num_steps must be an integer at least 5, got 4"),
        ({"num_probes": 3}, r"shape of v in state must be .*3, 14.*, got .*2, 14"),
        ({"dims": [5, 8]}, r"shape of v in state must be .*2, 13.*, got .*2, 14"),
        ({"dtype": torch.float64}, "dtype of v in state must be torch.float64, got torch.float32"),
        ({"tol": 0.1}, "tensors in state must be .*converged.*, got"),
        ({"reorthogonalize": "none"}, "reorthogonalize must equal that of state, full, full, got 'none'"),
    ],
)
def test_a_state_of_other_recurrences_is_rejected(options, text):
    found: list[State] = []
    batched_slq(lambda v: v * torch.arange(14.0), [5, 9], num_probes=2, num_steps=5, on_state=found.append)
    given = {"dims": [5, 9], "num_probes": 2, "num_steps": 6, "state": found[-1], **options}
    with pytest.raises(ValueError, match=f"batched_slq: {text}"):
        batched_slq(lambda v: v, **given)


@pytest.mark.parametrize(("name", "value"), [("steps", 6), ("steps", -1), ("steps", 3), ("status", 3), ("status", -1)])
def test_an_inconsistent_state_is_rejected(name: str, value: int) -> None:
    state = states(Operator(torch.float64), 9)[4]
    run(Operator(torch.float64), 9, state=state)  # control
    state.tensors[name][1, 4] = value
    with pytest.raises(ValueError, match="batched_slq: steps and status in state must be consistent with 5 steps"):
        run(Operator(torch.float64), 9, state=state)
