"""What one would write without the kernels: the same work in plain PyTorch. None of them waits more than it must."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockhess_ext.layout import Layout
from blockhess_ext.reference import gaussian_density


def step_by_block(
    w: Tensor, v: Tensor, v_prev: Tensor, beta_prev: Tensor, layout: Layout
) -> Callable[[], list[Tensor]]:
    """A Lanczos step, vectorised over the probes, block after block, without a wait.

    Sums are in float32 and no recurrence is watched for its end, which is less work than the op's. It writes to copies,
    made here, so that every call does the same.
    """
    split = [x.split(layout.dims, dim=1) for x in (w, v, v_prev)]
    betas = beta_prev.to(w.dtype).T[:, :, None].contiguous()
    results = [torch.empty_like(x) for x in split[0]]

    def step() -> list[Tensor]:
        for w_l, v_l, v_prev_l, beta_l, out in zip(*split, betas, results):
            alpha = (w_l * v_l).sum(1, keepdim=True)
            r = w_l - alpha * v_l - beta_l * v_prev_l
            torch.div(r, r.norm(dim=1, keepdim=True), out=out)
        return results

    return step


def step_by_foreach(
    w: Tensor, v: Tensor, v_prev: Tensor, beta_prev: Tensor, layout: Layout
) -> Callable[[], list[Tensor]]:
    """A Lanczos step by torch._foreach over all segments.

    There is no dot product of lists; with |v| = 1 it is (|w + v|^2 - |w|^2 - 1) / 2, which suits a speed test only
    where |w| is about 1. Scalars of a list must be on the host: two waits a step.
    """
    lists = [[s for row in x for s in row.split(layout.dims)] for x in (w, v, v_prev)]
    w_all, v_all, v_prev_all = lists
    betas = beta_prev.flatten().tolist()

    def step() -> list[Tensor]:
        squares = torch.stack(torch._foreach_norm(torch._foreach_add(w_all, v_all))) ** 2
        squares -= torch.stack(torch._foreach_norm(w_all)) ** 2
        alphas = ((squares - 1) / 2).tolist()
        r = torch._foreach_sub(w_all, torch._foreach_mul(v_all, alphas))
        torch._foreach_sub_(r, torch._foreach_mul(v_prev_all, betas))
        torch._foreach_div_(r, torch.stack(torch._foreach_norm(r)).tolist())
        return r

    return step


def quadrature_by_eigh(alpha: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes and weights of all problems by one batched dense eigendecomposition."""
    T = torch.diag_embed(alpha)
    T += torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
    nodes, vectors = torch.linalg.eigh(T)
    return nodes, vectors[:, 0, :] ** 2


def density_in_chunks(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
    """The broadcast formula, row by row, since all rows at once would not fit in any memory."""
    rows = [
        gaussian_density(nodes[b : b + 1], weights[b : b + 1], grid, sigma[b : b + 1]) for b in range(nodes.shape[0])
    ]
    return torch.cat(rows)
