"""Exact spectra of small blocks: the dense Hessian from products with unit vectors, and its eigenvalues.

The result is the Gauss quadrature of the spectral density itself, that of a start vector with equal weight on every
eigenvector. It is the same for every probe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from blockhess.hvp.operator import BlockOperator
from blockhess_ext import Quadrature, State, batched_slq


def is_cheaper_exact(dim: int, num_probes: int, num_steps: int) -> bool:
    """Return whether the dense Hessian needs fewer products than Lanczos."""
    return dim < num_probes * min(num_steps, dim)


def exact_quadratures(
    operator: BlockOperator,
    block_ids: Sequence[int],
    num_probes: int,
    num_steps: int,
    seed: int,
    distribution: str,
    state: State | None = None,
    on_state: Callable[[State], None] = lambda state: None,
) -> list[Quadrature]:
    """Return the quadratures of all blocks of an operator from dims[l] products per block.

    Args:
        operator: Hessian-vector products of the blocks.
        block_ids, num_probes, num_steps, seed, distribution: metadata of the quadratures.
        state, on_state: as in `batched_slq`. One step computes one row per block and probe; the tensors are the dense
            matrices.

    Returns:
        One Quadrature per block. The nodes are the distinct eigenvalues, the weights their relative multiplicities. A
        block whose products are not finite has steps = 0 and `nonfinite` set.
    """
    problem, dims = operator.problem, operator.dims
    rows = max(1, min(num_probes, max(dims)))
    dense = [torch.zeros(dim, dim, dtype=problem.dtype, device="cpu") for dim in dims]
    if state is not None:
        dense = [state.tensors[str(l)] for l in range(len(dims))]
    for first in range(0 if state is None else state.step, max(dims), rows):
        v = torch.zeros(rows, sum(dims), dtype=problem.dtype, device=problem.device)
        finished = torch.ones(rows, len(dims), dtype=torch.bool, device="cpu")
        for l, (dim, vectors) in enumerate(zip(dims, torch.split(v, dims, dim=1))):
            vectors[:, first:].diagonal().fill_(1)
            finished[: max(0, dim - first), l] = False
        operator.mark_finished(finished)
        for matrix, products in zip(dense, torch.split(operator(v), dims, dim=1)):
            part = matrix[first : first + rows]
            part.copy_(products[: len(part)])
        on_state(State(first + rows, ("exact",) * len(dims), {str(l): matrix for l, matrix in enumerate(dense)}))
    metadata: dict[str, Any] = {"seed": seed, "distribution": distribution, "num_steps": num_steps}
    metadata |= {"reorthogonalize": ("exact",), "dtype": str(problem.dtype).removeprefix("torch.")}
    return [
        replace(_quadrature(_eigenvalues(matrix), num_probes), block_ids=(block_id,), **metadata)
        for matrix, block_id in zip(dense, block_ids)
    ]


def bytes_needed(dims: Sequence[int], itemsize: int, num_probes: int) -> int:
    """Return the peak memory of `exact_quadratures` for blocks of these dimensions.

    It holds all dense blocks, three float64 copies of the largest one for the eigenvalues, and twice the four tensors
    of the quadratures, (num_probes, n_blocks, largest dim) each.
    """
    largest = max(dims, default=0)
    return sum(itemsize * dim * dim for dim in dims) + 24 * largest**2 + 2 * 32 * num_probes * len(dims) * largest


def _eigenvalues(matrix: Tensor) -> Tensor:
    matrix = matrix.double()
    if not bool(matrix.isfinite().all()):
        return matrix.new_full((len(matrix),), torch.nan)
    matrix = matrix.add(matrix.mT).div_(2)  # frees the first copy
    eigenvalues: Tensor = torch.linalg.eigvalsh(matrix)
    return eigenvalues


def _quadrature(eigenvalues: Tensor, num_probes: int) -> Quadrature:
    """Return the Gauss quadrature of the spectral density, by Lanczos on diag(eigenvalues) from (1, ..., 1)."""
    dim = len(eigenvalues)
    ones = torch.ones(1, dim, dtype=torch.float64, device="cpu")
    one = batched_slq(
        lambda v: v * eigenvalues, [dim], num_steps=dim, probes=ones, reorthogonalize="full", on_nonfinite="mark"
    )
    return Quadrature.concatenate([one] * num_probes, 0)
