"""The work of the ops in plain PyTorch, as fast as it runs without custom kernels.

The Lanczos step has several implementations: vector by vector, block by block with all probes together, lists of
vectors with torch._foreach, and blocks of similar size padded to one tensor. Unless noted, sums are in float32, and
breakdown is not detected, which is less work than the op does. None synchronizes with a GPU more than necessary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from blockhess_ext.layout import Layout
from blockhess_ext.reference import gaussian_density

StepOf = Callable[..., Callable[[], list[Tensor]]]


def _advance(w: Tensor, v: Tensor, v_prev: Tensor, beta: Tensor, out: Tensor) -> None:
    """Write v_next into `out`; vectors are along the last dimension."""
    alpha = (w * v).sum(-1, keepdim=True)
    r = w - alpha * v - beta * v_prev
    torch.div(r, r.norm(dim=-1, keepdim=True), out=out)


def _advance_in_double(w: Tensor, v: Tensor, v_prev: Tensor, beta: Tensor, out: Tensor) -> None:
    """Write v_next into `out` with sums in float64, as the op does."""
    alpha = (w * v).sum(-1, keepdim=True, dtype=torch.float64).to(w.dtype)
    r = w - alpha * v - beta * v_prev
    torch.div(r, torch.linalg.vector_norm(r, dim=-1, keepdim=True, dtype=torch.float64).to(w.dtype), out=out)


def _advance_one(w: Tensor, v: Tensor, v_prev: Tensor, beta: Tensor, out: Tensor) -> None:
    r = w - torch.dot(w, v) * v - beta * v_prev
    torch.div(r, r.norm(), out=out)


def _step(advance: Callable[..., None], tasks: list[tuple[Tensor, ...]], compiled: bool) -> Callable[[], list[Tensor]]:
    """Return a step that advances the vectors (w, v, v_prev) with (beta,) of every task, into tensors of its own."""
    advance = torch.compile(advance, dynamic=True, fullgraph=True) if compiled else advance
    results = [torch.empty_like(task[0]) for task in tasks]

    def step() -> list[Tensor]:
        for task, result in zip(tasks, results):
            advance(*task, result)
        return results

    return step


def step_by_vector(
    w: Tensor, v: Tensor, v_prev: Tensor, beta_prev: Tensor, layout: Layout, compiled: bool = False
) -> Callable[[], list[Tensor]]:
    """Return a Lanczos step that processes one segment after another."""
    lists = [[s for row in x for s in row.split(layout.dims)] for x in (w, v, v_prev)]
    return _step(_advance_one, list(zip(*lists, beta_prev.to(w.dtype).flatten())), compiled)


def step_by_block(
    w: Tensor,
    v: Tensor,
    v_prev: Tensor,
    beta_prev: Tensor,
    layout: Layout,
    compiled: bool = False,
    one_block: Callable[..., None] = _advance,
) -> Callable[[], list[Tensor]]:
    """Return a Lanczos step that processes one block after another, vectorized over the probes."""
    split = [x.split(layout.dims, dim=1) for x in (w, v, v_prev)]
    return _step(one_block, list(zip(*split, beta_prev.to(w.dtype).T[:, :, None].contiguous())), compiled)


def step_by_foreach(
    w: Tensor, v: Tensor, v_prev: Tensor, beta_prev: Tensor, layout: Layout, compiled: bool = False
) -> Callable[[], list[Tensor]]:
    """Return a Lanczos step by torch._foreach over all segments.

    torch._foreach has no dot product. With |v| = 1 it is (|w + v|^2 - |w|^2 - 1) / 2, accurate where |w| is about 1.
    Scalars of a list must be on the host, which takes two synchronizations per step; a compiled step uses tensors.
    """
    lists = [[s for row in x for s in row.split(layout.dims)] for x in (w, v, v_prev)]
    w_all, v_all, v_prev_all = lists
    betas = beta_prev.flatten().tolist()

    def scalars(x: Tensor) -> Any:
        return list(x.unbind()) if compiled else x.tolist()

    def step() -> list[Tensor]:
        squares = torch.stack(torch._foreach_norm(torch._foreach_add(w_all, v_all))) ** 2
        squares -= torch.stack(torch._foreach_norm(w_all)) ** 2
        alphas = scalars((squares - 1) / 2)
        r = torch._foreach_sub(w_all, torch._foreach_mul(v_all, alphas))
        torch._foreach_sub_(r, torch._foreach_mul(v_prev_all, betas))
        torch._foreach_div_(r, scalars(torch.stack(torch._foreach_norm(r))))
        return r

    return torch.compile(step, fullgraph=True) if compiled else step


def padded_groups(dims: tuple[int, ...]) -> list[list[int]]:
    """Return groups of blocks whose sizes have the same leading power of two."""
    groups: dict[int, list[int]] = {}
    for l, dim in enumerate(dims):
        groups.setdefault(dim.bit_length(), []).append(l)
    return list(groups.values())


def step_by_padding(
    w: Tensor, v: Tensor, v_prev: Tensor, beta_prev: Tensor, layout: Layout, compiled: bool = False
) -> Callable[[], list[Tensor]]:
    """Return a Lanczos step on groups of padded blocks; packing and unpacking are not part of the step."""
    tasks = []
    for group in padded_groups(layout.dims):
        width = max(layout.dims[l] for l in group)
        padded = []
        for x in (w, v, v_prev):
            together = x.new_zeros(len(x), len(group), width)
            for i, l in enumerate(group):
                together[:, i, : layout.dims[l]] = x[:, layout.columns(l)]
            padded.append(together)
        tasks.append((*padded, beta_prev.to(w.dtype)[:, group, None]))
    return _step(_advance, tasks, compiled)


def _segments_joined(parts: list[Tensor], layout: Layout, n_probes: int) -> Tensor:
    return torch.cat(parts).view(n_probes, layout.n)


def _blocks_joined(parts: list[Tensor], layout: Layout, n_probes: int) -> Tensor:
    return torch.cat(parts, 1)


def _padding_removed(parts: list[Tensor], layout: Layout, n_probes: int) -> Tensor:
    result = parts[0].new_empty(n_probes, layout.n)
    for group, together in zip(padded_groups(layout.dims), parts):
        for i, l in enumerate(group):
            result[:, layout.columns(l)] = together[:, i, : layout.dims[l]]
    return result


# Name -> the function that makes the step, and the one that joins its result to (n_probes, n).
STEPS: dict[str, tuple[StepOf, Callable[[list[Tensor], Layout, int], Tensor]]] = {
    "PyTorch by vector": (step_by_vector, _segments_joined),
    "PyTorch by block": (step_by_block, _blocks_joined),
    "PyTorch by block, sums in float64": (partial(step_by_block, one_block=_advance_in_double), _blocks_joined),
    "torch._foreach": (step_by_foreach, _segments_joined),
    "padded PyTorch": (step_by_padding, _padding_removed),
}


def project_by_block(r: Tensor, basis: Tensor, layout: Layout) -> Callable[[], Tensor]:
    """Return a function that orthogonalizes a copy of r twice against the basis and normalizes it, block by block."""
    x = torch.empty_like(r)

    def project() -> Tensor:
        x.copy_(r)
        for p in range(len(x)):
            for l in range(layout.n_blocks):
                part, V = x[p, layout.columns(l)], basis[:, p, layout.basis_columns(l)]
                for _ in range(2):
                    part -= V.T @ (V @ part)
                part /= part.norm()
        return x

    return project


def quadrature_by_eigh(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes and weights of all problems by one batched dense eigendecomposition."""
    T = torch.diag_embed(alpha)
    T += torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
    nodes, vectors = torch.linalg.eigh(T)
    return nodes, vectors[:, 0, :] ** 2


def density_in_chunks(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
    """Return the densities by the broadcast formula, row by row to save memory."""
    rows = zip(nodes[:, None], weights[:, None], sigma[:, None])
    return torch.cat([gaussian_density(x, w, grid, s) for x, w, s in rows])


def density_by_point(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: Tensor, probes: int) -> Tensor:
    """Return the densities by the paper's loop over probes and points of the grid."""
    rows = []
    for x, w, s in zip(nodes, weights, sigma.tolist()):
        density = np.zeros(len(grid))
        for x_p, w_p in zip(x.view(probes, -1).numpy(), w.view(probes, -1).numpy()):
            for g, t in enumerate(grid.numpy()):
                density[g] += np.sum(w_p * np.exp(-((t - x_p) ** 2) / (2 * s * s)) / (s * math.sqrt(2 * math.pi)))
        rows.append(torch.from_numpy(density))
    return torch.stack(rows)
