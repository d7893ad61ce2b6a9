"""The result of stochastic Lanczos quadrature: nodes and weights of every probe and block, and integrals of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from blockhess_ext.ghosts import count_ghosts

_TENSORS = ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")


@dataclass(frozen=True)
class Quadrature:
    """Gauss quadratures of n_probes x n_blocks spectral measures.

    For probe p, block l and a function f:  v^T f(H_l) v  is about  sum_i weights[p, l, i] f(nodes[p, l, i]).

    Attributes:
        nodes: (n_probes, n_blocks, m) float64, ascending; beyond `steps` the last node is repeated.
        weights: (n_probes, n_blocks, m) float64, sum to 1 over the last axis; 0 beyond `steps`.
        alpha: (n_probes, n_blocks, m) float64, diagonals of the tridiagonal matrices.
        beta: (n_probes, n_blocks, m) float64; beta[..., j] couples steps j and j + 1, the last valid one
            is the residual.
        steps: (n_probes, n_blocks) int64, valid Lanczos steps.
        nonfinite: (n_probes, n_blocks) bool, recurrences frozen because the operator returned NaN, inf or what
            is out of range; their quadrature is that of the steps before.
        dims: size of each block.
        block_ids: what keys the probes of each block.
        num_steps: steps asked for.
        seed: of the probes; None where they were given.
        distribution: "gaussian", "rademacher" or "given".
        reorthogonalize: "none", "full" or "partial", what was done in each block; "exact" where no probe was needed, as
            the quadrature is that of the spectral density itself.
        dtype: of the vectors.
    """

    nodes: Tensor
    weights: Tensor
    alpha: Tensor
    beta: Tensor
    steps: Tensor
    nonfinite: Tensor
    dims: tuple[int, ...]
    block_ids: tuple[int, ...]
    num_steps: int
    seed: int | None
    distribution: str
    reorthogonalize: tuple[str, ...]
    dtype: str

    @staticmethod
    def joined(parts: Sequence[Quadrature], dim: int) -> Quadrature:
        """One result of several, each for other probes (dim 0) or other blocks (dim 1) of the same run.

        Blocks of fewer probes than others get recurrences of no step.

        Raises:
            ValueError: they disagree in what they should share.
        """
        first = parts[0]
        per_block = ("dims", "block_ids", "reorthogonalize")
        shared = ("num_steps", "seed", "distribution", "dtype") + (per_block if dim == 0 else ())
        for name in shared:
            for part in parts[1:]:
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(
                        f"joined: parts must have the same {name}, got {getattr(first, name)!r} and "
                        f"{getattr(part, name)!r}"
                    )
        m = max(part.nodes.shape[-1] for part in parts)
        rows = max(part.num_probes for part in parts) if dim == 1 else 0

        def filled(part: Quadrature, name: str) -> Tensor:
            values: Tensor = getattr(part, name)
            if values.dim() == 3:
                values = _padded(values, m, repeat=name == "nodes")
            missing = max(rows - len(values), 0)
            return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values

        tensors: dict[str, Any] = {name: torch.cat([filled(part, name) for part in parts], dim) for name in _TENSORS}
        lists = {name: sum((getattr(part, name) for part in parts), ()) for name in per_block} if dim == 1 else {}
        changed: dict[str, Any] = tensors | lists
        return replace(first, **changed)

    def to(self, device: torch.device | str) -> Quadrature:
        """The same with its tensors on another device."""
        moved: dict[str, Any] = {name: getattr(self, name).to(device) for name in _TENSORS}
        return replace(self, **moved)

    def of_blocks(self, blocks: Sequence[int]) -> Quadrature:
        """The part that belongs to these blocks, in this order."""
        chosen: dict[str, Any] = {name: getattr(self, name)[:, list(blocks)] for name in _TENSORS}
        for name in ("dims", "block_ids", "reorthogonalize"):
            chosen[name] = tuple(getattr(self, name)[l] for l in blocks)
        return replace(self, **chosen)

    def is_exact(self, block: int) -> bool:
        """Whether every probe of a block gives the spectral density itself: it was written out, or has one element."""
        return self.dims[block] == 1 or self.reorthogonalize[block] == "exact"

    def of_block(self, block: int) -> Quadrature:
        """The part that belongs to one block: of the probes that it was given, as many steps as it has elements."""
        part = self.of_blocks([block])
        given = ((part.steps > 0) | part.nonfinite)[:, 0]
        chosen: dict[str, Any] = {name: getattr(part, name)[given] for name in _TENSORS}
        for name in ("nodes", "weights", "alpha", "beta"):
            chosen[name] = chosen[name][..., : self.dims[block]].clone()  # a view would hold the whole
        return replace(part, **chosen)

    @property
    def num_probes(self) -> int:
        """Number of probes."""
        return self.nodes.shape[0]

    @property
    def valid(self) -> Tensor:
        """Which nodes are results of Lanczos steps and not padding, (n_probes, n_blocks, m) bool."""
        return torch.arange(self.nodes.shape[-1], device=self.nodes.device) < self.steps[..., None]

    def ghosts(self) -> Tensor:
        """How many nodes of each recurrence stand for no eigenvalue of their own, (n_probes, n_blocks) int64.

        They come with a lost orthogonality, so without reorthogonalisation. Densities and integrals lose nothing by
        them; see `ghosts.count_ghosts`.
        """
        alpha, beta = self.alpha.flatten(0, 1), self.beta.flatten(0, 1)
        return count_ghosts(alpha, beta, self.steps.flatten(), getattr(torch, self.dtype)).view_as(self.steps)

    def integrate(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Trace of f(H_l) of every block, with its standard error over the probes.

        tr f(H_l)  is about  dims_l * mean over probes of sum_i weights_i f(nodes_i)

        Args:
            f: maps a float64 tensor of nodes to values of the same shape.

        Returns:
            values, stderr: (n_blocks,) float64. With one probe the error is infinite, as nothing is known of it;
            an exact block has error 0. Recurrences frozen before
            their first step are left out; where a block has no other, its value is NaN and its error infinite.

        Raises:
            ValueError: f is not finite at a node that carries weight, or returns another shape.

        Source: Ubaru, Chen, Saad 2017; the paper's appendix B.2.

        Example:
            >>> from blockhess_ext import batched_slq
            >>> q = batched_slq(lambda v: 2 * v, [3])
            >>> q.integrate(torch.log)[0]  # log-determinant of 2 I: 3 log 2
            tensor([2.0794], dtype=torch.float64)
        """
        values = f(self.nodes)
        if not isinstance(values, Tensor) or values.shape != self.nodes.shape:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(f"integrate: f must return shape {tuple(self.nodes.shape)}, got {got}")
        carries = self.valid & (self.weights > 0)
        bad = carries & ~values.isfinite()
        if bad.any():
            p, l, i = bad.nonzero()[0].tolist()
            raise ValueError(
                f"integrate: f must be finite at every node, got {values[p, l, i].item()} at node "
                f"{self.nodes[p, l, i].item():.6g} of block {l}"
            )
        terms = torch.where(carries, self.weights * values, 0.0).sum(-1)
        known = self.steps > 0
        count = known.sum(0)
        mean = terms.sum(0) / count
        squares = torch.where(known, (terms - mean) ** 2, 0.0).sum(0)
        stderr = torch.where(count > 1, (squares / (count - 1) / count).sqrt(), math.inf)
        dims = torch.tensor(self.dims, dtype=torch.float64, device=terms.device)
        exact = torch.tensor([self.is_exact(l) for l in range(len(self.dims))], device=terms.device)
        return dims * mean, torch.where(exact & (count > 0), 0.0, dims * stderr)


def _padded(values: Tensor, m: int, repeat: bool) -> Tensor:
    """(..., k) -> (..., m), filled up with the last entry or with zeros."""
    missing = m - values.shape[-1]
    if not missing:
        return values
    filling = values[..., -1:].expand(*values.shape[:-1], missing)
    return torch.cat([values, filling if repeat else torch.zeros_like(filling)], -1)
