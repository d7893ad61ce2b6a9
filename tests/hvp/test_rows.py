"""Products of all blocks and probes by one program: what else is computed with a row does not matter to it."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess.hvp import AutogradEngine, BlockOperator, TracedEngine
from blockhess.hvp.traced.rows import Pool, Recording, Value
from blockhess.problem.blocks import BlockSpec, ParameterSlice
from blockhess.problem.model_state import fixed_state
from blockhess.problem.problem import Problem
from tests.helpers.dense_hessian import problem
from tests.helpers.model_zoo import ZOO
from tests.helpers.tiny_models import SelfAttention, labeled, mlp
from tests.hvp.test_engines import SLOW, TOLERANCE, prepared_problem

pytestmark = pytest.mark.usefixtures("float64_models")

TRACED = [name for name in ZOO if name != "control flow on activations"]
ALL = 1000  # rows of one evaluation: those of all blocks and probes


def reference(problem: Problem, vectors: Tensor) -> list[Tensor]:
    """H_l v of every block by autograd."""
    return list(BlockOperator(problem, AutogradEngine(problem))(vectors).split(problem.dims, dim=1))


def worst_error(
    problem: Problem,
    engine: TracedEngine,
    vectors: Tensor,
    expected: Sequence[Tensor],
    numbers: Sequence[int],
    seed: int,
) -> float:
    """The largest error of the products of some blocks in any order, of which random recurrences are finished."""
    operator = BlockOperator(problem, engine, numbers)
    parts = vectors.split(problem.dims, dim=1)
    finished = torch.rand(len(vectors), len(numbers), generator=torch.Generator().manual_seed(seed)) < 0.4 * (seed > 0)
    operator.mark_finished(finished)
    found = operator(torch.cat([parts[l] for l in numbers], 1)).split(operator.dims, dim=1)
    # The rounding of what is added up to zero is as large as the products of other blocks.
    noise = 10 * torch.finfo(problem.dtype).eps * max(float(e.norm()) for e in expected) / TOLERANCE[problem.dtype]
    worst = 0.0
    for l, over, products in zip(numbers, finished.T, found):
        assert not products[over].any()
        right = expected[l][~over]
        worst = max(worst, float((products[~over] - right).norm()) / max(float(right.norm()), noise))
    return worst


def layouts(count: int, seed: int = 0) -> list[list[int]]:
    """All blocks, all in another order, half of them, and one."""
    shuffled = random.Random(seed).sample(range(count), count)
    return [list(range(count)), shuffled, shuffled[: (count + 1) // 2], shuffled[:1]]


def check_layouts(problem: Problem, engine: TracedEngine, tolerance: float) -> None:
    vectors = torch.randn(3, sum(problem.dims), dtype=problem.dtype)
    expected = reference(problem, vectors)
    for rows in (1, 3, ALL):
        engine.rows = rows
        for seed, numbers in enumerate(layouts(len(problem.blocks))):
            assert worst_error(problem, engine, vectors, expected, numbers, seed) <= tolerance, (rows, numbers)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TRACED]
)
def test_any_rows_of_any_blocks(name: str, dtype: torch.dtype) -> None:
    with prepared_problem(name) as problem:
        if dtype == torch.float32:
            if "checkpointing" in name or len(problem.batches) > 1:
                pytest.skip("no other precision, as in test_engines.py")
            if name == "LSTM":
                pytest.skip("oneDNN's LSTM, which torch takes in float32, has no tangent")
            problem = problem.in_dtype(dtype)
        # Transformers models compute their loss in float32 whatever their weights are.
        tolerance = TOLERANCE[torch.float32 if ZOO[name].transformers else dtype]
        check_layouts(problem, TracedEngine(problem), tolerance)


def qkv(model: nn.Module) -> BlockSpec:
    return {**blockhess.heads(model, "qkv.weight", 2, roles=("q", "k", "v")), "bias": "qkv.bias"}


KINDS: dict[str, tuple[str, Any]] = {
    "full": ("attention", "full"),
    "layers": ("encoder layer", [(r"self_attn", "attention"), (r"linear(\d)", r"linear \1"), (r"norm", "norms")]),
    "heads": ("attention", qkv),
    "slices that overlap": (
        "mlp",
        {
            "rows": ParameterSlice("0.weight", 1, 3),
            "column": ["2.bias", ParameterSlice("0.weight", 2, 3, dim=1)],
            "rest": ["0.bias", "2.weight"],
        },
    ),
    "tied": ("tied embedding", {"table": "embedding.weight", "mix": ["mix.weight", "mix.bias"]}),
    "slices of a tied parameter": (
        "tied embedding",
        {f"token {i}": ParameterSlice("embedding.weight", i, i + 1) for i in range(4)},
    ),
}


@pytest.mark.parametrize(("name", "blocks"), KINDS.values(), ids=KINDS)
def test_all_kinds_of_blocks(name: str, blocks: Any) -> None:
    if callable(blocks):
        blocks = blocks(ZOO[name].make()[0])
    with prepared_problem(name, blocks) as problem:
        check_layouts(problem, TracedEngine(problem), TOLERANCE[torch.float64])


# Memory


BUSY = ("encoder layer", "BatchNorm residual, eval", "tied embedding", "mixture of experts")


def poison(engine: TracedEngine) -> None:
    """Overwrite all buffers with NaN."""
    for buffer in engine._pool._all:
        buffer.fill_(255)  # of any floating-point type


@pytest.mark.parametrize("name", BUSY)
def test_no_evaluation_reads_what_another_left(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Pool.take

    def poisoned(self: Pool, *args: Any) -> Tensor:
        return take(self, *args).fill_(255)

    with prepared_problem(name) as problem:
        plain, engine = TracedEngine(problem, rows=ALL), TracedEngine(problem, rows=ALL)
        vectors = torch.randn(3, sum(problem.dims))
        parts = vectors.split(problem.dims, dim=1)
        jobs = []
        for numbers in layouts(len(parts)):
            v = torch.cat([parts[l] for l in numbers], 1)
            jobs.append((BlockOperator(problem, engine, numbers), v, BlockOperator(problem, plain, numbers)(v)))
        monkeypatch.setattr(Pool, "take", poisoned)  # first evaluations find NaN in every buffer that they take
        for operator, v, expected in jobs:
            assert torch.equal(operator(v), expected)
        monkeypatch.undo()
        for operator, v, expected in random.Random(0).choices(jobs, k=24):
            poison(engine)
            assert torch.equal(operator(v), expected)
            assert torch.equal(operator(v), expected)


def test_buffers_that_change_during_an_evaluation_would_be_noticed() -> None:
    with prepared_problem("encoder layer") as problem:
        engine = TracedEngine(problem, rows=ALL)
        operator, v = BlockOperator(problem, engine), torch.randn(2, sum(problem.dims))
        assert operator(v).isfinite().all()
        (evaluation,) = engine._traces[0]._evaluations.values()
        evaluation._steps.insert(len(evaluation._steps) // 2, lambda slots: poison(engine))
        assert operator(v).isnan().any()


@pytest.mark.parametrize("name", [*BUSY, "attention", "PINN"])
def test_nothing_of_a_recording_is_kept(name: str) -> None:
    with prepared_problem(name) as problem:
        engine = TracedEngine(problem, rows=2)
        BlockOperator(problem, engine)(torch.randn(3, sum(problem.dims)))
        gc.collect()
        assert not [o for o in gc.get_objects() if type(o) in (Recording, Value)]
        assert engine._traces[0]._evaluations


@pytest.mark.parametrize("name", BUSY)
@pytest.mark.parametrize("value", [1.0, torch.nan])
def test_a_block_depends_on_its_own_vectors_only(name: str, value: float) -> None:
    with prepared_problem(name) as problem:
        operator = BlockOperator(problem, TracedEngine(problem, rows=ALL))
        v = torch.randn(3, sum(problem.dims))
        before = operator(v).split(problem.dims, dim=1)
        for changed in range(len(problem.dims)):
            for probe in (0, 2):
                other = v.clone()
                other.split(problem.dims, dim=1)[changed][probe] = value
                after = operator(other).split(problem.dims, dim=1)
                for l, (a, b) in enumerate(zip(before, after)):
                    same = [p for p in range(3) if (l, p) != (changed, probe)]
                    assert torch.equal(a[same], b[same]), (problem.infos[changed].name, problem.infos[l].name)
                if before[changed].any():
                    assert not torch.equal(before[changed][probe], after[changed][probe])


def test_a_program_that_mixes_rows_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = Recording._evaluate

    def mixed(self: Recording, node: Any) -> Any:
        value = evaluate(self, node)
        if not isinstance(value, list) and len(value.tensor) > 1:
            value.tensor[1:].add_(value.tensor[:-1].clone(), alpha=1e-3)
        return value

    monkeypatch.setattr(Recording, "_evaluate", mixed)
    with pytest.raises(AssertionError):
        test_a_block_depends_on_its_own_vectors_only("tied embedding", 1.0)


# Batches


def attention_batches(*sizes: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(n, tokens, 4), torch.randint(2, (n,))) for n, tokens in sizes]


@pytest.mark.parametrize(
    ("model", "data"),
    [
        (mlp, lambda: [labeled(n) for n in (4, 4, 3, 5)]),
        (SelfAttention, lambda: attention_batches((2, 3), (3, 2), (2, 3))),
    ],
    ids=["mlp", "attention"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batches_of_several_shapes(model: Any, data: Any, dtype: torch.dtype) -> None:
    batches, net = [(x.to(dtype), y) for x, y in data()], model().to(dtype)
    with fixed_state(net):
        prepared = problem(net, batches, nn.CrossEntropyLoss())
        kept, freed = TracedEngine(prepared), TracedEngine(prepared, retain=False)
        check_layouts(prepared, kept, TOLERANCE[dtype])
        v = torch.randn(3, sum(prepared.dims), dtype=dtype)
        for rows in (1, 3, ALL):
            kept.rows = freed.rows = rows
            expected = BlockOperator(prepared, kept)(v)
            for _ in range(2):
                assert torch.equal(BlockOperator(prepared, freed)(v), expected)


def test_fewer_rows_take_no_more_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    data = torch.randn(40, 3, dtype=torch.float64), torch.randint(3, (40,))
    prepared_problem = problem(model, data, nn.CrossEntropyLoss())
    engine = TracedEngine(prepared_problem, rows=60)
    operator = BlockOperator(prepared_problem, engine)
    v = torch.randn(10, sum(operator.dims), dtype=torch.float64)
    expected = operator(v)
    before = engine._pool.nbytes
    finished = torch.zeros(10, 6, dtype=torch.bool)
    for recurrence in torch.randperm(60)[:50:5]:
        finished.view(-1)[recurrence] = True
        operator.mark_finished(finished)
        found = operator(v)
        for l, (product, right) in enumerate(zip(found.split(operator.dims, 1), expected.split(operator.dims, 1))):
            running = ~finished[:, l]
            torch.testing.assert_close(product[running], right[running], rtol=1e-11, atol=1e-13)
    assert engine._pool.nbytes == before


def test_a_layer_without_samples() -> None:
    """As an expert to which no token is sent."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(3, 4), nn.Linear(4, 2)]).double()

    def loss_fn(m: Any, x: Tensor) -> Tensor:
        h = torch.tanh(m[0](x))
        return torch.cat([m[1](h), m[1](h[:0]).exp()]).square().mean()

    given = problem(model, torch.randn(5, 3, dtype=torch.float64), loss_fn)
    check_layouts(given, TracedEngine(given), TOLERANCE[torch.float64])
