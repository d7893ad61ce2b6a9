"""Quadrature: integrals with their standard errors, and concatenation of the parts of a run."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch

from blockhess_ext import Quadrature, batched_slq
from tests.ext.test_slq import DIMS, BlockDiagonal, symmetric


@pytest.fixture
def operator(rng: torch.Generator) -> BlockDiagonal:
    return BlockDiagonal([symmetric(n, rng) for n in DIMS])


def test_integrate_estimates_traces_and_their_errors(rng):
    A = symmetric(400, rng)
    A = A @ A / 400 + torch.eye(400, dtype=torch.float64)
    exact = torch.linalg.eigvalsh(A).log().sum()
    deviations = []
    for seed in range(40):
        q = batched_slq(lambda v: v @ A, [400], num_probes=10, num_steps=40, dtype=torch.float64, seed=seed)
        value, stderr = q.integrate(torch.log)
        deviations.append(((value - exact) / stderr).item())
    within = sum(abs(d) < 2.26 for d in deviations)  # 95 % of Student's t with 9 degrees of freedom
    assert 34 <= within <= 40
    assert abs(sum(deviations)) / 40 < 0.6  # unbiased


def test_the_error_is_that_of_the_mean(operator):
    q = batched_slq(operator, DIMS, num_probes=5, num_steps=6)
    each = (q.weights * q.nodes**2).sum(-1)
    by_hand = torch.tensor(DIMS) * each.std(0) / math.sqrt(5)
    torch.testing.assert_close(q.integrate(torch.square)[1][1:], by_hand[1:])


def test_integrate_skips_recurrences_without_a_step():
    def hvp(v: torch.Tensor) -> torch.Tensor:
        w = 2 * v
        w[0, 0] = math.nan
        w[:, 3] = math.nan
        return w

    q = batched_slq(hvp, [3, 4], num_probes=4, on_nonfinite="mark")
    values, stderr = q.integrate(lambda x: x)
    assert values[0].item() == pytest.approx(6) and stderr[0] < 1e-6
    assert values[1].isnan() and stderr[1] == math.inf


def test_integrate_with_one_probe_and_one_element():
    q = batched_slq(lambda v: 3 * v, [1, 2], num_probes=1)
    values, stderr = q.integrate(torch.sqrt)
    assert values.tolist() == pytest.approx([math.sqrt(3), 2 * math.sqrt(3)])
    assert stderr.tolist() == [0.0, math.inf]


def test_integrate_rejects_non_finite_values(operator):
    q = batched_slq(operator, DIMS)
    with pytest.raises(ValueError, match=r"integrate: f must be finite at every node, got nan at node -.* of block"):
        q.integrate(torch.log)
    with pytest.raises(ValueError, match=r"integrate: f must return shape \(10, 4, 30\), got \(\)"):
        q.integrate(torch.sum)


class RowByRow(BlockDiagonal):
    """The same operator with rounding that does not depend on the number of vectors."""

    def __call__(self, v: torch.Tensor) -> torch.Tensor:
        parts = zip(v.split(self.dims, dim=1), self.blocks)
        return torch.cat([(x[:, None, :] * block).sum(-1) for x, block in parts], dim=1)


def test_concatenated_parts_equal_the_whole_run():
    rng = torch.Generator().manual_seed(0)
    operator = RowByRow([symmetric(n, rng) for n in DIMS])
    options = {"num_steps": 9, "dtype": torch.float64, "seed": 3, "block_ids": [5, 6, 7, 8]}
    each = ["none", "full", "full", "none"]
    whole = batched_slq(operator, DIMS, num_probes=5, reorthogonalize=each, **options)
    assert whole.reorthogonalize == tuple(each)
    probes = [
        batched_slq(operator, DIMS, first_probe=a, num_probes=b - a, reorthogonalize=each, **options)
        for a, b in ((0, 2), (2, 5))
    ]
    same(Quadrature.concatenate(probes, 0), whole)
    assert not torch.equal(probes[0].nodes, probes[1].nodes[:2])

    halves = []
    for blocks in ([0, 1], [2, 3]):
        part = RowByRow([operator.blocks[l] for l in blocks])
        chosen = options | {"block_ids": [options["block_ids"][l] for l in blocks]}
        halves.append(batched_slq(part, part.dims, num_probes=5, reorthogonalize=[each[l] for l in blocks], **chosen))
    assert halves[0].nodes.shape[-1] == 2  # no block of the first half makes more steps
    same(Quadrature.concatenate(halves, 1), whole)
    same(Quadrature.concatenate(halves[::-1], 1).select_blocks([2, 3, 0, 1]), whole)

    other = batched_slq(operator, DIMS, num_probes=1, **(options | {"seed": 4}))
    with pytest.raises(ValueError, match="parts must have the same seed, got 3 and 4"):
        Quadrature.concatenate([whole, other], 0)


def same(a: Quadrature, b: Quadrature) -> None:
    for field in dataclasses.fields(Quadrature):
        one, two = getattr(a, field.name), getattr(b, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, field.name


def test_equality_compares_values():
    q = batched_slq(lambda v: 2 * v, [3, 4], num_steps=2)
    again = copy.deepcopy(q)
    assert q == again and hash(q) == hash(again) and q in [again]
    again.nodes[0, 0, 0] += 1
    assert q != again and q != dataclasses.replace(q, seed=7) and q != "q"
