"""Partial reorthogonalisation: a basis orthogonal to sqrt(eps), the spectrum of a full one, by fewer projections."""

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
    """Ritz values converge to outliers early on, which is what costs the orthogonality."""
    outliers = torch.tensor([2.0, 3, 5, 8, 13, 21], dtype=torch.float64)
    return {
        "outliers": torch.cat([torch.linspace(0, 1, N - 6, dtype=torch.float64), outliers]),
        "power law": torch.arange(1, N + 1, dtype=torch.float64) ** -1.5,
        "uniform": torch.linspace(-1, 1, N, dtype=torch.float64),
    }


class Spied:
    """A diagonal operator that keeps its vectors, while the projections of the loop are counted."""

    def __init__(self, eigenvalues: Tensor) -> None:
        self.eigenvalues, self.inputs, self.projections = eigenvalues, [], 0

    def __call__(self, v: Tensor) -> Tensor:
        self.inputs.append(v.clone())
        return v * self.eigenvalues.to(v.dtype)

    def orthogonality(self) -> float:
        """The largest |<v_i, v_j>|, i != j, of one probe."""
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
def test_a_basis_orthogonal_to_the_root_of_eps_by_fewer_projections(name, dtype, counted):
    found = {}
    for word in ("full", "partial", "none"):
        operator = Spied(spectra()[name])
        counted[0] = 0
        q = batched_slq(operator, [N], num_probes=PROBES, num_steps=STEPS, dtype=dtype, reorthogonalize=word)
        found[word] = operator.orthogonality(), counted[0], q
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
    if name == "uniform":  # nothing converges: hardly anything is to be done
        assert projections < 20
    else:  # without projections all is lost
        assert found["none"][0] > 0.5 and projections > 0


def test_the_estimate_follows_the_loss():
    """What the recurrence expects of a run without projections, against its vectors: within a factor of 100, whether
    it is small or large. It grows from eps to 1, so a wrong recurrence would be off by powers of ten."""
    d = spectra()["outliers"]
    operator = Spied(d)
    q = batched_slq(operator, [N], num_probes=1, num_steps=40, dtype=torch.float64, reorthogonalize="none")
    recurrences = Recurrences.start(1, torch.tensor([40]))
    watch = PartialReorthogonalization(recurrences, torch.tensor([True]), 2.0**-52)
    basis = torch.stack([v[0] for v in operator.inputs])
    grown = []
    for j in range(39):
        recurrences.alpha[j], recurrences.beta[j] = q.alpha[0, 0, j], q.beta[0, 0, j]
        watch._again.zero_()
        due = bool(watch.due())
        true = float((basis[: j + 1] @ basis[j + 1]).abs().max())
        estimate = float(watch._now[: j + 1].abs().max())
        recurrences.steps.add_(1)
        recurrences.norm[:] = max(float(recurrences.norm), float(q.alpha[0, 0, j].abs()), float(q.beta[0, 0, j]))
        if due:
            break
        grown.append(true)
        assert true < 10 * estimate and estimate < 1000 * max(true, 1e-16)
    # Where it was before the step that is due hangs on rounding: 3e-11 ... 8e-9 for a dozen probes.
    assert due and len(grown) > 5 and 1e-12 < grown[-1] < 1e-7


def test_blocks_of_every_kind_side_by_side(dtype):
    """Each as alone: the mask of one block is no business of the others."""
    d = spectra()
    parts = [d["outliers"], d["power law"], d["outliers"], torch.tensor([1.0, 2.0]).double()]
    dims, words = [len(part) for part in parts], ["partial", "none", "full", "partial"]
    together = Spied(torch.cat(parts))
    q = batched_slq(together, dims, num_probes=PROBES, num_steps=40, dtype=dtype, reorthogonalize=words)
    assert q.reorthogonalize == tuple(words)
    for l, part in enumerate(parts):
        alone = batched_slq(
            Spied(part), [dims[l]], num_probes=PROBES, num_steps=40, dtype=dtype, reorthogonalize=[words[l]],
            block_ids=[l],
        )  # fmt: skip
        m = alone.nodes.shape[-1]
        assert torch.equal(alone.steps[:, 0], q.steps[:, l])
        assert torch.equal(alone.nodes[:, 0], q.nodes[:, l, :m])


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_exhausted_spaces_end_as_with_full(scale, dtype):
    d = scale * torch.tensor([0.0] * 100 + [1.0] * 50 + [2.0, 5.0, 5.0], dtype=torch.float64)
    q, full = (
        batched_slq(Spied(d), [len(d)], num_probes=PROBES, dtype=dtype, reorthogonalize=word)
        for word in ("partial", "full")
    )
    assert ((q.steps == full.steps) | (q.steps == full.steps + 1)).all() and (full.steps <= 5).all()
    tolerance = 1000 * torch.finfo(dtype).eps * 5 * scale
    assert float((q.nodes.amax(-1) - 5 * scale).abs().max()) < tolerance
