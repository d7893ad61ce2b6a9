"""Reference implementations of `blockhess_ext.ops` in plain PyTorch, against which every backend is tested."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from blockhess_ext.layout import Layout
from blockhess_ext.recurrences import EXHAUSTED_EPS, FINISHED, LEAST_SIZE, MOST_SIZE, NON_FINITE, RUNNING, Recurrences


def _close_step(p: int, l: int, recurrences: Recurrences, eps: float) -> float:
    """Count the step of recurrence (p, l) or end it; return 1 / beta, or 0 if it ended."""
    alpha, beta, j = recurrences.alpha, recurrences.beta, int(recurrences.steps[p, l])
    a, b = alpha[j, p, l].item(), beta[j, p, l].item()
    norm = max(recurrences.norm[p, l].item(), abs(a))
    size = max(norm, b)
    if not (math.isfinite(a) and math.isfinite(b) and (size == 0 or LEAST_SIZE <= size <= MOST_SIZE)):
        alpha[j, p, l] = beta[j, p, l] = 0.0
        recurrences.status[p, l] = NON_FINITE
        return 0.0
    recurrences.norm[p, l] = size
    recurrences.steps[p, l] += 1
    if b <= EXHAUSTED_EPS * eps * norm or j + 1 >= min(int(recurrences.limits[l]), len(alpha)):
        recurrences.status[p, l] = FINISHED
        return 0.0
    return 1.0 / b


def lanczos_step(
    w: Tensor,
    v: Tensor,
    v_prev: Tensor,
    recurrences: Recurrences,
    layout: Layout,
    partial: Tensor | None = None,
) -> None:
    """Equivalent to `ops.lanczos_step`."""
    eps = torch.finfo(v.dtype).eps
    for p in range(v.shape[0]):
        for l in range(layout.n_blocks):
            columns = layout.columns(l)
            if recurrences.status[p, l] != RUNNING:
                v_prev[p, columns] = 0.0
                continue
            j = int(recurrences.steps[p, l])
            w_, v_, v_prev_ = (x[p, columns].double() for x in (w, v, v_prev))
            alpha = w_ @ v_
            beta_prev = recurrences.beta[j - 1, p, l] if j > 0 else 0.0
            r = (w_ - alpha * v_ - beta_prev * v_prev_).to(v.dtype)
            beta = r.double().norm()
            recurrences.alpha[j, p, l], recurrences.beta[j, p, l] = alpha, beta
            finite = bool(alpha.isfinite() and beta.isfinite())
            if layout.basis_offsets[l] >= 0 and finite:
                v_prev[p, columns] = r
                continue
            factor = _close_step(p, l, recurrences, eps)
            v_prev[p, columns] = (factor * r.double()).to(r.dtype) if factor else 0.0


def reorthogonalize(
    r: Tensor,
    basis: Tensor,
    recurrences: Recurrences,
    layout: Layout,
    partial: Tensor | None = None,
    project: Tensor | None = None,
) -> None:
    """Equivalent to `ops.reorthogonalize`."""
    eps = torch.finfo(r.dtype).eps
    for p in range(r.shape[0]):
        for l in range(layout.n_blocks):
            in_basis = layout.basis_columns(l)
            if in_basis is None or recurrences.status[p, l] != RUNNING:
                continue
            columns, j = layout.columns(l), int(recurrences.steps[p, l])
            V = basis[: j + 1, p, in_basis].double()
            x = r[p, columns]
            for _ in range(2 if project is None or project[p, l] else 0):
                x = (x.double() - V.T @ (V @ x.double())).to(r.dtype)
            recurrences.beta[j, p, l] = x.double().norm()
            factor = _close_step(p, l, recurrences, eps)
            r[p, columns] = (factor * x.double()).to(r.dtype) if factor else 0.0
            if factor and j + 1 < len(basis):
                basis[j + 1, p, in_basis] = r[p, columns]


def tridiag_quadrature(alpha: Tensor, beta: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Equivalent to `ops.tridiag_quadrature`."""
    nodes, weights = torch.zeros_like(alpha), torch.zeros_like(alpha)
    for b, k in enumerate(steps.tolist()):
        if k == 0:
            continue
        T = alpha[b, :k].diag() + beta[b, : k - 1].diag(1) + beta[b, : k - 1].diag(-1)
        eigenvalues, eigenvectors = torch.linalg.eigh(T)
        nodes[b, :k], weights[b, :k] = eigenvalues, eigenvectors[0] ** 2
        nodes[b, k:] = eigenvalues[-1]
    return nodes, weights


def gaussian_density(nodes: Tensor, weights: Tensor, grid: Tensor, sigma: Tensor) -> Tensor:
    """Equivalent to `ops.gaussian_density`."""
    z = (grid[None, :, None] - nodes[:, None, :]) / sigma[:, None, None]
    gauss = torch.exp(-0.5 * z**2) / (sigma[:, None, None] * math.sqrt(2 * math.pi))
    return (weights[:, None, :] * gauss).sum(-1)


def linear_combination(
    out: Tensor,
    bases: list[Tensor],
    coefficients: list[Tensor | None],
    scalars: list[float],
    first_rows: list[int],
) -> None:
    """Equivalent to `ops.linear_combination`."""
    total = torch.zeros_like(out)
    for base, coefficient, scalar, first in zip(bases, coefficients, scalars, first_rows, strict=True):
        begin, end = max(0, first), max(0, min(len(out), first + len(base)))
        rows = base[max(0, -first) : max(0, end - first)] * scalar
        total[begin:end] += rows if coefficient is None else rows * coefficient
    out.copy_(total)


def linear_combination_sum(
    out: Tensor,
    bases: list[Tensor],
    coefficients: list[Tensor | None],
    scalars: list[float],
    first_rows: list[int],
) -> None:
    """Equivalent to `ops.linear_combination_sum`."""
    sizes = {x.shape[-1] for x in [*bases, *coefficients] if x is not None and x.shape[-1] != 1}
    total = out.new_empty(*out.shape[:-1], *(sizes or {1}))
    linear_combination(total, bases, coefficients, scalars, first_rows)
    out.copy_(total.sum(-1, keepdim=True))


def _philox(counter: Tensor, key: Tensor) -> Tensor:
    """Return Philox4x32-10 of counters (..., 4) and keys (..., 2), 32-bit words stored as int64."""
    low = 0xFFFFFFFF
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)

    def multiply(constant: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the high and low word of constant * x, from 16-bit halves: int64 cannot hold the product."""
        upper, lower = constant * (x >> 16), constant * (x & 0xFFFF)
        product_low = ((upper & 0xFFFF) << 16) + (lower & low)
        return (upper >> 16) + (lower >> 32) + (product_low >> 32), product_low & low

    for _ in range(10):
        high0, low0 = multiply(0xD2511F53, c0)
        high1, low1 = multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([c0, c1, c2, c3], dim=-1)


def _words(value: Tensor) -> Tensor:
    """Split int64 values into 32-bit words, low word first: (...,) -> (..., 2)."""
    return torch.stack([value & 0xFFFFFFFF, (value >> 32) & 0xFFFFFFFF], dim=-1)


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
    """Equivalent to `ops.random_probes`."""
    probes = torch.empty(num_probes, layout.n, dtype=dtype, device="cpu")
    for p in range(num_probes):
        for l, dim in enumerate(layout.dims):
            id_and_probe = torch.cat([_words(block_ids[l]), _words(torch.tensor(first_probe + p, device="cpu"))])
            key = _philox(id_and_probe, _words(torch.tensor(seed, device="cpu")))[:2]
            counters = _words(torch.arange((dim + 3) // 4, device="cpu"))
            words = _philox(torch.cat([counters, torch.zeros_like(counters)], dim=-1), key)
            if distribution == "rademacher":
                x = (1.0 - 2.0 * (words >> 31)).flatten()[:dim].double() / math.sqrt(dim)
            else:
                a, b = words[:, 0::2].double(), words[:, 1::2].double()
                radius, angle = (-2 * ((a + 0.5) * 2**-32).log()).sqrt(), 2 * math.pi * b * 2**-32
                x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten()[:dim]
                x = x / x.norm()
            probes[p, layout.columns(l)] = x.to(dtype)
    return probes
