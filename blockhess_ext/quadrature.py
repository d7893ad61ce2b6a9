"""The result of stochastic Lanczos quadrature: one Gauss quadrature per probe and block.

    v^T f(H_l) v  ~  sum_i weights[p, l, i] f(nodes[p, l, i])        for probe v = v_p in block l
    mu_l           =  mean over probes of sum_i weights[p, l, i] delta(t - nodes[p, l, i])
    tr f(H_l)      ~  dims_l  int f dmu_l

Guarantees: instances are immutable; methods return new tensors. Only recurrences that made a step enter an average;
where a block has none, its values are NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from blockhess_ext.ghosts import count_ghosts


@dataclass(frozen=True, eq=False)
class Quadrature:
    """Gauss quadratures of n_probes x n_blocks spectral measures.

    Attributes:
        nodes: (n_probes, n_blocks, m) float64, ascending; beyond `steps` the last node is repeated.
        weights: (n_probes, n_blocks, m) float64, sum to 1 over the last axis; 0 beyond `steps`.
        alpha: (n_probes, n_blocks, m) float64, diagonals of the tridiagonal matrices.
        beta: (n_probes, n_blocks, m) float64; beta[..., j] couples steps j and j + 1, the last valid one
            is the residual.
        steps: (n_probes, n_blocks) int64, valid Lanczos steps.
        nonfinite: (n_probes, n_blocks) bool, recurrences stopped because the operator returned NaN, inf or a value
            out of range; their quadrature is that of the steps before.
        dims: size of each block.
        block_ids: integer key of the random probes of each block.
        num_steps: requested number of steps.
        seed: seed of the probes; None if the caller supplied them.
        distribution: "gaussian", "rademacher" or "given".
        reorthogonalize: the mode of each block, "none", "full" or "partial"; "exact" for a block whose eigenvalues
            were computed from its matrix, without probes.
        dtype: data type of the vectors.
        TENSORS: names of the tensors among these attributes.
    """

    TENSORS: ClassVar[tuple[str, ...]] = ("nodes", "weights", "alpha", "beta", "steps", "nonfinite")

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

    def __eq__(self, other: object) -> bool:
        """Return whether all attributes are equal, tensors with their dtype and device."""
        if not isinstance(other, Quadrature):
            return NotImplemented
        return all(_equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    def __hash__(self) -> int:
        return hash((self.dims, self.block_ids, self.num_steps, self.seed, self.distribution, self.dtype))

    @staticmethod
    def concatenate(parts: Sequence[Quadrature], dim: int) -> Quadrature:
        """Concatenate quadratures of the same run along its probes (dim 0) or its blocks (dim 1).

        Along dim 1, parts with fewer probes are padded with recurrences of zero steps.

        Raises:
            ValueError: the parts differ in an attribute that they must share.
        """
        first = parts[0]
        per_block = ("dims", "block_ids", "reorthogonalize")
        shared = ("num_steps", "seed", "distribution", "dtype") + (per_block if dim == 0 else ())
        for name in shared:
            for part in parts[1:]:
                if getattr(part, name) != getattr(first, name):
                    raise ValueError(
                        f"concatenate: parts must have the same {name}, got {getattr(first, name)!r} and "
                        f"{getattr(part, name)!r}"
                    )
        m = max(part.nodes.shape[-1] for part in parts)
        rows = max(part.num_probes for part in parts) if dim == 1 else 0

        def padded(part: Quadrature, name: str) -> Tensor:
            values: Tensor = getattr(part, name)
            if values.dim() == 3:
                values = _pad(values, m, repeat=name == "nodes")
            missing = max(rows - len(values), 0)
            return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values

        tensors: dict[str, Any] = {n: torch.cat([padded(part, n) for part in parts], dim) for n in first.TENSORS}
        lists = {name: sum((getattr(part, name) for part in parts), ()) for name in per_block} if dim == 1 else {}
        changed: dict[str, Any] = tensors | lists
        return replace(first, **changed)

    def to(self, device: torch.device | str) -> Quadrature:
        """Return the quadrature with its tensors on another device."""
        return self._map(lambda tensor: tensor.to(device))

    def of_probes(self, probes: slice | list[int] | Tensor) -> Quadrature:
        """Return the quadrature of some of the probes: a slice, indices, or a mask (n_probes,)."""
        return self._map(lambda tensor: tensor[probes])

    def select_blocks(self, blocks: Sequence[int]) -> Quadrature:
        """Return the quadrature of these blocks, in this order."""
        chosen: dict[str, Any] = {name: getattr(self, name)[:, list(blocks)] for name in self.TENSORS}
        for name in ("dims", "block_ids", "reorthogonalize"):
            chosen[name] = tuple(getattr(self, name)[l] for l in blocks)
        return replace(self, **chosen)

    def select_block(self, block: int) -> Quadrature:
        """Return the quadrature of one block, without its padding.

        Probes without a recurrence in this block are dropped, and the last axis is cut to at most dims[block] steps.
        """
        part = self.select_blocks([block])
        part = part.of_probes(((part.steps > 0) | part.nonfinite)[:, 0])
        trimmed: dict[str, Any] = {
            name: getattr(part, name)[..., : self.dims[block]].clone()  # a view would keep the padding in memory
            for name in ("nodes", "weights", "alpha", "beta")
        }
        return replace(part, **trimmed)

    def _map(self, f: Callable[[Tensor], Tensor]) -> Quadrature:
        changed: dict[str, Any] = {name: f(getattr(self, name)) for name in self.TENSORS}
        return replace(self, **changed)

    def is_exact(self, block: int) -> bool:
        """Return whether every probe of a block gives its spectral density exactly: "exact", or a single element."""
        return self.dims[block] == 1 or self.reorthogonalize[block] == "exact"

    @property
    def num_probes(self) -> int:
        """Number of probes."""
        return self.nodes.shape[0]

    @property
    def valid(self) -> Tensor:
        """Mask of the nodes that are not padding, (n_probes, n_blocks, m) bool."""
        return torch.arange(self.nodes.shape[-1], device=self.nodes.device) < self.steps[..., None]

    def ghosts(self) -> Tensor:
        """Return the number of ghost nodes of every recurrence, (n_probes, n_blocks) int64.

        Ghosts are copies of an eigenvalue caused by loss of orthogonality. They do not bias densities or integrals;
        see `ghosts.count_ghosts`.
        """
        alpha, beta = self.alpha.flatten(0, 1), self.beta.flatten(0, 1)
        return count_ghosts(alpha, beta, self.steps.flatten(), getattr(torch, self.dtype)).view_as(self.steps)

    def integrate(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Return tr f(H_l) of every block and its standard error over the probes.

            tr f(H_l)  ~  dims_l * mean over probes of sum_i weights_i f(nodes_i)

        Args:
            f: maps a float64 tensor of nodes to values of the same shape.

        Returns:
            values, stderr: (n_blocks,) float64. The error is infinite for a single probe, and 0 for an exact block.
            A block without any step has value NaN and infinite error.

        Raises:
            ValueError: f is not finite at a node of positive weight, or returns another shape.

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

    def moment(self, power: int) -> tuple[Tensor, Tensor]:
        """Return tr H_l^power and its standard error over the probes, (n_blocks,) each; see `integrate`."""
        return self.integrate(lambda nodes: nodes**power)

    def second_moment(self) -> tuple[Tensor, Tensor]:
        """Return tr H_l^2 and its standard error over the probes, (n_blocks,) each; exact for the probes from step 1.

        After one step the quadrature is exact to degree 1 only, and the residual completes it:
        |H v|^2 = alpha_0^2 + beta_0^2.
        """
        length = torch.hypot(self.nodes[..., :1], self.beta[..., :1])
        return replace(self, nodes=torch.where(self.steps[..., None] == 1, length, self.nodes)).moment(2)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Return nodes and weights (n_blocks, n_probes m) of the measures mu_l, averaged over the probes.

        The weights of a block sum to 1. Padding repeats the block's largest node with weight 0; a block without any
        step has zeros only.
        """
        valid = self.valid
        probes = valid.any(-1).sum(0).clamp(min=1)[None, :, None]
        weights = torch.where(valid, self.weights / probes, 0.0)
        largest = torch.where(valid, self.nodes, -math.inf).amax((0, 2))
        padding = torch.where(largest > -math.inf, largest, 0.0)[None, :, None]
        nodes = torch.where(valid, self.nodes, padding)
        return nodes.transpose(0, 1).flatten(1).contiguous(), weights.transpose(0, 1).flatten(1).contiguous()

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the smallest and the largest node of every block over all probes, (n_blocks,) each."""
        valid = self.valid
        unknown = ~valid.any(-1).any(0)
        smallest = torch.where(valid, self.nodes, math.inf).amin((0, 2))
        largest = torch.where(valid, self.nodes, -math.inf).amax((0, 2))
        return smallest.masked_fill(unknown, math.nan), largest.masked_fill(unknown, math.nan)


def _equal(a: object, b: object) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return a == b
    return (a.dtype, a.device) == (b.dtype, b.device) and torch.equal(a, b)


def _pad(values: Tensor, m: int, repeat: bool) -> Tensor:
    """Pad (..., k) to (..., m) with the last entry or with zeros."""
    missing = m - values.shape[-1]
    if not missing:
        return values
    filling = values[..., -1:].expand(*values.shape[:-1], missing)
    return torch.cat([values, filling if repeat else torch.zeros_like(filling)], -1)
