"""Spectra of random problems are right, or refused; and whatever were wrong would be noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import blockhess
from tests.random_problems import data, losses, models, modules
from tests.random_problems.judge import Kink, OracleError, fix, judge, truth, twin_of
from tests.random_problems.problem import Problem, build

DRAWS, PART = 2000, 50


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("first", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(PART, DRAWS, PART))])
def test_spectra_of_random_problems_are_right_or_refused(first: int) -> None:
    outcomes, failures = Counter[str](), []
    for seed in range(first, first + PART):
        problem, verdict = judge(seed)
        outcomes[verdict.outcome] += 1
        if not verdict.good:
            again = f"python -m tests.random_problems --first {seed} --draws 1"
            failures.append(f"{verdict.outcome}: {verdict.text}\n    {problem}\n    {again}")
    assert not failures, "\n".join(failures)
    assert outcomes["right"] > 0.4 * PART and outcomes["kink"] < 0.1 * PART, outcomes


@pytest.mark.slow
def test_every_kind_is_drawn() -> None:
    kinds = Counter[str]()
    with torch.random.fork_rng(devices=[]):
        for seed in range(DRAWS):
            kinds.update(build(seed).kinds)
    tables = (
        models.STEMS, models.BLOCKS, models.OF_SEQUENCES, models.OF_ROWS, models.EMBEDDINGS, models.ACTIVATIONS,
        modules.FAULTS, modules.SOUND, losses.LOSSES, *losses.CRITERIA.values(), data.CONTAINERS, data.COLLECTIONS,
        data.LOADERS,
    )  # fmt: skip
    for table in tables:
        for name in table.keys() - {"fault", "sound map"}:
            assert kinds[name] > 2, name


# Negative controls: of the spectra.


def changed(change: Callable[[Any], Any]) -> Callable[..., Any]:
    return lambda *given, **options: change(blockhess.spectrum(*given, **options))


def scaled(spectra: Any, factor: float = 1.01) -> Any:
    quadrature = replace(spectra.quadrature, nodes=spectra.quadrature.nodes * factor)
    return blockhess.Spectra(spectra.blocks, quadrature, spectra.provenance)


def of_first_block(spectra: Any) -> Any:
    nodes = spectra.quadrature.nodes.clone()
    nodes[:, 0] *= 1.01
    return blockhess.Spectra(spectra.blocks, replace(spectra.quadrature, nodes=nodes), spectra.provenance)


def called_zero(spectra: Any) -> Any:
    blocks = tuple(replace(block, note="zero within HVP error") for block in spectra.blocks)
    return blockhess.Spectra(blocks, spectra.quadrature, spectra.provenance)


def of_another_loss(spectra: Any) -> Any:
    made = spectra.provenance | {"loss_value": spectra.provenance["loss_value"] + 0.1}
    return blockhess.Spectra(spectra.blocks, spectra.quadrature, made)


def raising(error: Exception) -> Callable[..., Any]:
    def compute(*given: Any, **options: Any) -> Any:
        raise error

    return compute


SIMPLE = frozenset({"vectors", "Tanh", "float32 model", "dtype None", "one block", "Linear", "no scale", "closure"})
SIMPLE |= {"one batch", "tuple", "no wrapper", "engine auto", "blocks of parameters", "nothing around", "numbers"}


@pytest.mark.parametrize(
    ("compute", "outcome"),
    [
        (changed(scaled), "wrong number"),
        (changed(of_first_block), "wrong number"),
        (changed(called_zero), "called zero"),
        (changed(of_another_loss), "wrong loss"),
        (raising(ValueError("spectrum: no")), "refused without a reason"),
        (raising(RuntimeError("mat1 and mat2")), "not in the package's words"),
        (raising(ValueError("spectrum: no\nno")), "more than one line"),
    ],
)
def test_wrong_results_and_errors_are_seen(compute: Callable[..., Any], outcome: str) -> None:
    for seed in range(3):
        assert judge(seed, SIMPLE)[1].outcome == "right"
        assert judge(seed, SIMPLE, compute)[1].outcome.startswith(outcome)


def weight(model: Any) -> None:
    model[0][0].weight.data[0, 0] *= 1 + 2e-7


def replaced_weight(model: Any) -> None:
    model[0][0].weight = torch.nn.Parameter(model[0][0].weight.detach().clone())


def replaced_storage(model: Any) -> None:
    model[0][0].weight.data = model[0][0].weight.data.clone()


def grad(model: Any) -> None:
    model[0][0].weight.grad = torch.zeros(2, 3)


def hook(model: Any) -> None:
    model[0].register_forward_hook(lambda *_: None)


CHANGES: dict[str, Callable[[Any], object]] = {
    "weight": weight,
    "replaced weight": replaced_weight,
    "replaced storage": replaced_storage,
    "grad": grad,
    "hook": hook,
    "mode": lambda model: model[1].train(not model[1].training),
    "frozen": lambda model: model[0][0].weight.requires_grad_(False),
    "attribute": lambda model: setattr(model[0], "extra", torch.ones(1)),
    "random numbers": lambda model: torch.randn(1),
    "default dtype": lambda model: torch.set_default_dtype(torch.float64),
    "switch": lambda model: torch.backends.mha.set_fastpath_enabled(False),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_changed_model_is_seen(change: Callable[[Any], object]) -> None:
    def compute(model: Any, *given: Any, **options: Any) -> Any:
        spectra = blockhess.spectrum(model, *given, **options)
        change(model)
        return spectra

    try:
        assert judge(0, SIMPLE, compute)[1].outcome == "model changed"
    finally:
        torch.set_default_dtype(torch.float32)
        torch.backends.mha.set_fastpath_enabled(True)


# Negative controls of the truth: the faults are faults, their sound neighbors are none.

FLOAT64 = (SIMPLE - {"float32 model", "Linear", "closure"}) | {"float64 model"}
FAULTS = {name: FLOAT64 | {"fault", name, "closure"} for name in modules.FAULTS}
FAULTS |= {name: FLOAT64 | {"Linear", name} for name in losses.FAULTS}
FAULTS |= {name: FLOAT64 | {name, "closure"} for name in ("edits of gradients", "layer under no_grad")}
SOUND = {name: FLOAT64 | {"sound map", name, "closure"} for name in modules.SOUND if "float32" not in name}
SOUND |= {"looking hooks": FLOAT64 | {"looking hooks", "closure"}}


def by_autograd(problem: Problem) -> torch.Tensor:
    """The derivative of the gradient by autograd, which a fault makes wrong."""
    fix(problem.inner, "eval", lambda: None)
    named = [p for p in problem.inner.parameters() if p.requires_grad]
    found = torch.autograd.grad(problem.total(problem.inner), named, create_graph=True, materialize_grads=True)
    gradient = torch.cat([g.flatten() for g in found])
    rows = []
    for entry in gradient:
        second = [None] * len(named)
        if entry.requires_grad:
            second = torch.autograd.grad(entry, named, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(named, second)])
        )
    return torch.stack(rows)


def difference(problem: Problem) -> float:
    """Between autograd's Hessian and the truth, relative to it."""
    right = truth(twin_of(problem)).hessian
    return float((by_autograd(problem) - right).abs().max() / right.abs().max())


@pytest.mark.parametrize("forced", FAULTS.values(), ids=FAULTS)
def test_faults_are_faults(forced: frozenset[str]) -> None:
    problem = build(0, forced=forced)
    assert problem.refusals
    assert difference(problem) > 1e-2


@pytest.mark.parametrize("forced", SOUND.values(), ids=SOUND)
def test_sound_neighbors_are_sound(forced: frozenset[str]) -> None:
    for seed in range(2):
        problem = build(seed, forced=forced)
        assert not problem.refusals
        assert difference(problem) < 1e-7


def test_a_gradient_that_is_not_that_of_the_loss_is_no_truth() -> None:
    for name in ("gradient reversal", "detached factor", "values changed through .data"):
        with pytest.raises((OracleError, Kink)):
            truth(build(0, forced=FAULTS[name]))
