"""learning_rates.py: 1 / lambda_max by hand, and one step of blockwise gradient descent on a quadratic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blockhess
from blockhess.analysis.learning_rates import rates
from tests.helpers.spectra_cases import make_spectra


def test_rates_are_one_over_lambda_max() -> None:
    spectra = make_spectra([[[-2.0, 4.0], [-3.0, -1.0]]], [[[0.5, 0.5]] * 2], names=["up", "down"])
    assert rates(spectra) == {"up": 0.25, "down": None}
    assert rates(spectra, 0.5)["up"] == 0.125
    rounding = make_spectra([[[-4.0, 1e-7], [-4.0, 1e-3]]], [[[0.5, 0.5]] * 2], names=["rounding", "flat"])
    assert rates(rounding) == {"rounding": None, "flat": pytest.approx(1e3)}
    with pytest.raises(ValueError, match="factor must be positive"):
        rates(spectra, 0.0)


def quadratic() -> tuple[nn.Module, torch.Tensor]:
    """Loss 1/2 (3 a^2 + 3 b^2) + 1/2 (50 c^2): blocks with lambda_max 3 and 50."""

    class Quadratic(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Parameter(torch.ones(2, dtype=torch.float64))
            self.sharp = nn.Parameter(torch.ones(1, dtype=torch.float64))
            self.idle = nn.Parameter(torch.ones(4, dtype=torch.float64))

        def forward(self, x):
            return x * (1.5 * self.flat.square().sum() + 25 * self.sharp.square().sum() + 0 * self.idle.sum())

    return Quadratic(), torch.ones(1, dtype=torch.float64)


def test_param_groups_are_blockwise_gradient_descent() -> None:
    model, x = quadratic()
    loss = lambda m, batch: m(batch).sum()  # noqa: E731
    spectra = blockhess.spectrum(model, x, loss, num_probes=1, progress=False)
    groups = {group["name"]: group for group in spectra.param_groups(model)}
    assert groups["flat"]["lr"] == pytest.approx(1 / 3) and groups["sharp"]["lr"] == pytest.approx(1 / 50)
    assert groups["idle"]["lr"] == pytest.approx(1 / 50) and groups["flat"]["params"][0] is model.flat
    optimizer = torch.optim.SGD(spectra.param_groups(model))
    loss(model, x).backward()
    optimizer.step()
    assert loss(model, x).item() == pytest.approx(0.0, abs=1e-12)  # one step, as the blocks are isotropic

    alone = blockhess.spectrum(model, x, loss, blocks={"sharp": "sharp"}, num_probes=1, progress=False)
    rest = alone.param_groups(model)[-1]
    assert rest["name"] == "rest" and sum(p.numel() for p in rest["params"]) == 6
    parts = blockhess.spectrum(
        model, x, loss, blocks={"x": blockhess.ParameterSlice("flat", 0, 1)}, num_probes=1, progress=False
    )
    with pytest.raises(ValueError, match="whole parameters"):
        parts.param_groups(model)
    with pytest.raises(ValueError, match="got none called"):
        spectra.param_groups(nn.Linear(2, 2))
