"""random_probes: known Philox bits, unit norm, purity in (seed, probe, block id, position), and the distribution."""

from __future__ import annotations

import math

import pytest
import torch

from blockhess_ext import ops, reference
from blockhess_ext.layout import Layout

DIMS = (1, 2, 5, 32768, 70_001)
IDS = torch.tensor([11, 2**62 + 3, 0, 7, 2**63 - 1])


def make(module=ops, dims=DIMS, ids=IDS, num_probes=2, seed=2**61 + 5, **options) -> torch.Tensor:
    return module.random_probes(Layout.of(dims), num_probes, seed=seed, block_ids=ids, **options)


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # known-answer vectors of the Random123 distribution
        ([0, 0, 0, 0], [0, 0], [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_the_reference_is_philox(counter, key, words):
    assert reference._philox(torch.tensor(counter), torch.tensor(key)).tolist() == words


@pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)
def test_cpu_equals_reference(distribution, dtype):
    got = make(distribution=distribution, dtype=dtype)
    expected = make(reference, distribution=distribution, dtype=dtype)
    if distribution == "rademacher":
        assert torch.equal(got, expected)
    else:
        torch.testing.assert_close(got, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-15)


@pytest.mark.parametrize("distribution", ops.DISTRIBUTIONS)
def test_segments_have_norm_one(distribution, dtype):
    probes = make(distribution=distribution, dtype=dtype)
    layout = Layout.of(DIMS)
    for l in range(len(DIMS)):
        for segment in probes[:, layout.columns(l)].tolist():
            assert math.fsum(x * x for x in segment) == pytest.approx(1.0, abs=16 * torch.finfo(dtype).eps)


def test_a_segment_depends_on_its_own_key_alone():
    whole = make()
    layout = Layout.of(DIMS)
    for l in (0, 2, 4):
        alone = make(dims=DIMS[l : l + 1], ids=IDS[l : l + 1])
        assert torch.equal(alone, whole[:, layout.columns(l)])
    assert torch.equal(make(num_probes=1, first_probe=1), whole[1:])
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(make(seed=2**61 + 6), whole)
    assert not torch.equal(make(ids=IDS.roll(1))[:, layout.columns(4)], whole[:, layout.columns(4)])


def test_same_bits_for_one_and_two_threads():
    before, results = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(make())
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_gaussian_values_are_normal_and_uncorrelated():
    n = 200_000
    x = make(dims=(n,), ids=torch.tensor([1]), num_probes=2, dtype=torch.float64) * math.sqrt(n)
    for moment, expected, spread in [(1, 0, 1), (2, 1, 0), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))]:
        assert abs((x[0] ** moment).mean().item() - expected) <= 5 * spread / math.sqrt(n) + 1e-12
    assert abs((x[0] @ x[1]).item() / n) <= 5 / math.sqrt(n)
    assert abs((x[0, 1:] @ x[0, :-1]).item() / n) <= 5 / math.sqrt(n)


def test_rademacher_signs_are_balanced():
    n = 200_000
    x = make(dims=(n,), ids=torch.tensor([1]), distribution="rademacher", dtype=torch.float64)
    assert x.abs().unique().tolist() == [1 / math.sqrt(n)]
    assert abs(x.sign().sum(1)).max() <= 5 * math.sqrt(n)


@pytest.mark.parametrize("distribution", [0, 1])
def test_opcheck(distribution, dtype):
    layout = Layout.of((1, 3))
    tables = (torch.tensor([1, 2]), layout.offsets, layout.tiles, layout.tile_offsets)
    arguments = (torch.empty(2, 4, dtype=dtype), 5, 0, distribution, *tables, torch.empty(2, 2, dtype=torch.float64))
    torch.library.opcheck(torch.ops.blockhess_ext.random_probes.default, arguments)
