"""Frobenius norms of all block pairs of a Hessian, exact or estimated without forming H.

    |H_kl|_F^2 = E |H_kl v|^2  for random signs v on block l

so one Hessian-vector product with a vector supported on block l estimates all pairs (k, l): L products per probe. The
paper leaves open (appendix C.2) how block-diagonal the Hessians of large models are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blockhess.problem.blocks import BlockInfo, BlockSpec, partition
from blockhess.problem.model_state import fixed_state
from blockhess_paper.structure.hessian import gradient_graph


@dataclass(frozen=True)
class PairNorms:
    """|H_kl|_F^2 of all pairs of blocks.

    Attributes:
        blocks: the L blocks.
        squares: (L, L) float64.
        stderr: (L, L) standard error of squares over the probes; 0 where exact, infinite with a single probe.
    """

    blocks: tuple[BlockInfo, ...]
    squares: Tensor
    stderr: Tensor

    def outside(self) -> float:
        """Return the share of |H|_F^2 outside the diagonal blocks, in [0, 1].

        Example:
            >>> exact_pair_norms(torch.eye(4), four_blocks).outside()
            0.0
        """
        total = float(self.squares.sum())
        return 1 - float(self.squares.diagonal().sum()) / total if total > 0 else 0.0

    def entries_outside(self) -> float:
        """Return the share of entries outside the diagonal blocks: that of `outside` for an H without structure."""
        dims = [block.dim for block in self.blocks]
        return 1 - sum(dim**2 for dim in dims) / sum(dims) ** 2

    def merged(self, group_of: Callable[[str], str]) -> PairNorms:
        """Merge blocks with equal group_of(name); standard errors are added as if independent."""
        groups = list(dict.fromkeys(group_of(block.name) for block in self.blocks))
        member = torch.zeros(len(groups), len(self.blocks), dtype=torch.float64)
        infos = []
        for g, group in enumerate(groups):
            rows = [l for l, block in enumerate(self.blocks) if group_of(block.name) == group]
            member[g, rows] = 1.0
            dim = sum(self.blocks[l].dim for l in rows)
            parameters = tuple(name for l in rows for name in self.blocks[l].parameters)
            infos.append(BlockInfo(group, (dim,), dim, parameters))
        error = member @ self.stderr.square() @ member.T
        return PairNorms(tuple(infos), member @ self.squares @ member.T, error.sqrt())


def exact_pair_norms(hessian: Tensor, blocks: Sequence[BlockInfo]) -> PairNorms:
    """Return the pair norms of a Hessian from `exact_hessian`.

    Raises:
        ValueError: the sizes of the blocks do not sum to that of the Hessian.
    """
    dims = [block.dim for block in blocks]
    if hessian.shape != (sum(dims), sum(dims)):
        raise ValueError(
            f"exact_pair_norms: hessian must have {sum(dims)} rows and columns, got {tuple(hessian.shape)}"
        )
    member = torch.zeros(len(dims), sum(dims), dtype=torch.float64)
    member[torch.arange(len(dims)).repeat_interleave(torch.tensor(dims)), torch.arange(sum(dims))] = 1.0
    squares = member @ hessian.double().square() @ member.T
    return PairNorms(tuple(blocks), squares, torch.zeros_like(squares))


def estimate_pair_norms(
    model: nn.Module,
    data: Any,
    loss_fn: Callable[..., Any] | None = None,
    *,
    blocks: BlockSpec = "parameter",
    num_probes: int = 2,
    seed: int = 0,
) -> PairNorms:
    """Estimate the pair norms without forming H, by num_probes x L Hessian-vector products.

    |H_kl|_F^2 is the average of two estimates, from vectors on block l and from vectors on block k.

    Args:
        model, data, loss_fn, blocks: as for `blockhess.spectrum`, one batch.
        num_probes: number of random sign vectors per block.
        seed: seed of the signs.

    Raises:
        ValueError: data is more than one batch, num_probes is below 1, or an argument is invalid.

    Example:
        >>> norms = estimate_pair_norms(model, batch, loss_fn, num_probes=4)
        >>> norms.outside()
    """
    if num_probes < 1:
        raise ValueError(f"estimate_pair_norms: num_probes must be at least 1, got {num_probes}")
    cut = partition(model, blocks)
    count = len(cut.blocks)
    samples = torch.zeros(num_probes, count, count, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with fixed_state(model):
        flat, parameters = gradient_graph(model, data, loss_fn, cut.blocks)
        for l, gradient in enumerate(flat):
            for probe in range(num_probes):
                signs = 2.0 * torch.randint(2, gradient.shape, generator=generator) - 1
                if not gradient.requires_grad:
                    continue
                products = torch.autograd.grad(
                    gradient,
                    list(parameters.values()),
                    signs.to(gradient),
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                by_name = dict(zip(parameters, products))
                for k, block in enumerate(cut.blocks):
                    parts = (piece.of(by_name[piece.name]) for piece in block.pieces)
                    samples[probe, k, l] = sum(float(part.double().square().sum()) for part in parts)
    samples = (samples + samples.mT) / 2
    spread = samples.std(0) / math.sqrt(num_probes) if num_probes > 1 else torch.full_like(samples[0], math.inf)
    return PairNorms(tuple(block.info for block in cut.blocks), samples.mean(0), spread)
