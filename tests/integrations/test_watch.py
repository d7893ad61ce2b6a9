"""Monitoring a training changes no bit of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess.integrations.watch import SpectrumMonitor

LOSS = nn.CrossEntropyLoss()
OPTIONS: dict[str, Any] = {"num_probes": 2, "num_steps": 3}


def noisy_model() -> nn.Module:
    """Its training draws random numbers and keeps statistics."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3))


def examples(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def trained(watch: SpectrumMonitor | None, disturb: bool = False) -> list[Tensor]:
    """Parameters, buffers, gradients, momenta and random state after a training whose batches come shuffled."""
    model = noisy_model()
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples(20)), batch_size=5, shuffle=True)
    step = 0
    for _ in range(2):
        for x, y in loader:
            optimizer.zero_grad()
            LOSS(model(x), y).backward()
            optimizer.step()
            step += 1
            if watch is not None:
                watch(model, step)
            if disturb:
                torch.rand(1)
    gradients = [p.grad for p in model.parameters()]
    momenta = [optimizer.state[p]["exp_avg"] for p in model.parameters()]
    return [*model.state_dict().values(), *gradients, *momenta, torch.get_rng_state()]


def same_bits(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.mark.parametrize("batchnorm", ["eval", "batch"])
def test_watching_changes_no_bit_of_a_training(batchnorm: str, tmp_path: Path) -> None:
    watch = SpectrumMonitor(examples(8, seed=1), LOSS, every=2, folder=tmp_path, batchnorm=batchnorm, **OPTIONS)
    alone = trained(None)
    assert same_bits(alone, trained(watch))
    assert not same_bits(alone, trained(None, disturb=True))  # the comparison would notice
    assert [p.name for p in sorted(tmp_path.iterdir())] == [f"step_{i:08d}.npz" for i in (2, 4, 6, 8)]


def test_what_is_watched_is_the_model_at_that_step(tmp_path: Path) -> None:
    batch = examples(8, seed=1)
    watch, model = SpectrumMonitor(batch, LOSS, every=10, folder=tmp_path, **OPTIONS), noisy_model()
    spectra = watch(model, 20)
    assert spectra is not None and spectra.provenance["step"] == 20
    expected = blockhess.spectrum(model, batch, LOSS, **OPTIONS)
    kept = blockhess.load(tmp_path / "step_00000020.npz")
    assert torch.equal(spectra.quadrature.nodes, expected.quadrature.nodes)
    assert torch.equal(kept.quadrature.nodes, expected.quadrature.nodes)
    assert watch(model, 20) is None  # seen
    assert watch(model, 25) is None  # not due
    assert watch(model, 30) is not None


def test_a_shuffling_loader_is_drawn_once() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples(8)), batch_size=4, shuffle=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    watch = SpectrumMonitor(loader, LOSS, every=1, folder=None, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)
    model = noisy_model()
    seen = [watch(model, step) for step in range(2)]
    assert seen[0].provenance["fingerprints"]["data"] == seen[1].provenance["fingerprints"]["data"]


def test_a_training_outlives_what_is_not_finite() -> None:
    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        return LOSS(model(batch[0]), batch[1]) + model.bias.abs().pow(1.5).sum()  # infinite curvature at 0

    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.bias.zero_()
    with pytest.raises(blockhess.NonFiniteError):
        blockhess.spectrum(model, examples(8), loss_fn, **OPTIONS)
    spectra = SpectrumMonitor(examples(8), loss_fn, every=1, folder=None, **OPTIONS)(model, 0)
    assert spectra is not None and spectra.quadrature.nonfinite.any(0).tolist() == [False, True]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "SpectrumMonitor: every must be at least 1, got 0"),
        ({"every": 1, "folder": "{file}/x"}, "output folder: cannot make"),
    ],
)
def test_refusals(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    given = {k: v.format(file=tmp_path / "file") if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=message):
        SpectrumMonitor(examples(8), LOSS, **{"folder": None} | given)
