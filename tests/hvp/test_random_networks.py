"""Linear programs of random small networks against autograd, with random blocks, rows and finished recurrences."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from blockhess.hvp import AutogradEngine, BlockOperator, NotTraceable, TracedEngine
from blockhess.hvp.traced.rows import Recording
from blockhess.problem.problem import Problem
from tests.helpers.dense_hessian import problem
from tests.helpers.random_networks import OPERATIONS, Network, Step, loss

pytestmark = pytest.mark.usefixtures("float64_models")
EPS = torch.finfo(torch.float64).eps
SMALL = st.integers(0, 3)

steps = st.builds(Step, st.sampled_from(OPERATIONS), SMALL, SMALL, st.integers(0, 63))
cases = st.fixed_dictionaries(
    {
        "steps": st.lists(steps, min_size=1, max_size=9),
        "shape": st.sampled_from([(3,), (2, 3), (1, 4), (2, 3, 2), (2, 2, 3, 3)]),
        "choice": st.integers(0, 11),
        "groups": st.lists(SMALL, min_size=1, max_size=6),
        "rows": st.sampled_from([1, 2, 3, 5, 1000]),
        "finished": st.integers(0, 2**12 - 1),
        "seed": st.integers(0, 7),
    }
)


def make(case: dict[str, Any]) -> Problem | None:
    """The problem of a case, None if its loss is constant or too large."""
    torch.manual_seed(case["seed"])
    x = torch.randn(case["shape"])
    model = Network([Step("linear", 0, 0, case["choice"]), *case["steps"]], x)
    names = [name for name, _ in model.named_parameters()]
    groups: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        groups.setdefault(f"group {case['groups'][i % len(case['groups'])]}" if i else name, []).append(name)
    try:
        made = problem(model, x, lambda m, batch: (loss(m(batch), case["choice"]), 1), blocks=groups)
    except ValueError as error:
        assert any(text in str(error) for text in ("depends on none", "finite loss", "blocks", "no gradient")), error
        return None
    return made


def check(case: dict[str, Any]) -> str:
    """Compare the products of a case with those of autograd; say what became of it."""
    made = make(case)
    if made is None:
        return "constant or infinite"
    expected_operator = BlockOperator(made, AutogradEngine(made))
    vectors = torch.randn(3, sum(made.dims))
    finished = torch.tensor(
        [[case["finished"] >> (3 * l + p) & 1 for l in range(len(made.dims))] for p in range(3)]
    ).bool()
    expected_operator.mark_finished(finished)
    expected = expected_operator(vectors)
    gradient = max(float(g.abs().max()) for g in made.gradients(0, create_graph=False).values())
    scale = max(float(expected.abs().max()), gradient, 1e-3)  # of terms that may cancel
    if not math.isfinite(scale) or scale > 1e12:
        return "constant or infinite"
    try:
        engine = TracedEngine(made, rows=case["rows"])
    except NotTraceable as error:
        return f"refused: {error}"
    operator = BlockOperator(made, engine)
    operator.mark_finished(finished)
    for _ in range(2):
        found = operator(vectors)
        error = float((found - expected).abs().max())
        assert error <= 1e6 * EPS * scale, (error, scale)
    return "equal"


def known(steps: list[Step], shape: tuple[int, ...], **options: Any) -> dict[str, Any]:
    return {
        "steps": steps,
        "shape": shape,
        "choice": 0,
        "groups": [0, 1],
        "rows": 1000,
        "finished": 0,
        "seed": 0,
    } | options


FOUND = {
    "a batched product of both factors": known(
        [Step("embedding", 0, 0, 0), Step("bmm with a parameter", 0, 0, 0)], (3,), groups=[0], rows=3
    ),
    "parts of a split along the first dimension": known(
        [Step("pooled", 0, 0, 0), Step("embedding", 0, 0, 0), Step("attention", 0, 0, 0), Step("split", 0, 0, 42)], (3,)
    ),
    "operands of other blocks than the result": known(
        [Step("attention", 0, 0, 0), Step("used often", 0, 0, 0), Step("linear", 1, 0, 1)],
        (3,),
        choice=1,
        groups=[1, 1, 1, 2, 0, 3],
        finished=932,
    ),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_products_that_were_wrong_once(case: dict[str, Any]) -> None:
    assert check(case) == "equal"


def test_wrong_products_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Recording._evaluate

    def wrong(self: Recording, node: Any) -> Any:
        value = evaluate(self, node)
        if not isinstance(value, list):
            value.tensor.mul_(1 + 1e-6)
        return value

    monkeypatch.setattr(Recording, "_evaluate", wrong)
    for case in FOUND.values():
        with pytest.raises(AssertionError):
            check(case)


def test_products_of_random_networks() -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(cases)
    def run(case: dict[str, Any]) -> None:
        outcomes[check(case)] += 1

    run()
    assert outcomes["equal"] > 0.9 * sum(outcomes.values()), outcomes
