"""Partial reorthogonalization: orthogonality to sqrt(eps) and the spectrum of full, with fewer projections."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from blockhess_ext import batched_slq, ops
from blockhess_ext.partial_reorthogonalization import PartialReorthogonalization
from blockhess_ext.recurrences import RUNNING, Recurrences

N, STEPS, PROBES = 600, 80, 2


def spectra() -> dict[str, Tensor]:
    """Return three spectra. Ritz values converge to outliers early, which destroys orthogonality."""
    outliers = torch.tensor([2.0, 3, 5, 8, 13, 21], dtype=torch.float64)
    return {
        "outliers": torch.cat([torch.linspace(0, 1, N - 6, dtype=torch.float64), outliers]),
        "power law": torch.arange(1, N + 1, dtype=torch.float64) ** -1.5,
        "uniform": torch.linspace(-1, 1, N, dtype=torch.float64),
    }


class Recording:
    """A diagonal operator that records its arguments."""

    def __init__(self, eigenvalues: Tensor) -> None:
        self.eigenvalues, self.inputs = eigenvalues, []

    def __call__(self, v: Tensor) -> Tensor:
        self.inputs.append(v.clone())
        return v * self.eigenvalues.to(v.dtype)

    def orthogonality(self) -> float:
        """Return the largest |<v_i, v_j>|, i != j, over all probes."""
        worst = 0.0
        for p in range(PROBES):
            basis = torch.stack([v[p] for v in self.inputs]).double()
            worst = max(worst, float((basis @ basis.T).fill_diagonal_(0.0).abs().max()))
        return worst


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    count = [0]
    real = ops.reorthogonalize

    def spy(r: Tensor, basis: Tensor, recurrences: Recurrences, layout: object, partial: Tensor, project=None) -> None:
        running = recurrences.status == RUNNING
        count[0] += int((running if project is None else running & (project != 0)).sum())
        real(r, basis, recurrences, layout, partial, project)

    monkeypatch.setattr(ops, "reorthogonalize", spy)
    yield count


@pytest.mark.parametrize("name", ["outliers", "power law", "uniform"])
def test_orthogonality_to_sqrt_eps_with_fewer_projections(name, dtype, counted):
    found = {}
    for mode in ("full", "partial", "none"):
        operator = Recording(spectra()[name])
        counted[0] = 0
        q = batched_slq(operator, [N], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize=mode)
        found[mode] = operator.orthogonality(), counted[0], q
    eps = torch.finfo(dtype).eps
    orthogonality, projections, q = found["partial"]
    assert orthogonality < 10 * math.sqrt(eps) and q.reorthogonalize == ("partial",)
    full = found["full"][2]
    scale = float(full.nodes.abs().max())
    assert float((q.nodes - full.nodes).abs().max()) < 100 * eps * scale
    assert float((q.weights - full.weights).abs().max()) < 100 * math.sqrt(eps)
    assert found["full"][1] == PROBES * STEPS > 1.2 * projections
    if dtype == torch.float64:
        assert projections <= found["full"][1] / 2
    if name == "uniform":  # no Ritz value converges: almost no projections
        assert projections < 20
    else:  # without projections orthogonality is lost
        assert found["none"][0] > 0.5 and projections > 0


def test_the_estimate_follows_the_loss():
    """The estimate for a run without projections bounds the true loss, within a few orders of magnitude, while it grows
    from eps to 1; a wrong recurrence would be off by many more."""
    d = spectra()["outliers"]
    operator = Recording(d)
    q = batched_slq(operator, [N], num_probes=1, num_steps=40, dtype=torch.float64, reorthogonalize="none")
    recurrences = Recurrences.start(1, torch.tensor([40]))
    rule = PartialReorthogonalization(recurrences, torch.tensor([True]), 2.0**-52)
    basis = torch.stack([v[0] for v in operator.inputs])
    grown = []
    for j in range(39):
        recurrences.alpha[j], recurrences.beta[j] = q.alpha[0, 0, j], q.beta[0, 0, j]
        rule._again.zero_()
        due = bool(rule.select())
        true = float((basis[: j + 1] @ basis[j + 1]).abs().max())
        estimate = float(rule._now[: j + 1].abs().max())
        recurrences.steps.add_(1)
        recurrences.norm[:] = max(float(recurrences.norm), float(q.alpha[0, 0, j].abs()), float(q.beta[0, 0, j]))
        if due:
            break
        grown.append(true)
        assert true < 10 * estimate and estimate < 1000 * max(true, 1e-16)
    # The loss before the first projection depends on rounding: 3e-11 ... 8e-9 for a dozen probes.
    assert due and len(grown) > 5 and 1e-12 < grown[-1] < 1e-7


def test_blocks_of_every_kind_side_by_side(dtype):
    """Each block has the same bits as alone: the masks are independent."""
    d = spectra()
    parts = [d["outliers"], d["power law"], d["outliers"], torch.tensor([1.0, 2.0]).double()]
    dims, modes = [len(part) for part in parts], ["partial", "none", "full", "partial"]
    together = Recording(torch.cat(parts))
    q = batched_slq(together, dims, num_probes=PROBES, num_steps=40, dtype=dtype, reorthogonalize=modes)
    assert q.reorthogonalize == tuple(modes)
    for l, part in enumerate(parts):
        alone = batched_slq(
            Recording(part), [dims[l]], num_probes=PROBES, num_steps=40, dtype=dtype, reorthogonalize=[modes[l]],
            block_ids=[l],
        )  # fmt: skip
        m = alone.nodes.shape[-1]
        assert torch.equal(alone.steps[:, 0], q.steps[:, l])
        assert torch.equal(alone.nodes[:, 0], q.nodes[:, l, :m])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_exhausted_spaces_end_as_with_full(scale, dtype):
    d = scale * torch.tensor([0.0] * 100 + [1.0] * 50 + [2.0, 5.0, 5.0], dtype=torch.float64)
    q, full = (
        batched_slq(Recording(d), [len(d)], num_probes=PROBES, dtype=dtype, reorthogonalize=mode)
        for mode in ("partial", "full")
    )
    assert ((q.steps == full.steps) | (q.steps == full.steps + 1)).all() and (full.steps <= 5).all()
    tolerance = 1000 * torch.finfo(dtype).eps * 5 * scale
    assert float((q.nodes.amax(-1) - 5 * scale).abs().max()) < tolerance
