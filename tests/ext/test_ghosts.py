"""Ghosts: counted without reorthogonalization, and none with an orthogonal basis."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import blockhess
from blockhess.report.text import describe
from blockhess_ext import batched_slq
from blockhess_ext.ghosts import count_ghosts

N = 600
OUTLIERS = torch.tensor([2.0, 3, 5, 8, 13, 21], dtype=torch.float64)
EIGENVALUES = torch.cat([torch.linspace(0, 1, N - len(OUTLIERS), dtype=torch.float64), OUTLIERS])


@pytest.mark.parametrize("steps", [30, 80])
def test_additional_nodes_at_outliers_are_counted(steps, dtype):
    """Six eigenvalues lie above 1.5, so further nodes there are ghosts. One may be in transit: a new copy passes
    through the bulk, where it counts as spurious, or lies between two outliers, where it does not."""
    q = batched_slq(
        lambda v: v * EIGENVALUES.to(v.dtype), [N], num_probes=3, num_steps=steps, dtype=dtype, reorthogonalize="none"
    )
    extra = (q.nodes > 1.5).sum(-1) - len(OUTLIERS)
    assert ((q.ghosts() - extra).abs() <= 1).all() and (extra >= 4).all()


@pytest.mark.parametrize("mode", ["full", "partial"])
def test_an_orthogonal_basis_has_none(mode, dtype):
    q = batched_slq(lambda v: v * EIGENVALUES.to(v.dtype), [N], num_steps=80, dtype=dtype, reorthogonalize=mode)
    assert (q.ghosts() == 0).all()


def test_by_hand():
    """A copy in float32; a decoupled first row, so that the other nodes have no weight; no ghosts; a single node."""
    alpha = torch.tensor([[1.0, 1.0, 5.0], [1.0, 2.0, 3.0], [1.0, 1.0, 5.0], [7.0, 7.0, 7.0]], dtype=torch.float64)
    beta = torch.tensor([[1e-9, 0.5, 0], [1e-18, 0.5, 0], [0.1, 0.1, 0], [9.0, 9.0, 0]], dtype=torch.float64)
    steps = torch.tensor([2, 3, 3, 1])
    assert count_ghosts(alpha, beta, steps, torch.float32).tolist() == [1, 2, 0, 0]
    assert count_ghosts(alpha, beta, steps, torch.float64).tolist() == [0, 2, 0, 0]
    assert count_ghosts(alpha[:, :1].contiguous(), beta[:, :1].contiguous(), steps * 0 + 1, torch.float32).sum() == 0


class Outliers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.flat = nn.Parameter(torch.ones(N)), nn.Parameter(torch.ones(N))

    def forward(self, scale: torch.Tensor) -> torch.Tensor:
        return scale * (EIGENVALUES.float() @ self.w**2 + torch.linspace(0, 1, N) @ self.flat**2) / 2


def test_spectrum_reports_them():
    options = {"num_probes": 2, "num_steps": 30, "engine": "autograd"}
    arguments = Outliers(), torch.ones(()), lambda model, batch: (model(batch), 1.0)
    spectra = blockhess.spectrum(*arguments, **options, reorthogonalize="none")
    count = int(spectra.quadrature.ghosts().sum())
    assert spectra.provenance["ghosts"] == {"w": count} and count >= 8
    assert f"{count} nodes in 1 blocks are ghosts" in describe(spectra)
    full = blockhess.spectrum(*arguments, **options, reorthogonalize="full")
    assert full.provenance["ghosts"] == {} and "ghosts" not in describe(full)
