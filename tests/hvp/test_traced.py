"""A trace stops gradients where autograd does, or is refused: its Hessian is never silently another one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, vmap

import blockhess
from blockhess.hvp import AutogradEngine, BlockOperator, NotTraceable, TracedEngine
from blockhess.hvp.accuracy import EngineMismatch, measure
from blockhess.hvp.operator import product
from blockhess.hvp.traced import trace
from blockhess.hvp.traced.operations import TensorInfo
from blockhess.hvp.traced.program import GraphBuilder, ProgramBuilder
from blockhess.problem.model_state import fixed_state
from blockhess.problem.problem import Problem
from tests.helpers.dense_hessian import problem
from tests.helpers.tiny_models import SelfAttention, labeled, mlp

Forward = Callable[[nn.Sequential, Tensor], Tensor]


pytestmark = pytest.mark.usefixtures("float64_models")


def loss_of(forward: Forward) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: F.cross_entropy(forward(model, batch[0]), batch[1])  # type: ignore[arg-type]


def disagreement(prepared_problem: Problem, engine: TracedEngine) -> float:
    """The largest difference from autograd's products, relative to the largest of these."""
    v = torch.randn(1, sum(prepared_problem.dims), dtype=prepared_problem.dtype)
    found, expected = (BlockOperator(prepared_problem, e)(v) for e in (engine, AutogradEngine(prepared_problem)))
    return float((found - expected).abs().max() / expected.abs().max())


def rounded_straight_through(m: nn.Sequential, x: Tensor) -> Tensor:
    h = m[0](x)
    return m[2](h + (h.round() - h).detach())


def scaled_without_gradient(m: nn.Sequential, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = m[0](x).exp()
    return m[2](m[1](m[0](x)) * scale)


def through_a_new_leaf(m: nn.Sequential, x: Tensor) -> Tensor:
    h = m[0](x).detach().requires_grad_()
    return m[2](m[1](m[0](x)) * torch.tanh(h) ** 3)


def added_in_place_to_a_constant(m: nn.Sequential, x: Tensor) -> Tensor:
    y = m[0](x).detach()
    y.add_(m[0](x))
    return m[2](y.mul_(2).tanh_())


def hard_choice(m: nn.Sequential, x: Tensor) -> Tensor:
    soft = m[0](x).softmax(-1)
    return m[2]((F.one_hot(soft.argmax(-1), 4) - soft).detach() + soft)


STOPPED: dict[str, Forward] = {
    "detach()": lambda m, x: m[2](m[1](m[0](x)).detach() * m[1](m[0](x))),
    "no_grad()": scaled_without_gradient,
    ".data": lambda m, x: m[2](m[1](m[0](x) * m[0].weight.data.sum())),
    "a parameter used through .data only": lambda m, x: m[2](m[1](F.linear(x, m[0].weight.data, m[0].bias))),
    "straight-through rounding": rounded_straight_through,
    "straight-through choice": hard_choice,
    "a new leaf": through_a_new_leaf,
    "in place on what was detached": added_in_place_to_a_constant,
}


@pytest.mark.parametrize("forward", STOPPED.values(), ids=STOPPED)
def test_gradients_stop_where_autograd_stops_them(forward: Forward) -> None:
    prepared_problem = problem(mlp(), labeled(5), loss_of(forward))
    assert disagreement(prepared_problem, TracedEngine(prepared_problem)) < 1e-14


def test_the_check_catches_a_trace_that_ignores_a_stopped_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace.Recorder, "_stopped", lambda self, value: value)
    prepared_problem = problem(mlp(), labeled(5), loss_of(STOPPED["detach()"]))
    engine = TracedEngine(prepared_problem)
    assert disagreement(prepared_problem, engine) > 1e-3
    with pytest.raises(EngineMismatch, match=r"block '0.weight' differ from autograd's"):
        measure(prepared_problem, engine)


def test_the_check_works_where_the_model_insists_on_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace.Recorder, "_stopped", lambda self, value: value)

    def loss_fn(m: nn.Sequential, batch: tuple[Tensor, Tensor]) -> Tensor:
        if m[0].weight.dtype != torch.float64:
            raise TypeError("float64 only")
        return loss_of(STOPPED["detach()"])(m, batch)

    prepared_problem = problem(mlp(), labeled(5), loss_fn)
    with pytest.raises(EngineMismatch):
        measure(prepared_problem, TracedEngine(prepared_problem))


def test_the_check_catches_a_hook_that_scales_gradients() -> None:
    """Autograd runs the hook again in the second derivative, which a trace of the first cannot know."""

    def hooked(m: nn.Sequential, x: Tensor) -> Tensor:
        h = m[0](x)
        h.register_hook(lambda gradient: gradient * h.detach().cos())
        return m[2](m[1](h))

    prepared_problem = problem(mlp(), labeled(5), loss_of(hooked))
    with pytest.raises(EngineMismatch):
        measure(prepared_problem, TracedEngine(prepared_problem))


CLOSURES: dict[str, Callable[[nn.Module, Any], Tensor]] = {
    "torch.func": lambda m, b: vmap(grad(lambda x: m(x[None])[0].square().sum()))(b[0]).square().mean(),
    "torch.func and detach()": lambda m, b: grad(lambda x: (m(x).detach() * m(x)).square().sum())(b[0]).square().mean(),
    "gradient penalty": lambda m, b: (
        torch.autograd.grad(m(b[0]).square().sum(), m[0].weight, create_graph=True)[0].square().sum()
    ),
    "a gradient taken as constant": lambda m, b: (
        torch.autograd.grad(m(b[0]).square().sum(), m[0].weight, retain_graph=True)[0] * m[0].weight.sin()
    ).sum(),
    "log-sigmoid, whose by-product is saved": lambda m, b: F.logsigmoid(m(b[0])).mean(),
    "views, sorting and empty tensors": lambda m, b: (
        torch.cat([m(b[0])[:, :0], m(b[0]).flip(1).cumsum(1).sort(1)[0].unfold(1, 2, 1).sum(-1)], 1).tanh().mean()
    ),
    "expanded and reversed data": lambda m, b: m(b[0][:1].expand(4, 3).flip(0)).tanh().mean(),
    "a number that is only read": lambda m, b: (m(b[0]).tanh().mean(), m(b[0]).mean().item())[0],
    "copy_ that broadcasts": lambda m, b: (torch.empty(5, 3).copy_(m(b[0]).tanh().mean(0)) * b[0]).square().sum(),
}


@pytest.mark.parametrize("loss_fn", CLOSURES.values(), ids=CLOSURES)
def test_closures(loss_fn: Callable[[nn.Module, Any], Tensor]) -> None:
    prepared_problem = problem(mlp(), labeled(5), loss_fn)
    assert disagreement(prepared_problem, TracedEngine(prepared_problem)) < 1e-13


def test_parameters_of_mixed_dtypes() -> None:
    model = mlp()
    model[2].float()
    prepared_problem = problem(model, labeled(5), loss_of(lambda m, x: m[2](m[1](m[0](x)).float())))
    assert disagreement(prepared_problem, TracedEngine(prepared_problem)) < 1e-6


# Refused


class Sinh(torch.autograd.Function):
    """A Function with a backward of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cosh()


def written_in_part(m: nn.Sequential, x: Tensor) -> Tensor:
    h = m[1](m[0](x)).clone()
    h.diagonal().mul_(2)
    return m[2](h)


def looks_at_an_activation(m: nn.Sequential, x: Tensor) -> Tensor:
    h = m[0](x)
    return m[2](h.tanh() if h.sum() > -1e9 else h)


REFUSED: dict[str, tuple[Forward, str]] = {
    "a Function of one's own": (lambda m, x: m[2](Sinh.apply(m[0](x))), "torch.autograd.Function has a derivative"),
    "a view written in place": (written_in_part, "in place"),
    "an activation looked at": (looks_at_an_activation, "cannot be traced"),
    "complex numbers": (lambda m, x: m[2](torch.fft.fft(m[0](x)).abs()), "complex numbers"),
    "memory order": (lambda m, x: m[2](m[1](m[0](x)).t().clone().as_strided((5, 4), (1, 5))), "in memory|in place"),
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_traced_is_refused_and_auto_takes_autograd(
    forward: Forward, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = mlp(), labeled(5)
    with pytest.raises(NotTraceable, match=reason):
        TracedEngine(problem(model, data, loss_of(forward)))
    options: dict[str, Any] = {"num_probes": 1, "num_steps": 2}
    with pytest.raises(NotImplementedError, match=rf"engine='traced' cannot be had: .*({reason})"):
        blockhess.spectrum(model, data, loss_of(forward), engine="traced", **options)
    monkeypatch.setattr("blockhess.run.plan.TRACE_SECONDS", -1.0)  # tracing always pays
    found = blockhess.spectrum(model, data, loss_of(forward), engine="auto", **options)
    assert found.provenance["engine"] == "autograd"
    assert "no trace: " in found.provenance["plan"]["why"]


def test_auto_traces_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("blockhess.run.plan.TRACE_SECONDS", -1.0)
    found = blockhess.spectrum(mlp(), labeled(5), nn.CrossEntropyLoss(), num_probes=1, num_steps=2)
    assert found.provenance["engine"] == "traced"


# Batches


def branches_by_item(m: nn.Sequential, x: Tensor) -> Tensor:
    return m[2](m[0](x).tanh() if float(x.sum()) > 0 else m[0](x).sin())


def branches_by_numpy(m: nn.Sequential, x: Tensor) -> Tensor:
    return m[2](m[0](x).tanh() if x.numpy().sum() > 0 else m[0](x).sin())


@pytest.mark.parametrize("forward", [branches_by_item, pytest.param(branches_by_numpy, marks=pytest.mark.slow)])
def test_batches_of_one_shape_that_take_different_branches(forward: Forward) -> None:
    x, y = labeled(5)
    prepared_problem = problem(mlp(), [(x.abs(), y), (-x.abs(), y), (x.abs() / 2, y)], loss_of(forward))
    assert disagreement(prepared_problem, TracedEngine(prepared_problem)) < 1e-14


class Held:
    """A batch whose tensors only the loss knows."""

    def __init__(self, n: int) -> None:
        pair = labeled(n)
        self.read = lambda: pair

    def __repr__(self) -> str:
        return "Held"


@dataclass
class Pair:
    x: Tensor
    y: Tensor


@pytest.mark.parametrize(
    ("make_data", "loss_fn", "traces"),
    [
        (lambda: [labeled(n) for n in (4, 4, 3, 4)], nn.CrossEntropyLoss(), 2),
        pytest.param(
            lambda: [labeled(9), labeled(9)],
            lambda m, b: m(b[0][b[0][:, 0] > 0]).square().mean(),
            2,
            marks=pytest.mark.slow,
        ),
        (lambda: [Held(4), Held(4)], lambda m, b: (F.cross_entropy(m(b.read()[0]), b.read()[1]), 4), 2),
        (lambda: [Pair(*labeled(n)) for n in (4, 4, 3)], lambda m, b: F.cross_entropy(m(b.x), b.y), 2),
        (lambda: ["tanh", "sin"], lambda m, b: (getattr(m(torch.ones(2, 3)), b)().sum(), 1), 2),
    ],
    ids=["two shapes", "masks", "hidden", "objects", "texts"],
)
def test_a_trace_serves_batches_of_its_kind_only(make_data: Any, loss_fn: Any, traces: int) -> None:
    prepared_problem = problem(mlp(), make_data(), loss_fn)
    engine = TracedEngine(prepared_problem)
    assert disagreement(prepared_problem, engine) < 1e-13
    assert len(engine._traces) == traces


def test_a_program_may_run_single_and_batched() -> None:
    model = SelfAttention()
    with fixed_state(model):
        prepared_problem = problem(model, (torch.randn(2, 3, 4), torch.randint(2, (2,))), nn.CrossEntropyLoss())
        engine = TracedEngine(prepared_problem, rows=3)
        engine.prepare(0)
        v = torch.randn(3, prepared_problem.dims[0])
        together = product(engine, 0, v)
        engine.rows = 1
        for row in range(3):
            torch.testing.assert_close(product(engine, 0, v[row : row + 1])[0], together[row], rtol=1e-9, atol=1e-12)
        engine.rows = 3
        assert torch.equal(product(engine, 0, v), together)


def test_multiples_of_a_constant_are_one_constant() -> None:
    info = TensorInfo(torch.Size([3]), torch.float32, torch.device("cpu"))
    constants = GraphBuilder()
    program, mul = ProgramBuilder(constants), torch.ops.aten.mul.Tensor
    t, c, d = program.tangent(info), constants.placeholder("c", info), constants.placeholder("d", info)
    ((_, (scalar, product)),) = program.call(mul, (program.call(mul, (t, c), {}, info), d), {}, info).terms
    multiple = constants.call(mul, (constants.call(mul, (d, 3.0)), constants.call(torch.ops.aten.neg.default, (c,))))
    ((_, (other_scalar, same)),) = program.call(mul, (t, multiple), {}, info).terms
    assert (scalar, other_scalar) == (1.0, -3.0)
    assert same is product
    ((_, (_, different)),) = program.call(mul, (t, constants.call(mul, (d, d))), {}, info).terms
    assert different is not product


def test_warnings_of_torch_are_no_errors() -> None:
    code = (
        "import blockhess, torch; m = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh()); "
        "x = torch.ones(2, 3), torch.ones(2, 2); "
        "print(blockhess.spectrum(m, x, torch.nn.MSELoss(), num_probes=1, num_steps=2, engine='traced', progress=False)"
        ".provenance['engine'])"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning"]
    done = subprocess.run([*command, "-c", code], capture_output=True, text=True)
    assert done.stdout == "traced\n", done.stderr
