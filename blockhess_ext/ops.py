"""Python functions of the compiled ops; `blockhess_ext.reference` implements the same functions in plain PyTorch.

All take tensors on one device, contiguous ones except in linear combinations. Vectors are float32 or float64; alpha,
beta, nodes and weights are float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import blockhess_ext._C  # noqa: F401  (registers the ops)
from blockhess_ext.arguments import VECTOR_DTYPES, choice, integer
from blockhess_ext.device import build_command, has_cuda
from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import Recurrences

DISTRIBUTIONS = ("gaussian", "rademacher")

_ops = torch.ops.blockhess_ext
# Without the overload resolution, which costs a microsecond.
_linear_combination = _ops.linear_combination.default
_linear_combination_sum = _ops.linear_combination_sum.default


def lanczos_step(
    w: Tensor,
    v: Tensor,
    v_prev: Tensor,
    recurrences: Recurrences,
    layout: Layout,
    partial: Tensor,
) -> None:
    """Make one step of every Lanczos recurrence, given w = H v.

        alpha = <w, v>;  r = w - alpha v - beta_prev v_prev;  beta = |r|;  v_next = r / beta, written to v_prev

    Recurrence (p, l) writes row steps[p, l] of alpha and beta; beta_prev is in the row before, or 0 in the first step.
    The recurrence finishes when beta <= 64 eps |T|, when it reaches its limit, or when no row is left. It stops with
    alpha = beta = 0 if either is not finite. From then on its segment of v_next is zero and nothing else of it changes.
    In blocks with a stored basis, v_prev receives the unnormalized r, and `reorthogonalize` completes the step.

    Args:
        w: (n_probes, n) products H v; only read.
        v: (n_probes, n) current vectors, every segment of norm 1; only read.
        v_prev: (n_probes, n) previous vectors; overwritten with v_next.
        recurrences: coefficients and status, updated in place.
        layout: the blocks.
        partial: (n_probes, n_tiles) float64 scratch.

    Source: the paper's Algorithm 4.
    """
    r = recurrences
    _ops.lanczos_step(
        w, v, v_prev, r.alpha, r.beta, r.norm, r.steps, r.status, r.limits,
        layout.basis_offsets, layout.offsets, layout.tiles, layout.tile_offsets, partial,
    )  # fmt: skip


def reorthogonalize(
    r: Tensor,
    basis: Tensor,
    recurrences: Recurrences,
    layout: Layout,
    partial: Tensor,
    project: Tensor | None = None,
) -> None:
    """Complete a step in the blocks with a stored basis: orthogonalize r against it twice, then normalize.

        twice:  r <- r - V (V^T r);    beta = |r|;    v_next = r / beta, written to r and to the next basis row, if any

    Args:
        r: (n_probes, n) residuals of `lanczos_step`; overwritten with v_next in these blocks.
        basis: (capacity, n_probes, n_basis); rows 0 ... steps[p, l] of recurrence (p, l) are filled.
        recurrences: coefficients and status, updated in place.
        layout: the blocks; those with basis_offsets >= 0 take part.
        partial: (n_probes, n_tiles, capacity + 1) float64 scratch.
        project: (n_probes, n_blocks) int32, 0 to skip the projections of a recurrence; None projects all.

    Source: Giraud, Langou, Rozloznik 2005.
    """
    s = recurrences
    _ops.reorthogonalize(
        r, basis, layout.basis_offsets, layout.basis_tiles, s.alpha, s.beta, s.norm, s.steps, s.status, s.limits,
        project, layout.offsets, layout.tiles, layout.tile_offsets, partial,
    )  # fmt: skip


def tridiag_quadrature(alpha: Tensor, beta: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gauss quadratures of tridiagonal matrices T.

    Nodes are the eigenvalues of T, weights the squared first components of its eigenvectors.

    Args:
        alpha: (n_problems, m) float64 diagonals.
        beta: (n_problems, m) float64 off-diagonals; beta[:, j] couples j and j + 1, the last valid entry is not used.
        steps: (n_problems,) int64, size of each matrix, 0 ... m.

    Returns:
        nodes, weights: (n_problems, m) float64; nodes ascend and weights sum to 1. Beyond `steps` the last node is
        repeated with weight 0.

    Raises:
        RuntimeError: a problem has a non-finite entry or does not converge. On a GPU this check synchronizes;
            `torch.ops.blockhess_ext.tridiag_quadrature` does not, and sets all nodes of such a problem to NaN.

    Source: Golub and Welsch 1969; the paper's Theorem 4.

    Example:
        >>> one = torch.ones(1, 2, dtype=torch.float64)
        >>> tridiag_quadrature(0 * one, one, torch.tensor([2]))[0]
        tensor([[-1.0000,  1.0000]], dtype=torch.float64)
    """
    nodes, weights = _ops.tridiag_quadrature(alpha, beta, steps)
    if nodes.is_cuda and bool(nodes[:, :1].isnan().any()):
        raise RuntimeError(
            "tridiag_quadrature: alpha and beta must be finite and converge, and steps in 0 ... m, problem "
            f"{int(nodes[:, 0].isnan().nonzero()[0])} does not"
        )
    return nodes, weights


def gaussian_density(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
    """Return the density of weighted nodes smoothed by a Gaussian, with one sigma per row.

        density[b, g] = sum_k weights[b, k] exp(-(grid[g] - nodes[b, k])^2 / (2 sigma_b^2)) / (sigma_b sqrt(2 pi))

    Args:
        nodes, weights: (n_rows, n_nodes) float64.
        grid: (n_grid,) float64, ascending.
        sigma: (n_rows,) float64, positive.

    Returns:
        (n_rows, n_grid) float64; each Gaussian is truncated where it falls below 1e-16 of its peak.

    Source: the paper's appendix B.2.
    """
    density: Tensor = _ops.gaussian_density(nodes, weights, grid, sigma)
    return density


def random_probes(
    layout: Layout,
    num_probes: int,
    *,
    seed: int,
    block_ids: Tensor,
    first_probe: int = 0,
    distribution: str = "gaussian",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return random probe vectors; each segment is a pure function of (seed, probe index, block id).

    Args:
        layout: the blocks; the probes are generated on its device.
        num_probes: number of probes.
        seed: 0 ... 2^63 - 1.
        block_ids: (n_blocks,) int64, key of each block.
        first_probe: index of the first probe.
        distribution: "gaussian" or "rademacher"; every segment is normalized to norm 1.
        dtype: float32 or float64.

    Returns:
        (num_probes, n).

    Source: Philox4x32-10, Salmon et al. 2011.
    """
    integer("num_probes", num_probes, 0, op="random_probes")
    integer("seed", seed, 0, 2**63 - 1, "random_probes")
    choice("distribution", distribution, DISTRIBUTIONS, "random_probes")
    choice("dtype", dtype, VECTOR_DTYPES, "random_probes")
    device = layout.offsets.device
    probes = torch.empty(num_probes, layout.n, dtype=dtype, device=device)
    partial = torch.empty(num_probes, layout.n_tiles, dtype=torch.float64, device=device)
    _ops.random_probes(
        probes, seed, first_probe, DISTRIBUTIONS.index(distribution), block_ids,
        layout.offsets, layout.tiles, layout.tile_offsets, partial,
    )  # fmt: skip
    return probes


def linear_combination(
    out: Tensor,
    bases: list[Tensor],
    coefficients: list[Tensor | None],
    scalars: list[float],
    first_rows: list[int],
) -> None:
    """Write a linear combination of up to 16 tensors with coefficients shared by the rows.

        out[r, i] = sum_k scalars[k] coefficients[k][i] bases[k][r - first_rows[k], i]

    A term contributes to the rows r for which r - first_rows[k] is a row of its base; rows without terms become 0.

    Args:
        out: (R, *shape), float32 or float64, at most 8 dimensions, of any strides without overlap; overwritten. It may
            be one of the bases that has all R rows.
        bases: (R_k, *shape_k) of any strides, where shape_k has as many dimensions as shape and broadcasts to it.
        coefficients: (*shape_k) of any strides, with as many dimensions as shape and broadcasting to it; None for 1.
        scalars: one per base.
        first_rows: row of out that corresponds to row 0 of the base.

    Raises:
        RuntimeError: a number of terms, a shape, a dtype or a device does not fit.

    Example:
        >>> out = torch.empty(2, 3)
        >>> linear_combination(out, [torch.ones(1, 3)], [torch.tensor([1.0, 2.0, 3.0])], [10.0], [1])
        >>> out
        tensor([[ 0.,  0.,  0.],
                [10., 20., 30.]])
    """
    _linear_combination(out, bases, coefficients, scalars, first_rows)


def linear_combination_sum(
    out: Tensor,
    bases: list[Tensor],
    coefficients: list[Tensor | None],
    scalars: list[float],
    first_rows: list[int],
) -> None:
    """Write the sum of a linear combination over the last dimension.

        out[r, i, 0] = sum_j sum_k scalars[k] coefficients[k][i, j] bases[k][r - first_rows[k], i, j]

    Args:
        out: (R, *shape[:-1], 1), where the last size of shape is the largest of all terms; not one of the bases.
        bases, coefficients, scalars, first_rows: as in `linear_combination`. Sums accumulate in their dtype.
    """
    _linear_combination_sum(out, bases, coefficients, scalars, first_rows)


def _nothing(*args: object) -> None:
    """Do nothing: the op only writes to its arguments."""


def _quadrature_shapes(alpha: Tensor, beta: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(alpha), torch.empty_like(alpha)


def _density_shape(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
    return nodes.new_empty(nodes.shape[0], grid.shape[0])


# Fake implementations, for torch.compile and torch.export.
_FAKES: dict[str, Callable[..., object]] = {
    "lanczos_step": _nothing,
    "reorthogonalize": _nothing,
    "random_probes": _nothing,
    "tridiag_quadrature": _quadrature_shapes,
    "gaussian_density": _density_shape,
    "linear_combination": _nothing,
    "linear_combination_sum": _nothing,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"blockhess_ext::{_name}", _fake)


def _refuse_cuda(*args: object) -> None:
    raise ValueError(f"blockhess_ext.ops: tensors must be on the CPU in a build without CUDA; {build_command()}")


if not has_cuda():
    for _name in _FAKES:
        torch.library.impl(f"blockhess_ext::{_name}", "cuda", _refuse_cuda)
