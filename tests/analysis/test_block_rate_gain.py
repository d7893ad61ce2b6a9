"""Gain of block rates: hand numbers, dense Hessians, scale of the loss, blocks left out, overlap, old files."""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess import ParameterSlice
from tests.helpers.dense_hessian import dense_hessian
from tests.helpers.distributed_cases import after_products
from tests.helpers.spectra_cases import make_spectra

QUIET: dict[str, Any] = {"progress": False, "engine": "autograd"}


def tanh_net(seed: int = 0) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()
    return model, (torch.randn(30, 6, dtype=torch.float64), torch.randint(3, (30,)))


def dense_gain(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The definition, by torch alone."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    squares, largest = [], []
    for name, parameter in model.named_parameters():
        squares.append(parameter.grad.square().sum())
        hessian = dense_hessian(model, lambda f: nn.functional.cross_entropy(f(x), y), [name])
        largest.append(torch.linalg.eigvalsh(hessian).max())
    model.zero_grad()
    g, rates = torch.stack(squares), 1 / torch.stack(largest)
    return float((g * rates).sum() / (g * rates.min()).sum())


def test_by_hand() -> None:
    """lambda = 4, 1 and |g|^2 = 1, 9: (1/4 + 9) / (10/4)."""
    nodes, weights = [[[-8.0, 4.0], [0.5, 1.0], [-3.0, -1.0]]], [[[0.5, 0.5]] * 3]
    options: dict[str, Any] = {"names": ["a", "b", "down"], "gradient_norms": {"a": 1.0, "b": 3.0, "down": 7.0}}
    gain = make_spectra(nodes, weights, **options).block_rate_gain()
    assert gain.value == float(gain) == pytest.approx(9.25 / 2.5, rel=1e-12)
    assert gain.sharpest == "a" and gain.blocks == ("a", "b")
    assert gain.left_out == (("down", "no positive curvature"),)
    assert str(gain).startswith("Gain of block rates = 3.7 (") and "left out: down (no positive curvature)" in str(gain)
    assert gain.to_dict()["value"] == gain.value


def test_a_block_without_finite_products_has_no_norm_and_is_left_out() -> None:
    spectra = make_spectra(
        [[[4.0], [1.0], [0.0]]],
        [[[1.0], [1.0], [0.0]]],
        steps=[[1, 1, 0]],
        nonfinite=[[False, False, True]],
        gradient_norms={"block0": 1.0, "block1": 3.0},
    )
    gain = spectra.block_rate_gain()
    assert gain.value == pytest.approx(9.25 / 2.5) and gain.left_out == (("block2", "non-finite"),)


@pytest.mark.parametrize("seed", range(3))
def test_equals_that_of_dense_hessians(seed: int) -> None:
    model, (x, y) = tanh_net(seed)
    expected = dense_gain(model, x, y)
    exact = blockhess.spectrum(model, (x, y), nn.CrossEntropyLoss(), engine="exact", progress=False).block_rate_gain()
    assert exact.value == pytest.approx(expected, rel=1e-10)
    assert exact.interval is not None and exact.interval[:2] == pytest.approx((expected, expected), rel=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())
    few = blockhess.spectrum(model, (x, y), nn.CrossEntropyLoss(), num_probes=2, num_steps=6, **QUIET).block_rate_gain()
    assert few.interval is not None and few.interval[0] <= expected <= few.interval[1]
    assert few.value != pytest.approx(expected, rel=1e-6)  # so the interval is needed


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_scale_of_the_loss_and_weighted_batches(factor: float) -> None:
    model, (x, y) = tanh_net()
    options = {"num_probes": 2, "num_steps": 20, **QUIET}
    whole = blockhess.spectrum(model, (x, y), nn.CrossEntropyLoss(), **options).block_rate_gain()
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]  # of unequal weight
    scaled = blockhess.spectrum(
        model, batches, lambda m, b: (factor * nn.functional.cross_entropy(m(b[0]), b[1]), len(b[0])), **options
    )
    assert scaled.block_rate_gain().value == pytest.approx(whole.value, rel=1e-9)


def test_norms_are_those_of_the_gradient_of_all_data(tmp_path: Any) -> None:
    model, (x, y) = tanh_net()
    spectra = blockhess.spectrum(
        model, [(x[:7], y[:7]), (x[7:], y[7:])], nn.CrossEntropyLoss(), num_probes=1, num_steps=3, **QUIET
    )
    nn.functional.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        assert spectra.provenance["gradient_norms"][name] == pytest.approx(float(parameter.grad.norm()), rel=1e-10)
    again = blockhess.load(spectra.save(tmp_path / "a.npz"))
    assert again.block_rate_gain() == spectra.block_rate_gain()


def test_interrupted_runs_merged_and_extended_ones_have_the_norms(tmp_path: Any) -> None:
    model, data = tanh_net()
    given, options = (model, data, nn.CrossEntropyLoss()), {"num_steps": 4, "num_probes": 4, **QUIET}
    expected = blockhess.spectrum(*given, **options)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), after_products(40, interrupt):
        blockhess.spectrum(*given, run_dir=tmp_path / "run", **options)
    for _ in range(2):  # resumes, then returns the finished result
        assert blockhess.spectrum(*given, run_dir=tmp_path / "run", **options).block_rate_gain() == (
            expected.block_rate_gain()
        )
    halves = [blockhess.spectrum(*given, first_probe=p, **options | {"num_probes": 2}) for p in (0, 2)]
    merged, extended = blockhess.merge(halves), blockhess.extend(halves[0], *given, num_probes=4)
    for found in (merged, extended):
        assert found.provenance["gradient_norms"] == expected.provenance["gradient_norms"]
        assert found.block_rate_gain().value == pytest.approx(expected.block_rate_gain().value, rel=1e-12)
    old = dict(halves[0].provenance)
    del old["gradient_norms"], old["slices"]
    before = blockhess.Spectra(halves[0].blocks, halves[0].quadrature, old)
    with pytest.raises(ValueError, match="must hold the norms of the gradient"):
        before.block_rate_gain()
    assert blockhess.extend(before, *given, num_probes=4).block_rate_gain() == extended.block_rate_gain()


@pytest.mark.parametrize(("dtype", "away"), [(torch.float32, 1e-2), (torch.float64, 1e-8)])
@pytest.mark.parametrize("cuts", [(40,), (10, 30)])
@pytest.mark.parametrize("measured", [True, False])
def test_a_gradient_of_rounding_is_zero(dtype: torch.dtype, away: float, cuts: tuple[int, ...], measured: bool) -> None:
    """At the minimum of a least-squares problem the gradient is rounding, beside it it is not.

    The other precision may be one that the loss cannot be computed in.
    """
    torch.manual_seed(0)
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    model = nn.Linear(5, 2).to(dtype)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution.T
    data = list(zip(x.to(dtype).split(cuts), y.to(dtype).split(cuts)))

    def loss(model: nn.Module, batch: Any) -> Any:
        assert measured or batch[0].dtype == dtype
        return nn.functional.mse_loss(model(batch[0]), batch[1]), len(batch[0])

    for distance in (0.0, away):
        with torch.no_grad():
            model.weight.copy_(best[:, :5] + distance)
            model.bias.copy_(best[:, 5] + distance)
        with nullcontext() if measured else pytest.warns(UserWarning, match="errors of products are unknown"):
            spectra = blockhess.spectrum(model, data, loss, num_probes=2, **QUIET)
        sign = blockhess.sign_gain(model, data, loss)
        if distance:
            assert spectra.block_rate_gain().value >= 1 and sign.value > 0
        else:
            assert set(spectra.provenance["gradient_norms"].values()) == {0.0}
            with pytest.raises(ValueError, match="the gradient must not be zero"):
                spectra.block_rate_gain()
            assert sign.missing == "the gradient is zero within its rounding error"


def test_files_without_norms_say_what_is_missing() -> None:
    old = make_spectra([[[1.0], [2.0]]], [[[1.0], [1.0]]])
    with pytest.raises(
        ValueError, match="must hold the norms of the gradient, got none of 'block0'; compute them again"
    ):
        old.block_rate_gain()


def test_gradient_spread_by_hand() -> None:
    """R.m.s. entries 100, 1 and 0.01 of the weights: decades 2, 0, -2. Biases and blocks without a gradient are out."""
    model, data = tanh_net()
    spectra = blockhess.spectrum(*(model, data, nn.CrossEntropyLoss()), num_probes=1, num_steps=2, **QUIET)
    blocks = [replace(block, shape=(1, block.dim)) for block in spectra.blocks[:4]] + list(spectra.blocks[4:])
    wanted = [100.0, 1.0, 0.01, 0.0, 5.0, 7.0]
    norms = {b.name: size * b.dim**0.5 for b, size in zip(blocks, wanted)}

    def spread(norms: dict[str, float]) -> float:
        made = spectra.provenance | {"gradient_norms": norms}
        return blockhess.Spectra(
            blocks[:4] + blocks[5:], spectra.quadrature.select_blocks([0, 1, 2, 3, 5]), made
        ).gradient_spread()

    assert spread(norms) == pytest.approx(2.0, rel=1e-12)
    assert math.isnan(spread({name: 0.0 for name in norms}))
    with pytest.raises(ValueError, match="must hold the norms of the gradient"):
        spread({})


def test_refused_blocks() -> None:
    two: Any = ([[[1.0], [2.0]]], [[[1.0], [1.0]]])
    with pytest.raises(ValueError, match="gradient must not be zero in all blocks"):
        make_spectra(*two, gradient_norms={"block0": 0.0, "block1": 0.0}).block_rate_gain()
    flat = make_spectra([[[1.0], [0.0]]], [[[1.0], [1.0]]], gradient_norms={"block0": 1.0, "block1": 1.0})
    with pytest.raises(ValueError, match="two blocks at least must have a positive eigenvalue, got 1 of 2"):
        flat.block_rate_gain()
    with pytest.raises(ValueError, match="confidence must be"):
        make_spectra(*two, gradient_norms={"block0": 1.0, "block1": 0.0}).block_rate_gain(confidence=1.0)


def test_overlap_is_found_in_slices_groups_and_merged_runs() -> None:
    model, data = tanh_net()
    blocks: dict[str, Any] = {
        "rows": ParameterSlice("0.weight", 0, 4), "more": ParameterSlice("0.weight", 4, 8),
        "columns": ParameterSlice("0.weight", 1, 3, dim=1), "last": ["3.weight", "3.bias"], "bias": "3.bias",
    }  # fmt: skip
    given = model, data, nn.CrossEntropyLoss()
    options = {"num_probes": 2, "num_steps": 4, **QUIET}
    spectra = blockhess.spectrum(*given, blocks=blocks, **options)
    apart = [{"rows", "more"}, {"rows", "last"}, {"rows", "bias"}, {"more", "last"}, {"more", "bias"},
             {"columns", "last"}, {"columns", "bias"}]  # fmt: skip
    for pair in itertools.combinations(blocks, 2):
        if set(pair) in apart:
            assert spectra.block_rate_gain(blocks=pair).blocks == pair
        else:
            with pytest.raises(ValueError, match="blocks must not overlap"):
                spectra.block_rate_gain(blocks=pair)
    with pytest.raises(ValueError, match="blocks must not overlap"):
        spectra.block_rate_gain()
    whole = blockhess.spectrum(*given, blocks={"all": "0.weight", "last": ["3.weight", "3.bias"]}, **options)
    parts = blockhess.spectrum(*given, blocks={name: blocks[name] for name in ("rows", "more")}, **options)
    merged = blockhess.merge([whole, parts])
    assert merged.block_rate_gain(blocks=["rows", "more", "last"]).value >= 1
    with pytest.raises(ValueError, match=r"'all' and 'rows', which share entries of '0\.weight'"):
        merged.block_rate_gain(blocks=["rows", "all"])
