"""Curvature spread: hand numbers, invariances, coverage of the truth with ten steps, and what is left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import blockhess
from blockhess.cli.main import main
from blockhess.report.text import describe, to_dict
from tests.helpers.dense_hessian import dense_hessian
from tests.helpers.spectra_cases import make_spectra, random_spectra


def test_by_hand() -> None:
    nodes = [[[-1000.0, 1.0], [0.0, 10.0], [-0.1, 0.05]], [[-900.0, 1.0], [0.0, 10.0], [-0.1, 0.05]]]
    spectra = make_spectra(nodes, [[[0.5, 0.5]] * 3] * 2, dims=[20, 20, 20], names=["a", "b", "c"])
    spread = spectra.curvature_spread()
    assert spread is not None
    assert spread.value == float(spread) == pytest.approx(torch.tensor([3.0, 1.0, -1.0]).std().item())
    assert (spread.flattest, spread.sharpest, spread.smallest, spread.largest) == ("c", "a", 0.1, 1000.0)
    assert spread.ratio == pytest.approx(1e4) and spread.blocks == ("a", "b", "c") and not spread.weights
    assert spread.interval is not None and spread.interval[0] < spread.value < spread.interval[1]
    assert str(spread).startswith("Curvature spread = 2.00 decades (") and "a factor of 10,000" in str(spread)


def test_scale_of_the_loss_and_zero_blocks() -> None:
    spectra = random_spectra(n_blocks=4, dims=[50] * 4)
    zero = torch.cat([spectra.quadrature.nodes, torch.zeros(3, 1, 12)], 1)
    weights = torch.cat([spectra.quadrature.weights, torch.full((3, 1, 12), 1 / 12)], 1)
    expected = spectra.curvature_spread()
    for factor in (1e-6, 1.0, 1e6):
        found = make_spectra((factor * zero).tolist(), weights.tolist(), dims=[50] * 5).curvature_spread()
        assert found is not None and expected is not None
        assert found.value == pytest.approx(expected.value, rel=1e-12) and found.zero == ("block4",)
        assert "zero, left out: block4" in str(found) and found.blocks == expected.blocks


def test_blocks_without_curvature_whose_error_is_unknown() -> None:
    """They are not called zero, but have no logarithm."""
    nodes, weights = [[[1.0], [0.0], [100.0], [0.0]]] * 2, [[[1.0]] * 4] * 2
    spectra = make_spectra(nodes, weights, hvp_error_unknown="the repeat in float64 is another function")
    assert not spectra.zero_blocks and "block1" in spectra.comparable_blocks()
    spread = spectra.curvature_spread()
    assert spread is not None and spread.value == pytest.approx(2**0.5) and spread.interval is not None
    assert (spread.blocks, spread.zero) == (("block0", "block2"), ("block1", "block3"))
    assert describe(spectra).startswith("Curvature spread = 1.41 decades")


def test_fewer_than_two_blocks_and_one_probe() -> None:
    assert make_spectra([[[1.0], [0.0]]], [[[1.0], [1.0]]]).curvature_spread() is None
    one = random_spectra(n_probes=1).curvature_spread()
    assert one is not None and one.interval is None and "(no interval: one probe)" in str(one)


@pytest.mark.parametrize("seed", range(3))
def test_ten_steps_are_enough(seed: int) -> None:
    """Within 2 % of the exact spread, of weights only; two steps are not enough: the test could fail."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(12, 24), nn.Tanh(), nn.LayerNorm(24), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 3)
    )
    data, loss_fn = (torch.randn(64, 12), torch.randint(3, (64,))), nn.CrossEntropyLoss()
    radii = [
        torch.linalg.eigvalsh(dense_hessian(model, lambda f: loss_fn(f(data[0]), data[1]), [name])).abs().max()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    ]
    exact = torch.stack(radii).log10().std().item()
    options = {"num_probes": 3, "engine": "autograd", "progress": False}
    ten, two = (blockhess.spectrum(model, data, loss_fn, num_steps=m, **options).curvature_spread() for m in (10, 2))
    assert ten is not None and two is not None
    assert ten.weights and len(ten.blocks) == 3
    assert ten.value == pytest.approx(exact, rel=0.02) and two.value != pytest.approx(exact, rel=0.02)
    for spread in (ten, two):
        assert spread.interval is not None and spread.interval[0] <= exact <= spread.interval[1]


def test_it_is_the_first_line_and_in_json(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    spectra = random_spectra(batchnorm="eval", tol=None, sigma=None)
    spread = spectra.curvature_spread()
    assert spread is not None
    old = blockhess.load(spectra.save(f"{tmp_path}/old.npz"))  # with the names of 0.1
    text = describe(old)
    assert text.splitlines()[0] == str(spread) and text.count("Curvature spread") == 1
    assert "whose default comparison was on the linear axis: JS0 is recomputed" in text
    assert "recomputed" in describe(blockhess.load(old.save(f"{tmp_path}/again.npz")))
    assert "recomputed" not in describe(random_spectra(tol=None, tol_sigma=None))
    told = to_dict(spectra)["curvature_spread"]
    assert next(iter(to_dict(spectra))) == "curvature_spread"
    assert told["value"] == spread.value and told["ratio"] == spread.ratio and math.isfinite(told["ratio"])
    file = spectra.save(f"{tmp_path}/a.npz")
    assert main(["show", str(file)]) == 0
    assert capsys.readouterr().out.startswith("Curvature spread = ")
