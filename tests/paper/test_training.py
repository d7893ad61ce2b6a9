"""Training: optimizers against torch and hand formulas, divergence, clipping, schedules, checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from blockhess import spectrum
from blockhess_paper.training import (
    AdamUncorrected,
    learning_rate,
    load_checkpoint,
    make_optimizer,
    save_checkpoint,
    spectra_of_checkpoints,
    train,
)

SCALES = torch.tensor([1.0, 3.0, 10.0], dtype=torch.float64)


def path_of(optimizer_of, steps: int = 6) -> torch.Tensor:
    """Iterates on 1/2 sum s w^2 from w = 1, (steps + 1, 3)."""
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_of([w])
    found = [w.detach().clone()]
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * SCALES * w.square()).sum().backward()
        optimizer.step()
        found.append(w.detach().clone())
    return torch.stack(found)


def by_hand(name: str, rate: float, decay: float = 0.0, steps: int = 6) -> torch.Tensor:
    """The paper's Algorithms 1, 2, 3, line by line."""
    w, found = torch.ones(3, dtype=torch.float64), []
    m = v = torch.zeros(3, dtype=torch.float64)
    found.append(w)
    for t in range(1, steps + 1):
        g = SCALES * w
        if name == "SGD":
            m = 0.9 * m + g
            w = w - rate * m
        elif name == "AdamW":
            w = w - rate * decay * w
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        else:
            if t == 1:
                m, v = g, g * g
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            w = w - rate * m / (v.sqrt() + 1e-8)
        found.append(w)
    return torch.stack(found)


@pytest.mark.parametrize(("name", "decay"), [("SGD", 0.0), ("AdamW", 0.0), ("AdamW", 0.1), ("Adam", 0.0)])
def test_optimizers_are_the_papers_algorithms(name: str, decay: float) -> None:
    found = path_of(lambda params: make_optimizer(name, params, 0.05, decay))
    torch.testing.assert_close(found, by_hand(name, 0.05, decay), rtol=1e-12, atol=1e-14)
    others = [by_hand(other, 0.05, decay) for other in ("SGD", "AdamW", "Adam") if other != name]
    assert not any(torch.allclose(found, other, rtol=1e-6) for other in others)


def test_uncorrected_adam_tends_to_torch_adam_without_correction() -> None:
    """From equal first averages torch's RMSprop is the same with beta_1 = 0."""

    def preset(params):
        optimizer = torch.optim.RMSprop(params, lr=0.05, alpha=0.9, eps=1e-8)
        optimizer.state[params[0]] = {"step": torch.tensor(0.0), "square_avg": SCALES.square()}
        return optimizer

    found = path_of(lambda params: AdamUncorrected(params, lr=0.05, betas=(0.0, 0.9)))
    torch.testing.assert_close(found, path_of(preset), rtol=1e-12, atol=1e-14)


def test_first_step_without_correction_is_the_sign() -> None:
    found = path_of(lambda params: AdamUncorrected(params, lr=0.25, eps=0.0), steps=1)
    torch.testing.assert_close(found[1], torch.full((3,), 0.75, dtype=torch.float64))


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"betas": (1.0, 0.9)}, {"eps": -1.0}, {"lr": math.inf}])
def test_bad_adam(options) -> None:
    with pytest.raises(ValueError, match="AdamUncorrected: lr"):
        AdamUncorrected([torch.zeros(1)], **options)


def test_schedules() -> None:
    cosine = [learning_rate(t, 10, "cosine", 2) for t in range(10)]
    assert cosine[:3] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0]
    assert cosine[6] == pytest.approx(0.5) and cosine[9] == pytest.approx((1 + math.cos(math.pi * 7 / 8)) / 2)
    assert [learning_rate(t, 10, "constant") for t in (0, 9)] == [1.0, 1.0]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))


def batches(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 16, 4, generator=generator)
    return [(row, row[:, :3].argmax(1)) for row in x]


def test_training_lowers_the_loss_and_starts_at_the_initial_model() -> None:
    model, criterion = classifier(), nn.CrossEntropyLoss()
    first = criterion(classifier().train()(batches()[0][0]), batches()[0][1]).item()
    result = train(model, batches(), criterion, optimizer="AdamW", rate=0.02, num_steps=30, window=3)
    assert result.losses[0] == pytest.approx(first, rel=1e-6)
    assert not result.diverged and result.final == pytest.approx(sum(result.losses[-3:]) / 3)
    assert result.final < 0.8 * result.initial


def test_measuring_the_initial_loss_leaves_batchnorm_alone() -> None:
    seen = []
    criterion = nn.CrossEntropyLoss()
    train(
        classifier(),
        batches(),
        criterion,
        optimizer="SGD",
        rate=0.1,
        num_steps=2,
        at_steps={0: lambda m: seen.append(m[1].running_mean.clone()), 2: lambda m: seen.append(m[1].running_mean)},
    )
    assert torch.equal(seen[0], torch.zeros(6)) and not torch.equal(seen[1], torch.zeros(6))


@pytest.mark.parametrize("rate", [1e3, 1e30])
def test_a_diverging_rate_is_recorded_as_such(rate: float) -> None:
    model = nn.Linear(4, 1)
    data = [(torch.ones(8, 4), torch.zeros(8, 1))]
    result = train(model, data, nn.MSELoss(), optimizer="SGD", rate=rate, num_steps=40)
    assert result.diverged and result.final is None
    assert all(math.isfinite(loss) for loss in result.losses) and math.isfinite(result.initial)
    calm = train(nn.Linear(4, 1), data, nn.MSELoss(), optimizer="SGD", rate=1e-2, num_steps=40)
    assert not calm.diverged and len(calm.losses) == 40


def test_a_loss_above_the_initial_has_diverged() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    data = [(torch.ones(1, 1), torch.zeros(1, 1))]
    result = train(model, data, nn.MSELoss(), optimizer="SGD", rate=3.0, num_steps=3, schedule="constant")
    assert len(result.losses) == 3 and result.diverged and result.final is None


def test_parameters_that_are_not_finite_have_diverged() -> None:
    """Losses are those before the steps, so they do not show what the last step did."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.ones_(model.weight)
    data = [(torch.full((1, 1), 1e5), torch.zeros(1, 1))]
    result = train(model, data, nn.MSELoss(), optimizer="SGD", rate=1e30, num_steps=1)
    assert not model.weight.isfinite() and result.losses == (result.initial,)
    assert result.diverged and result.final is None


def test_clipping_bounds_the_step() -> None:
    def step(clip: float | None) -> float:
        model = nn.Linear(1, 1, bias=False)
        nn.init.ones_(model.weight)
        data = [(torch.full((1, 1), 10.0), torch.zeros(1, 1))]
        train(model, data, nn.MSELoss(), optimizer="SGD", rate=0.01, num_steps=1, schedule="constant", clip=clip)
        return 1 - model.weight.item()

    assert step(0.5) == pytest.approx(0.005, rel=1e-4)
    assert step(None) == pytest.approx(2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps"),
        ({"num_steps": 2, "warmup": 2}, "warmup"),
        ({"num_steps": 2, "clip": 0.0}, "clip"),
        ({"num_steps": 2, "schedule": "step"}, "schedule"),
        ({"num_steps": 2, "rate": -1.0}, "rate"),
        ({"num_steps": 2, "optimizer": "Lion"}, "name must be one of SGD"),
    ],
)
def test_bad_trainings(options, message: str) -> None:
    given = {"optimizer": "SGD", "rate": 0.1, **options}
    with pytest.raises(ValueError, match=message):
        train(classifier(), batches(), nn.CrossEntropyLoss(), **given)


def test_batches_that_end_too_early() -> None:
    with pytest.raises(ValueError, match="batches must last"):
        train(classifier(), iter(batches(2)), nn.CrossEntropyLoss(), optimizer="SGD", rate=0.1, num_steps=3)
    with pytest.raises(ValueError, match="got none"):
        train(classifier(), [], nn.CrossEntropyLoss(), optimizer="SGD", rate=0.1, num_steps=3)


def test_spectra_of_checkpoints(tmp_path: Path) -> None:
    model, criterion = classifier(), nn.CrossEntropyLoss()
    paths = {step: tmp_path / f"{step}.pt" for step in (0, 5)}
    hooks = {step: lambda m, path=path: save_checkpoint(m, path) for step, path in paths.items()}
    train(model, batches(), criterion, optimizer="SGD", rate=0.1, num_steps=8, at_steps=hooks)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"num_probes": 1, "num_steps": 4, "progress": False}
    found = dict(spectra_of_checkpoints(model, list(paths.values()), batches()[0], criterion, **options))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    load_checkpoint(model, paths[5])
    alone = spectrum(model, batches()[0], criterion, **options)
    assert torch.equal(found[paths[5]].quadrature.nodes, alone.quadrature.nodes)
    assert not torch.equal(found[paths[0]].quadrature.nodes, alone.quadrature.nodes)
    assert sorted(tmp_path.iterdir()) == sorted(paths.values())


def test_checkpoints_are_never_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    torch.save({"weight": Trap()}, tmp_path / "trap.pt")
    (tmp_path / "noise.pt").write_bytes(b"noise")
    save_checkpoint(nn.Linear(3, 3), tmp_path / "other.pt")
    for name in ("trap.pt", "noise.pt", "other.pt", "missing.pt"):
        with pytest.raises(ValueError, match=f"checkpoint: .*{name} must hold"):
            load_checkpoint(nn.Linear(2, 2), tmp_path / name)
    assert not (tmp_path / "sprung").exists()
