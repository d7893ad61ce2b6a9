"""What is predicted for several processes follows from what is counted and measured in one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import blockhess
from blockhess.cli.main import main
from blockhess.estimate import job_arguments
from blockhess.problem.prepare import prepared_problem
from blockhess.run.forecast import forecast
from tests.helpers import distributed_cases as cases

JOB = """
from tests.helpers import distributed_cases as cases

def make():
    return {"model": cases.model(), "data": cases.batches(), "loss_fn": cases.LOSS, "num_probes": 4}
"""


def ticks():
    """A clock by which every call takes one second."""
    counter = itertools.count()
    return lambda: float(next(counter))


def told(**shape):
    arguments, options = job_arguments(cases.model(), cases.batches(), cases.LOSS, **cases.OPTIONS)
    return forecast(prepared_problem(**arguments), options, clock=ticks(), **shape)


def test_loads_add_up_and_shrink():
    alone, two, four = told(), told(work=2), told(work=4)
    assert alone.seconds == alone.alone_seconds == pytest.approx(two.alone_seconds)
    # 6 blocks of 3 probes, a second a product, min(6, dim) steps, 5 batches; and a second for 4 steps of all blocks.
    dims = [60, 12, 96, 8, 24, 3]
    products = 5 * 3 * sum(min(6, dim) for dim in dims)
    steps = 3 * sum(min(6, dim) * dim for dim in dims) / 4 / sum(dims)
    assert alone.seconds - alone.fixed_seconds == pytest.approx(products + steps)
    loads = [f.seconds - f.fixed_seconds for f in (alone, two, four)]
    assert loads[0] > loads[1] > loads[2] > loads[0] / 5
    assert loads[1] * 2 * two.balance == pytest.approx(loads[0]) and two.balance <= 1


def test_traffic_is_that_of_a_ring():
    one, two, four = told(), told(data=2), told(data=4)
    vectors = 3 * 4 * sum(min(6, dim) * dim for dim in (60, 12, 96, 8, 24, 3))
    assert (one.traffic_bytes, two.traffic_bytes, four.traffic_bytes) == (0, vectors, 1.5 * vectors)
    # 5 batches: 3 and 2, or 2 and three times 1.
    assert (two.seconds - two.fixed_seconds) / (four.seconds - four.fixed_seconds) == pytest.approx(3 / 2, rel=0.01)
    slow = told(data=2, bandwidth=1e-3)
    assert slow.seconds - two.seconds == pytest.approx(vectors / 1e-3, rel=1e-9)


def test_plan_for_gpus(tmp_path, capsys):
    (tmp_path / "job.py").write_text(JOB)
    job = f"{tmp_path / 'job.py'}:make"
    assert main(["plan", job, "--gpus", "4", "--data-parallel", "2"]) == 0
    assert "4: 2 share recurrences x 2 share batches" in capsys.readouterr().out
    assert main(["plan", job, "--gpus", "4", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["work"] == 4 and all(each.keys() >= {"first_probe", "blocks"} for each in told["plan"]["passes"])
    assert main(["plan", job, "--gpus", "3", "--data-parallel", "2"]) != 0
    assert "must divide" in capsys.readouterr().err


def test_the_page_shows_the_kept_measurement():
    root = Path(__file__).parents[2]
    kept = (root / "bench" / "results" / "distributed_cpu.txt").read_text().splitlines()
    page = (root / "docs" / "distributed.md").read_text()
    assert kept and all(f"    {line}".rstrip() in page for line in kept)


@pytest.mark.parametrize(
    ("processes", "error", "message"),
    [
        (3, TypeError, "plan: processes must be (recurrences, data), got 3"),
        ((2,), TypeError, "plan: processes must be (recurrences, data), got (2,)"),
        ((0, 2), ValueError, "plan: processes must be an integer at least 1, got 0"),
    ],
)
def test_no_mesh_of_processes(processes: object, error: type[Exception], message: str) -> None:
    data = torch.randn(4, 2), torch.randint(2, (4,))
    with pytest.raises(error) as caught:
        blockhess.plan(nn.Linear(2, 2), data, nn.CrossEntropyLoss(), processes=processes)
    assert str(caught.value) == message
