"""Operators of known spectrum, and the exact spectral measures of their probes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from blockhess_ext import Quadrature, batched_slq


@dataclass
class Seen:
    """A quadrature of a diagonal operator and its exact spectral measures.

    Attributes:
        quadrature: quadrature of one block.
        eigenvalues: (n,) ascending.
        weights: (n_probes, n), squared components of the probes.
    """

    quadrature: Quadrature
    eigenvalues: Tensor
    weights: Tensor

    def cdf(self, x: Tensor) -> Tensor:
        """Return the exact distribution function of every probe, (n_probes, n_points)."""
        return self.weights @ (self.eigenvalues[:, None] <= x).double()


def lanczos(eigenvalues: Tensor, num_probes: int = 3, num_steps: int = 20, **options: object) -> Seen:
    """Run batched_slq on a diagonal operator; options are passed on."""
    eigenvalues = eigenvalues.double().sort().values
    seen: list[Tensor] = []

    def operator(v: Tensor) -> Tensor:
        seen.append(v.clone())
        return v * eigenvalues.to(v.dtype)

    settings = {"dtype": torch.float64, "reorthogonalize": "full", **options}
    q = batched_slq(operator, [len(eigenvalues)], num_probes=num_probes, num_steps=num_steps, **settings)  # type: ignore[arg-type]
    weights = seen[0].double() ** 2
    return Seen(q, eigenvalues, weights / weights.sum(1, keepdim=True))


def spectra(n: int = 300) -> dict[str, Tensor]:
    """Return six kinds of spectra, (n,) each."""
    rng = torch.Generator().manual_seed(0)
    t = torch.linspace(0, 1, n, dtype=torch.float64)
    spikes = 0.05 * torch.randn(n, generator=rng, dtype=torch.float64)
    spikes[:4] = torch.tensor([-0.7, 0.5, 0.8, 1.0])
    low_rank = torch.zeros(n, dtype=torch.float64)
    low_rank[: n // 10] = torch.rand(n // 10, generator=rng, dtype=torch.float64)
    return {
        "uniform": t,
        "arcsine": (torch.pi * t).cos(),
        "power law": (1 + (n - 1) * t) ** -1.5,
        "spikes and bulk": spikes,
        "low rank": low_rank,
        "bimodal": torch.cat([t[: n // 2] - 2, t[n // 2 :] + 2]),
    }
