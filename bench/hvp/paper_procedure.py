"""The paper's procedure in plain PyTorch, as its public code (zyushun/hessian-spectrum) implements it.

For every probe and every Lanczos step of all blocks together: one forward pass, one first backward pass that retains
its graph, and for every block l a second backward pass of <g_l, v_l> through the whole graph to all parameters, of
which only the part of block l is used. Vectors are float64 on the CPU with one update each in Python (Algorithm 4), and
every tridiagonal matrix takes one numpy.linalg.eigh. Two details differ so that results can be compared: the probes are
an argument, and a recurrence stops when its Krylov space is exhausted instead of dividing rounding errors by 1e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Loss = Callable[[nn.Module, Any], tuple[Tensor, float]]

# block -> nodes and weights of every probe
Quadratures = dict[str, list[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]]


@dataclass
class _Recurrence:
    """The Lanczos recurrence of one block and one probe."""

    vector: Tensor
    previous: Tensor
    max_steps: int
    alpha: list[float] = field(default_factory=list)
    beta: list[float] = field(default_factory=list)
    finished: bool = False

    def advance(self, product: Tensor) -> None:
        """Make one step of Algorithm 4, with product = H_l vector."""
        alpha = torch.sum(product * self.vector)
        residual = product - alpha * self.vector
        if self.beta:
            residual = residual - self.beta[-1] * self.previous
        beta = torch.norm(residual)
        self.alpha.append(float(alpha))
        self.beta.append(float(beta))
        # The model computes in float32: a residual below its rounding means an exhausted Krylov space.
        scale = max(map(abs, self.alpha + self.beta))
        exhausted = self.beta[-1] <= 64 * torch.finfo(torch.float32).eps * scale
        self.finished = exhausted or len(self.alpha) == self.max_steps
        if not self.finished:
            self.previous, self.vector = self.vector, residual / beta

    def quadrature(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Return nodes and weights: the eigenvalues of T and the squared first entries of its eigenvectors."""
        coupling = self.beta[: len(self.alpha) - 1]
        tridiagonal = np.diag(self.alpha) + np.diag(coupling, 1) + np.diag(coupling, -1)
        nodes, vectors = np.linalg.eigh(tridiagonal)
        return nodes, vectors[0] ** 2


def first_backward(model: nn.Module, batch: Any, loss_fn: Loss) -> tuple[dict[str, Tensor], float]:
    """Return name -> gradient in float64 with its graph, which all blocks share in a step, and the batch's weight."""
    parameters = dict(model.named_parameters())
    loss, weight = loss_fn(model, batch)
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    return dict(zip(parameters, (g.double() for g in gradients), strict=True)), weight


def second_backward(model: nn.Module, name: str, gradient: Tensor, vector: Tensor) -> Tensor | None:
    """Return H_l v from the gradient of block `name` and a float64 vector of its shape; None if independent of it."""
    parameters = dict(model.named_parameters())
    inner = torch.sum(gradient * vector)
    columns = torch.autograd.grad(inner, list(parameters.values()), retain_graph=True, allow_unused=True)
    column = dict(zip(parameters, columns, strict=True))[name]
    return None if column is None else column.double()


def lanczos(
    products: Callable[[dict[str, Tensor]], dict[str, Tensor]], probes: Sequence[dict[str, Tensor]], num_steps: int
) -> Quadratures:
    """Return the nodes and weights of every block and probe.

    Args:
        products: Maps block -> vector to block -> H_l vector, float64.
        probes: For every probe, block -> unit vector.
        num_steps: Lanczos steps, at most the dimension of each block.
    """
    result: Quadratures = {name: [] for name in probes[0]}
    for probe in probes:
        recurrences = {
            name: _Recurrence(vector.double(), torch.zeros(()), min(num_steps, vector.numel()))
            for name, vector in probe.items()
        }
        while running := {name: r.vector for name, r in recurrences.items() if not r.finished}:
            for name, product in products(running).items():
                recurrences[name].advance(product)
        for name, recurrence in recurrences.items():
            result[name].append(recurrence.quadrature())
    return result
