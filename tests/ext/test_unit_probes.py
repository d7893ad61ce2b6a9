"""Given probes are normalized without overflow or underflow of their squares."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess_ext.arguments import unit_probes
from blockhess_ext.layout import Layout

SCALES = [(torch.float32, s) for s in (2.0**125, 2.0**-126)] + [(torch.float64, s) for s in (2.0**1020, 2.0**-1022)]


@pytest.mark.parametrize(("dtype", "scale"), SCALES)
def test_the_scale_changes_no_bit(dtype, scale, rng):
    layout = Layout.of([70, 3, 1])
    probes = torch.randn(4, layout.n, generator=rng, dtype=dtype)
    scaled = probes.sign() * (1 + probes.abs()) * scale
    unit = unit_probes(scaled, layout)
    assert torch.equal(unit, unit_probes(scaled / scale, layout))
    for l in range(3):
        norms = unit[:, layout.columns(l)].double().norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms), rtol=0, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("dtype", "smallest"), [(torch.float32, 2.0**-149), (torch.float64, 2.0**-1074)])
def test_extreme_probes_become_unit_vectors(dtype, smallest):
    largest = torch.finfo(dtype).max
    probes = torch.tensor([[largest, -largest], [smallest, smallest]], dtype=dtype)
    expected = torch.tensor([[1, -1], [1, 1]], dtype=dtype) / math.sqrt(2)
    torch.testing.assert_close(unit_probes(probes, Layout.of([2])), expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("bad", [0.0, math.inf, -math.inf, math.nan])
def test_zero_and_non_finite_probes_are_refused(bad):
    probes = torch.ones(2, 4)
    probes[1, 2:] = bad
    with pytest.raises(ValueError, match=r"probes must be finite and nonzero in every block, .* in block 1 of probe 1"):
        unit_probes(probes, Layout.of([2, 2]))
