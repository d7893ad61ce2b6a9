"""Spectra made by hand, for the tests of densities, divergences, files and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from blockhess.problem.blocks import BlockInfo
from blockhess.spectra import Spectra
from blockhess_ext import Quadrature


def float64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def make_spectra(
    nodes: Any,
    weights: Any,
    *,
    dims: Sequence[int] | None = None,
    steps: Any = None,
    nonfinite: Any = None,
    names: Sequence[str] | None = None,
    notes: Sequence[str] | None = None,
    dtype: str = "float32",
    **provenance: Any,
) -> Spectra:
    """Spectra of nodes and weights (n_probes, n_blocks, m)."""
    nodes, weights = float64(nodes), float64(weights)
    n_probes, n_blocks, m = nodes.shape
    dims = tuple(dims or [m] * n_blocks)
    steps = torch.full((n_probes, n_blocks), m) if steps is None else torch.tensor(steps)
    names = names or [f"block{i}" for i in range(n_blocks)]
    notes = notes or [""] * n_blocks
    quadrature = Quadrature(
        nodes=nodes,
        weights=weights,
        alpha=nodes / 3,
        beta=torch.where(steps[..., None] == 1, 0.0, weights / 7),  # a single step that exhausts its Krylov space
        steps=steps,
        nonfinite=torch.zeros(n_probes, n_blocks, dtype=torch.bool) if nonfinite is None else torch.tensor(nonfinite),
        dims=dims,
        block_ids=tuple(range(n_blocks)),
        num_steps=m,
        seed=3,
        distribution="gaussian",
        reorthogonalize=("full",) * n_blocks,
        dtype=dtype,
    )
    blocks = [BlockInfo(name, (dim,), dim, (name,), note) for name, dim, note in zip(names, dims, notes)]
    return Spectra(blocks, quadrature, provenance)


def random_spectra(n_probes: int = 3, n_blocks: int = 4, m: int = 12, seed: int = 0, **options: Any) -> Spectra:
    """Blocks of random nodes, whose scales differ by powers of ten."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randn(n_probes, n_blocks, m, generator=generator, dtype=torch.float64).sort(-1).values
    nodes *= 10.0 ** -torch.arange(n_blocks)[:, None]
    weights = torch.rand(n_probes, n_blocks, m, generator=generator, dtype=torch.float64) ** 4
    weights /= weights.sum(-1, keepdim=True)
    return make_spectra(nodes.tolist(), weights.tolist(), **options)


# Two probes, three blocks: a plain one, a single eigenvalue 4 (of one element), an all-zero one.
HAND = {
    "nodes": [
        [[-1.0, 2.0, 3.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]],
        [[-1.0, 1.0, 3.0], [4.0, 4.0, 4.0], [0.0, 0.0, 0.0]],
    ],
    "weights": [[[0.5, 0.25, 0.25], [1.0, 0, 0], [1.0, 0, 0]], [[0.25, 0.25, 0.5], [1.0, 0, 0], [1.0, 0, 0]]],
    "dims": [10, 1, 7],
    "steps": [[3, 1, 1], [3, 1, 1]],
}


def hand(**options: object) -> Spectra:
    return make_spectra(**{**HAND, **options})  # type: ignore[arg-type]


def as_spectra(q: Quadrature) -> Spectra:
    return Spectra([BlockInfo(f"b{i}", (dim,), dim, (f"b{i}",)) for i, dim in enumerate(q.dims)], q, {})
