"""What a run will do: chosen from counts, within a memory budget, the same results whatever the budget."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import blockhess
from blockhess.cli.main import main
from blockhess.hvp import TracedEngine
from blockhess.hvp.differences import parameter_groups
from blockhess.problem.memory import budget_bytes
from blockhess.run import plan as planning
from blockhess.run.plan import Plan, make_plan
from tests.helpers.dense_hessian import problem
from tests.helpers.shard_accounts import Held
from tests.helpers.tiny_models import labeled, mlp


def planned(**options: Any) -> Plan:
    prepared_problem = problem(
        mlp().float(), tuple(t.float() if t.is_floating_point() else t for t in labeled(7)), nn.CrossEntropyLoss()
    )
    defaults = {"num_probes": 3, "num_steps": 5, "basis_dims": [0] * 4, "budget": 2**30}
    return make_plan(prepared_problem, **(defaults | options))[0]


def test_products_are_counted() -> None:
    # Blocks of 12, 4, 12, 3 elements; Lanczos makes 3 x min(5, dim) products, writing out dim.
    assert planned(engine="autograd").hvps == 3 * (5 + 4 + 5 + 3)
    auto = planned()
    assert auto.exact == (True, True, True, True) and auto.hvps == 12 + 4 + 12 + 3
    assert planned(num_probes=1).exact == (False, False, False, False)
    assert planned(num_probes=2).exact == (False, True, False, True)
    assert planned(engine="exact", num_probes=1).exact == (True, True, True, True)


def test_the_engine_follows_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    short = planned(num_probes=2)
    assert short.engine == "autograd" and "tracing would take" in short.why
    monkeypatch.setattr(planning, "TRACE_SECONDS", 1e-9)
    long = planned()
    assert long.engine == "traced" and "saves about" in long.why
    assert planned(engine="ggn").engine == "ggn" and planned(engine="ggn").traced


def test_vectors_multiplied_together_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"engine": "traced", "num_probes": 5}
    assert planned(**options).rows == 5 * 4
    monkeypatch.setattr(planning, "CACHE_BYTES", 1)
    assert planned(**options).rows == 1


def test_constants_are_kept_where_they_fit() -> None:
    prepared_problem = problem(mlp(), [labeled(64), labeled(64)], nn.CrossEntropyLoss())
    engine = TracedEngine(prepared_problem)
    one, both = (n * engine.constant_bytes + engine.tangent_bytes for n in (1, 2))
    options = {"engine": "traced", "num_probes": 1, "num_steps": 2, "basis_dims": [0] * 4}
    for room, kept in ((2 * both, True), (2 * both - 2, False), (2 * one, False)):
        plan, engine = make_plan(prepared_problem, budget=prepared_problem.copy_bytes + room, **options)
        assert (plan.retain, engine.retain) == (kept, kept)


def test_a_tolerance_plans_for_few_of_the_products() -> None:
    options = {"num_probes": 40, "num_steps": 5, "engine": "autograd"}
    assert len(planned(**options).checked) == 4
    assert len(planned(**options, least=(2, 1)).checked) < 4


@pytest.mark.parametrize("budget", [2**30, 2000, 800, 300])
def test_every_probe_of_every_block_is_in_one_pass(budget: int) -> None:
    room = 4 * 3 * 12  # float32 elements of one probe of the largest block
    sizes = [4 * 3 * d for d in (12, 4, 12, 3)]
    passes = planning._passes([0, 1, 2, 3], sizes, 3, max(budget // 2, room))
    done = [(first + p, l) for first, count, blocks in passes for p in range(count) for l in blocks]
    assert sorted(done) == [(p, l) for p in range(3) for l in range(4)]
    for _, count, blocks in passes:
        assert count * sum(sizes[l] for l in blocks) <= max(budget // 2, room)


def test_the_largest_blocks_come_first_where_not_all_fit() -> None:
    assert planning._passes([0, 1, 2, 3], [3, 5, 9, 4], 2, 9) == [
        (0, 1, (2,)), (1, 1, (2,)), (0, 1, (1, 3)), (1, 1, (1, 3)), (0, 1, (0,)), (1, 1, (0,))
    ]  # fmt: skip
    assert planning._passes([0, 1, 2, 3], [3, 5, 9, 4], 2, 21) == [(0, 1, (0, 1, 2, 3)), (1, 1, (0, 1, 2, 3))]


@pytest.mark.parametrize(("engine", "budget"), [("autograd", 50_000), ("traced", 200_000)])
def test_the_result_does_not_depend_on_the_memory_budget(engine: str, budget: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    data = (torch.randn(64, 3, dtype=torch.float64), torch.randint(3, (64,)))
    options = {"num_probes": 4, "num_steps": 4, "engine": engine, "reorthogonalize": "full"}
    whole = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), **options)
    least = 8 * (3 * 64 + 64 + 64 * 3 + 3) + 2 * 8 * (3 + 4) * 192  # the copy of the model, and twice one probe
    with pytest.raises(ValueError, match=r"memory_budget must be at least .* for one probe of block '0.weight', got"):
        blockhess.spectrum(model, data, nn.CrossEntropyLoss(), memory_budget=least - 1, **options)
    with pytest.warns(UserWarning, match=r"memory_budget must be about .* KiB for the smallest run of this job, got"):
        parts = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), memory_budget=budget, **options)
    assert parts.provenance["plan"]["batches"] > 1
    assert len(parts.provenance["plan"]["passes"]) > 1
    assert parts.names == whole.names
    for name in whole:
        m = int(whole[name].steps.max())
        assert torch.equal(parts[name].steps, whole[name].steps)
        torch.testing.assert_close(parts[name].nodes[:, :m], whole[name].nodes[:, :m], rtol=1e-9, atol=1e-12)
    assert whole.quadrature.block_ids == parts.quadrature.block_ids


def test_passes_alone_change_no_bit() -> None:
    torch.manual_seed(0)
    x, y = labeled(1)  # a batch of one sample cannot be cut
    options = {"num_probes": 4, "num_steps": 4, "engine": "autograd"}
    whole = blockhess.spectrum(mlp_of(0), (x, y), nn.CrossEntropyLoss(), **options)
    parts = blockhess.spectrum(mlp_of(0), (x, y), nn.CrossEntropyLoss(), memory_budget=1500, **options)
    assert len(parts.provenance["plan"]["passes"]) > len(whole.provenance["plan"]["passes"]) == 1
    for name in ("nodes", "weights", "alpha", "beta", "steps"):
        assert torch.equal(getattr(whole.quadrature, name), getattr(parts.quadrature, name))


def mlp_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return mlp()


@pytest.mark.parametrize(("text", "size"), [(5, 5), ("7", 7), ("2 KiB", 2048), ("1.5kB", 1500), ("6 GiB", 6 * 2**30)])
def test_budget_sizes(text: Any, size: int) -> None:
    assert budget_bytes(text, torch.device("cpu")) == size


@pytest.mark.parametrize("wrong", [0, -1, "0 GiB", "lots", "6 GB GB", True, 1.5j, ""])
def test_wrong_budgets(wrong: Any) -> None:
    with pytest.raises(ValueError, match="memory_budget must be"):
        budget_bytes(wrong, torch.device("cpu"))


def test_too_many_blocks_to_write_out() -> None:
    with pytest.raises(ValueError, match=r"memory_budget must be at least .* to write out 4 blocks \(engine='exact'\)"):
        planned(engine="exact", budget=1200)


def test_plan_runs_nothing_and_says_what_spectrum_then_does() -> None:
    model, data = mlp(), labeled(7)
    plan = blockhess.plan(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=3)
    made = blockhess.spectrum(model, data, nn.CrossEntropyLoss(), num_probes=2, num_steps=3).provenance
    assert made["hvps"] == plan.hvps and made["engine"] == plan.engine
    for part in ("engine", "blocks", "batches", "products", "memory", "checks"):
        assert part in str(plan)
    for options, text in (
        ({"seed": -1}, "seed must be"),
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of raise, mark, got 'ignore'"),
        ({"progress": "yes"}, "progress must be True, False or 'auto', got 'yes'"),
    ):
        with pytest.raises(ValueError, match=text):
            blockhess.plan(model, data, nn.CrossEntropyLoss(), **options)
    tolerant = blockhess.plan(model, data, nn.CrossEntropyLoss(), num_probes=3, num_steps=3, tol=0.1)
    assert 0 < tolerant.least_hvps < tolerant.hvps and plan.least_hvps == plan.hvps
    expected = f"about {tolerant.expected_hvps} (at least {tolerant.least_hvps}, at most {tolerant.hvps}) of one block"
    assert expected in str(tolerant) and plan.expected_hvps == plan.hvps
    with pytest.raises(TypeError, match="num_probe"):
        blockhess.plan(model, data, nn.CrossEntropyLoss(), num_probe=2)
    with pytest.raises(
        ValueError, match="engine must be one of auto, autograd, traced, ggn, difference, exact, got 'fast'"
    ):
        blockhess.plan(model, data, nn.CrossEntropyLoss(), engine="fast")


JOB = """
import torch
def job():
    return {"model": torch.nn.Linear(3, 2), "data": (torch.ones(4, 3), torch.ones(4, 2)), "loss_fn": torch.nn.MSELoss()}
"""


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "job.py"
    file.write_text(JOB)
    assert main(["plan", f"{file}:job", "--probes", "2", "--steps", "4", "--engine", "autograd"]) == 0
    assert f"{2 * (4 + 2)} of one block" in capsys.readouterr().out
    assert main(["plan", f"{file}:job", "--tol", "2"]) == 2
    assert "tol must be above 0 and at most 1" in capsys.readouterr().err
    assert main(["plan", f"{file}:job", "--memory-budget", "much"]) == 2
    assert "memory_budget" in capsys.readouterr().err


def test_memory_is_that_of_the_largest_batch_and_of_blocks_written_out() -> None:
    small, large = labeled(1), labeled(1000)
    one, two, other = (
        problem(mlp(), data, nn.CrossEntropyLoss()) for data in ([large], [small, large], [large, small])
    )
    assert two.graph_bytes == pytest.approx(one.graph_bytes, rel=0.5) == other.graph_bytes
    tables = 2 * 4 * 8 * 3 * 4 * 12  # probes, blocks, steps
    assert planned(engine="exact").vector_bytes == 4 * (12**2 + 4**2 + 12**2 + 3**2) + 24 * 12**2 + tables


def test_checks_take_smaller_groups_of_parameters_where_memory_is_small() -> None:
    options = {"num_probes": 2, "num_steps": 5, "engine": "autograd"}
    wide = problem(nn.Sequential(*(nn.Linear(32, 32) for _ in range(8))), torch.randn(2, 32), lambda m, b: m(b).sum())
    plans = [make_plan(wide, basis_dims=[0] * 16, budget=budget, **options)[0] for budget in (2**30, 300_000, 60_000)]
    assert [plan.largest_group for plan in plans] == [2**25, 2**12, 2**11]
    groups = [len(parameter_groups(wide, plan.largest_group)) for plan in plans]
    assert [plan.groups for plan in plans] == groups  # all parameters move
    assert [plan.peak_bytes <= plan.memory_budget for plan in plans] == [True, True, False]
    assert ["exceeds the budget" in str(plan) for plan in plans] == [False, False, True]


@pytest.mark.parametrize(
    ("engine", "dtype"),
    [
        ("autograd", None),
        ("traced", None),
        ("difference", None),
        ("autograd", torch.float64),
        ("difference", torch.float64),
    ],
)
def test_all_tensors_of_a_run_are_in_the_plan_and_within_the_budget(engine: str, dtype: torch.dtype | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(96, 96), nn.Tanh())))
    data = torch.randn(2, 4, 96).unbind()
    options: dict[str, Any] = {"num_probes": 1, "num_steps": 2, "engine": engine, "dtype": dtype}
    options["memory_budget"] = 1_500_000
    plan = blockhess.plan(model, data, nn.MSELoss(), **options)
    with Held([*model.parameters(), *data]) as memory, warnings.catch_warnings():
        warnings.filterwarnings("error", "spectrum: memory_budget")
        blockhess.spectrum(model, data, nn.MSELoss(), **options)
    assert 0.8 * plan.peak_bytes < memory.peak < 1.1 * plan.peak_bytes and memory.peak < plan.memory_budget


# Run after code that defines the arguments `given` and `options` of a job, and has imported what it needs.
MEASURED = """
def highest():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])

before = highest()
blockhess.spectrum(*given, **options)
print(highest() - before, blockhess.plan(*given, **options).peak_bytes)
"""
measured = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no peak memory to read")


def peak_as_planned(code: str) -> int:
    """Return the peak memory of the job of the code in a process of its own, after comparing it with the plan."""
    told = subprocess.run([sys.executable, "-c", code + MEASURED], capture_output=True, text=True, check=True).stdout
    peak, plan = map(int, told.split())
    assert peak / 1.25 < plan < 2 * peak
    return peak


CHECKS = """
import torch
import blockhess

def job(width):
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (torch.nn.Linear(width, width), torch.nn.Tanh())]
    options = {"num_probes": 1, "num_steps": 2, "engine": "autograd", "memory_budget": "128 MiB"}
    return (torch.nn.Sequential(*layers), torch.randn(2, 2, width).unbind(), torch.nn.MSELoss()), options

given, options = job(8)
blockhess.spectrum(*given, **options)
given, options = job(800)
"""


@pytest.mark.slow
@measured
def test_checks_stay_within_the_budget() -> None:
    assert peak_as_planned(CHECKS) < 2**27


PEAK = """
import sys
import torch
import blockhess

class Model(torch.nn.Module):
    def __init__(self, dims):
        super().__init__()
        self.w = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(dim)) for dim in dims])

    def forward(self, scale):
        return scale * sum(w.sin().sum() ** 2 / len(w) for w in self.w)

def job(dims):
    options = {"num_probes": 10, "num_steps": 200, "engine": "exact"}
    return (Model(dims), torch.tensor(1.0), lambda model, batch: (model(batch), 1.0)), options

given, options = job([3, 5])
blockhess.spectrum(*given, **options)
blockhess.spectrum(*given, **(options | {"engine": "traced"}))  # imports what tracing needs
given, options = job([8] * 150 + [600])
"""


@pytest.mark.slow
@measured
def test_tables_of_many_blocks_written_out_take_what_is_planned() -> None:
    peak_as_planned(PEAK)
