"""The Lanczos recurrences of other packages, restated in a few lines each, next to blockhess_ext.batched_slq.

Every function makes `num_steps` steps from the unit vectors v (n_probes, n) with hvp: (n_probes, n) -> (n_probes, n),
one product per probe and step, and returns alpha, beta (n_probes, num_steps) float64; beta[:, j] couples steps j and
j + 1. The quadratures of fewer steps follow from the leading columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from blockhess_ext import batched_slq

Operator = Callable[[Tensor], Tensor]
Recurrence = Callable[[Operator, Tensor, int], tuple[Tensor, Tensor]]


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(1, keepdim=True)


def blockhess(hvp: Operator, v: Tensor, num_steps: int, reorthogonalize: str) -> tuple[Tensor, Tensor]:
    """This package, float32 vectors; steps after the Krylov space is exhausted have alpha = beta = 0."""
    q = batched_slq(hvp, [v.shape[1]], probes=v.float(), num_steps=num_steps, reorthogonalize=reorthogonalize)
    alpha, beta = (torch.zeros(len(v), num_steps, dtype=torch.float64) for _ in range(2))
    alpha[:, : q.alpha.shape[2]], beta[:, : q.beta.shape[2]] = q.alpha[:, 0], q.beta[:, 0]
    return alpha, beta


def paper(hvp: Operator, v: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """zyushun/hessian-spectrum: three-term recurrence, float64 vectors; a norm below 1e-8 is replaced by 1e-8."""
    v, before, beta = v.double(), torch.zeros_like(v, dtype=torch.float64), torch.zeros(len(v), 1).double()
    columns = []
    for _ in range(num_steps):
        w = hvp(v.float()).double()
        alpha = _dots(w, v)
        w = w - alpha * v - beta * before
        beta = w.norm(dim=1, keepdim=True)
        before, v = v, w / beta.clamp(min=1e-8)
        columns.append((alpha, beta))
    return _joined(columns)


def pyhessian(hvp: Operator, v: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """PyHessian 0.1: beta before reorthogonalization, one Gram-Schmidt pass, division by norm + 1e-6; float32."""
    v = v.float()
    basis, columns = [v], []
    beta = torch.zeros(len(v), 1)
    for _ in range(num_steps):
        w = hvp(basis[-1])
        alpha = _dots(w, basis[-1])
        w = w - alpha * basis[-1] - (beta * basis[-2] if len(basis) > 1 else 0.0)
        beta = w.norm(dim=1, keepdim=True)
        for u in basis:
            w = w - _dots(w, u) * u
        basis.append(w / (w.norm(dim=1, keepdim=True) + 1e-6))
        columns.append((alpha, beta))
    return _joined(columns)


def curvlinops_like(hvp: Operator, v: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:
    """curvlinops 3: one Gram-Schmidt pass, beta after it, division by a norm that may be 0; float32."""
    v = v.float()
    basis, columns = [v], []
    for _ in range(num_steps):
        w = hvp(basis[-1])
        alpha = _dots(w, basis[-1])
        for u in basis:
            w = w - _dots(w, u) * u
        beta = w.norm(dim=1, keepdim=True)
        basis.append(w / beta)
        columns.append((alpha, beta))
    return _joined(columns)


def _joined(columns: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    alpha, beta = (torch.cat(part, 1).double() for part in zip(*columns))
    return alpha, beta


RECURRENCES: dict[str, Recurrence] = {
    "blockhess, none": lambda hvp, v, m: blockhess(hvp, v, m, "none"),
    "blockhess, full": lambda hvp, v, m: blockhess(hvp, v, m, "full"),
    "paper's code": paper,
    "PyHessian": pyhessian,
    "curvlinops-like": curvlinops_like,
}
