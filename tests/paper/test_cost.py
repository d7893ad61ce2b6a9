"""What the paper's jobs take: counts against the real thing on small networks, times against hand arithmetic."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from blockhess.cli.main import main
from blockhess.hvp.autograd import AutogradEngine
from blockhess.hvp.operator import product
from blockhess.models import GPTConfig, ResNetConfig
from blockhess.problem.prepare import prepared_problem
from blockhess_paper.models import CONFIGS, BERTConfig, ViTConfig, named
from blockhess_paper.networks import cost
from blockhess_paper.networks.cost import (
    ASSUMED_SHARE,
    H100_PEAK,
    HOUR,
    BatchCost,
    JobCost,
    count_cost,
    job_cost,
    measured_rate,
)
from blockhess_paper.networks.networks import NETWORKS
from docs._generate import findings_page

SMALL = {
    "gpt2": GPTConfig(30, context=6, num_layers=2, num_heads=2, width=8),
    "bert": BERTConfig(30, context=6, num_layers=1, num_heads=2, width=8),
    "vit-base": ViTConfig(224, 112, depth=1, num_heads=2, width=8, num_classes=3),
    "resnet18": ResNetConfig(2, (1, 1), num_classes=3),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, config in SMALL.items():
        monkeypatch.setitem(CONFIGS, name, (CONFIGS[name][0], config))


@pytest.mark.parametrize("name", SMALL)
def test_counts_are_those_of_the_engine(name: str, small: None) -> None:
    found = count_cost(name, 3)
    batch, loss_fn = cost.sample_batch(name, 3)
    model: Any = named(name)
    blocks = model.paper_blocks(figure=True)
    with prepared_problem(model, batch, loss_fn, blocks, "eval", None, None, "highest") as (problem, *_):
        engine = AutogradEngine(problem)
        with FlopCounterMode(display=False) as gradient:
            engine.prepare(0)
        products = []
        for number, dim in enumerate(problem.dims):
            with FlopCounterMode(display=False) as counter:
                product(engine, number, torch.ones(1, dim))
            products.append(counter.get_total_flops())
        graph_bytes = problem.graph_bytes
    assert found.dims == tuple(problem.dims) and list(found.products) == products
    # Layers that are in no block need no gradient there.
    assert gradient.get_total_flops() >= found.gradient > max(products) / 2
    assert found.graph_bytes == pytest.approx(graph_bytes, rel=0.02)
    assert found.parameters == sum(p.numel() for p in named(name).parameters())
    twice = count_cost(name, 6)
    assert twice.products == tuple(2 * flops for flops in found.products) and twice.gradient == 2 * found.gradient


def test_work_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "count_cost", lambda *_: BatchCost((5, 2000), 3000, (3, 7), 11, 13))
    # 1,024 images, 32 at a time; a block of 5 is written out, the other takes 10 probes of 100 steps.
    found = job_cost("vgg16")
    assert found.parts == 32 and found.products == 32 * (5 + 1000)
    assert found.flops == 32 * (5 * 3 + 1000 * 7 + 100 * 11)
    assert found.vector_bytes >= 10 * 4 * 3 * 2005 and (found.graph_bytes, found.batch) == (13, "1,024 images")
    assert job_cost("bert").parts == 327_680 // 8_192


def test_times_by_hand() -> None:
    job = JobCost("gpt2", "GPT2", 25, 1, 2, "x", 1, 1, 1e18, 1, 1, rate=1e12)
    record = job.to_dict(None)
    assert record["seconds_here"] == pytest.approx(1e6)
    assert record["seconds_extrapolated"]["H100, TF32"] == pytest.approx(1e18 / (ASSUMED_SHARE * H100_PEAK["TF32"]))
    assert record["share_of_peak_needed"]["float32"] == pytest.approx(1e18 / (14 * HOUR) / H100_PEAK["float32"])
    assert record["seconds_in_the_paper"] == {"A100": 7 * 24 * HOUR}
    assert job.to_dict(2000.0)["seconds_extrapolated"] == {"2000 GFLOP/s": pytest.approx(5e5)}
    text = cost.format_plans([job], "cpu", None)
    assert "unproven on hardware" in text and "extrapolated" in text and "12 days (1e+03 GFLOP/s)" in text
    assert "3 hours TF32, 14 hours float32" in text and "7 days A100" in text


def test_the_rate_is_that_of_the_products(small: None) -> None:
    counter = itertools.count()
    found = count_cost("gpt2", 1)
    numbers = (0, (len(found.dims) - 1) // 2, len(found.dims) - 1)
    rate = measured_rate("gpt2", torch.device("cpu"), clock=lambda: float(next(counter)))
    assert rate == pytest.approx(sum(found.products[n] for n in numbers) / 3)


def test_the_command(small: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "plan", "--model", "resnet18"]) == 0
    text = capsys.readouterr().out
    assert "ResNet18" in text and "GFLOP/s)" in text and "VGG16" not in text
    assert "ResNet18: BatchNorm in eval mode; " in text
    assert main(["paper", "plan", "--quick", "--model", "gpt2", "--json", "--gflops", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    [job] = found["jobs"]
    assert job["seconds_here"] is None and list(job["seconds_extrapolated"]) == ["1000 GFLOP/s"]
    assert "extrapolated, unproven on hardware" in found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            (["--gflops", value], f"plan: --gflops must be positive and finite, got {float(value)}")
            for value in ("0", "-1", "inf", "nan")
        ),
        (["--model", "lenet"], "plan: model must be one of resnet18"),
        (["--device", "warp"], "device must be one of this machine's"),
    ],
)
def test_bad_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "plan", "--quick", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.slow
def test_batch_statistics_take_as_much_again(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """So a job with both BatchNorm policies costs twice as much; the text says so for networks with BatchNorm."""
    counted_in_eval_mode = cost.count_cost("resnet18", 2)
    monkeypatch.setattr(nn.Module, "eval", nn.Module.train)
    in_train_mode = cost.count_cost("resnet18", 2)
    assert in_train_mode.products == counted_in_eval_mode.products
    assert in_train_mode.gradient == counted_in_eval_mode.gradient
    for name, stated in (("resnet18", True), ("vgg16", False)):
        assert main(["paper", "plan", "--quick", "--model", name]) == 0
        assert ("ResNet18: BatchNorm in eval mode; " in capsys.readouterr().out) is stated


def test_the_kept_plan_is_of_the_papers_sizes() -> None:
    kept = json.loads((findings_page.ROOT / "docs" / "results" / "paper" / "plan.json").read_text())
    jobs = {job["name"]: job for job in kept["jobs"]}
    assert list(jobs) == list(NETWORKS) and "dirty" not in kept["environment"]["commit"]
    assert [job["blocks"] for job in jobs.values()] == [18, 16, 14, 16, 19, 25]
    assert jobs["gpt2"]["products"] == 25 * 1000 * 30 and jobs["gpt2"]["rate"] > 0
    # A product takes between one and two forward passes of about 2 x parameters x tokens, attention beside.
    forward = 2 * jobs["gpt2"]["parameters"] * 245_760
    assert 1 < jobs["gpt2"]["flops"] / (25_000 * forward) < 3
