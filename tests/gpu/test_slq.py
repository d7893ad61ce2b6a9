"""batched_slq and spectrum on the GPU equal those on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import blockhess
from blockhess_ext import NonFiniteError, batched_slq
from tests.gpu import device
from tests.gpu.device import DEVICE, assert_near, assert_same_bits
from tests.helpers.tiny_models import labeled, mlp

device.require(cuda=False)

DIMS = (1, 5, 40, 333)
# 12 Lanczos steps amplify rounding, relative to |H|, by some thousands, in both dtypes.
GROWTH = 2**13


class Dense:
    """A dense block-diagonal operator; block 2 is zero, and `bad` makes a recurrence fail in the third call."""

    def __init__(self, where: str, dtype: torch.dtype, bad: bool = False) -> None:
        rng = torch.Generator().manual_seed(0)
        self.blocks = []
        for dim in DIMS:
            matrix = torch.randn(dim, dim, generator=rng, dtype=torch.float64)
            self.blocks.append(((matrix + matrix.T) / dim**0.5).to(where, dtype))
        self.blocks[2].zero_()
        self.bad, self.calls = bad, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.calls += 1
        w = torch.cat([x @ H for x, H in zip(v.split(DIMS, dim=1), self.blocks)], dim=1)
        if self.bad and self.calls == 3:
            w[1, -1] = float("nan")
        return w


def results(q: object) -> list[Tensor]:
    return [q.nodes, q.weights, q.alpha, q.beta, q.steps, q.nonfinite]


@pytest.mark.parametrize("reorthogonalize", ["none", "full", "partial", "auto"])
@pytest.mark.parametrize("distribution", ["gaussian", "rademacher"])
def test_batched_slq(reorthogonalize, distribution, dtype):
    options = {"num_probes": 2, "num_steps": 12, "reorthogonalize": reorthogonalize, "distribution": distribution}
    got, expected = (
        batched_slq(Dense(where, dtype), DIMS, dtype=dtype, device=where, **options) for where in (DEVICE, "cpu")
    )
    assert got.nodes.device.type == DEVICE
    tolerance = GROWTH * torch.finfo(dtype).eps
    assert_near([got.nodes, got.weights, got.steps], [expected.nodes, expected.weights, expected.steps], tolerance)
    for f in (lambda x: x, torch.square):
        (trace, _), (true_trace, _) = got.integrate(f), expected.integrate(f)
        assert_near([trace / max(DIMS)], [true_trace / max(DIMS)], tolerance)
    assert_same_bits(
        results(got), results(batched_slq(Dense(DEVICE, dtype), DIMS, dtype=dtype, device=DEVICE, **options))
    )


def test_a_failing_recurrence_stops_and_the_others_continue(dtype):
    options = {"num_probes": 2, "num_steps": 12, "dtype": dtype, "device": DEVICE}
    clean = batched_slq(Dense(DEVICE, dtype), DIMS, **options)
    with pytest.raises(NonFiniteError, match="block 3 at step 3 of probe 1") as error:
        batched_slq(Dense(DEVICE, dtype, bad=True), DIMS, **options)
    partial = error.value.partial
    others = ~partial.nonfinite
    assert partial.nonfinite.sum() == 1 and partial.steps[1, 3] == 2
    assert torch.equal(partial.nodes[others], clean.nodes[others])


@pytest.mark.parametrize("reorthogonalize", ["none", "full"])
def test_spectrum(reorthogonalize):
    torch.manual_seed(0)
    model, (x, y) = mlp().double(), labeled(16)
    data = (x.double(), y)

    def spectra(where: str) -> blockhess.Spectra:
        moved = copy.deepcopy(model).to(where)
        batch = tuple(part.to(where) for part in data)
        options = {"num_probes": 3, "num_steps": 8, "reorthogonalize": reorthogonalize, "progress": False}
        return blockhess.spectrum(moved, batch, nn.CrossEntropyLoss(), **options)

    got, expected = spectra(DEVICE), spectra("cpu")
    assert got.names == expected.names
    tolerance = GROWTH * torch.finfo(torch.float64).eps
    for name in got.names:
        a, b = got[name], expected[name]
        # Compare moments: where a Krylov space is nearly exhausted, rounding determines the last step.
        for power in range(4):
            assert_near([(a.weights * a.nodes**power).sum(1)], [(b.weights * b.nodes**power).sum(1)], tolerance)
    assert_near(list(got.trace()), list(expected.trace()), tolerance)
    assert float(got.js0()) == pytest.approx(float(expected.js0()), abs=1e-6)
