"""Hessian-vector products of every block at once, for batched_slq.

    (H v)_l = sum_b weight_b d/dw_l <g_b,l(w), v_l> / sum_b weight_b,   g_b,l = dL_b / dw_l

The graph of the gradient g is built by one backward pass; each block's product then walks only the part of it between
g_l and w_l (Pearlmutter 1994, with a retained graph).

Promises: block l of the result depends on block l of the input only; the input is neither modified nor kept; the
result is the only tensor of the input's size that is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from blockhess.batches import Batch, check_device
from blockhess.blocks import Block, BlockInfo
from blockhess.losses import Loss, checked, checked_weight


class BlockHessian:
    """The block-diagonal Hessian of a loss as an operator on vector sets.

    Args:
        model: in a fixed state (`model_state.fixed_state`) for as long as the operator is used.
        loss: from `losses.as_loss`.
        batches: from `batches.as_batches`.
        blocks: from `blocks.partition`.
        on_hvp: called after every product of one block, probe and batch.

    Attributes:
        infos: the blocks' BlockInfo, with "unused" noted.
        dims: their dimensions; block l is columns sum(dims[:l]) : sum(dims[:l + 1]) of a vector set.
        dtype, device: of the vector sets: the widest dtype among the blocks' parameters.
        loss_value: the loss of all data. weight: the sum of the batches' weights.
        unused: names of parameters that no gradient reaches in any batch.
        hvps: products computed so far, one per block, probe, step and batch.

    Raises:
        ValueError, TypeError: a loss, weight or device that does not fit, or a loss that depends on no block.

    Example:
        >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> blocks = partition(model).blocks
        >>> hessian = BlockHessian(model, as_loss(torch.nn.MSELoss()), [data], blocks)
        >>> hessian(torch.ones(2, 4)).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Batch],
        blocks: Sequence[Block],
        on_hvp: Callable[[], object] = lambda: None,
    ) -> None:
        self.on_hvp = on_hvp
        self.hvps = 0
        self.dims = [block.info.dim for block in blocks]
        self._model, self._loss, self._blocks = model, loss, blocks
        self._parameters = {piece.name: piece.tensor for block in blocks for piece in block.pieces}
        self.device = self._one_device()
        if loss.calls_model:
            check_device(list(batches), self.device)
        self.dtype = max((p.dtype for p in self._parameters.values()), key=lambda dtype: dtype.itemsize)
        self._finished: list[list[bool]] | None = None
        self._graph_checked = False
        self._survey(batches)

    def _one_device(self) -> torch.device:
        first, *others = self._parameters.items()
        for name, parameter in others:
            if parameter.device != first[1].device:
                raise ValueError(
                    f"spectrum: all parameters in blocks must be on one device, got {first[0]!r} on {first[1].device} "
                    f"and {name!r} on {parameter.device}"
                )
        return first[1].device

    def _survey(self, batches: Sequence[Batch]) -> None:
        """One pass over the data: checks, weights, the loss, and which parameters it depends on."""
        weights: list[float] = []
        values: list[float] = []
        used: set[str] = set()
        self._batches: list[Batch] = []
        self._retained: dict[str, Tensor] | None = None
        for index, batch in enumerate(batches):
            loss, raw_weight = self._loss(self._model, batch)
            loss = checked(loss, index)
            weight = checked_weight(raw_weight, index, len(batches)) if self._loss.averaged else 1.0
            if weight == 0:  # all labels ignored: the mean over them is 0 / 0
                continue
            if not torch.isfinite(loss):
                raise ValueError(f"spectrum: loss_fn must return a finite loss, got {loss.item()} for batch {index}")
            value = loss.item()
            if not self._batches:
                _refuse_cut_graph([loss.grad_fn])
                del loss  # here and below: so that there is one graph at a time
                loss = checked(self._loss(self._model, batch)[0], index)
                _check_repeatable(value, loss.item())
            # A single batch's graph serves all steps.
            gradients = self._differentiate(loss, create_graph=len(batches) == 1)
            used.update(gradients)
            self._retained = gradients if len(batches) == 1 else None
            self._batches.append(batch)
            weights.append(weight)
            values.append(value)
            del loss
        self.weight = sum(weights)
        if not self._batches:
            raise ValueError(f"spectrum: data must have a batch of weight above 0, got {len(batches)} of weight 0")
        if not used:
            raise ValueError(
                "spectrum: loss_fn must depend on the parameters in blocks, got a loss that depends on none of "
                + ", ".join(list(self._parameters)[:5])
            )
        # The share of a batch's Hessian in the whole.
        self._shares = [w / self.weight if self._loss.averaged else 1.0 for w in weights]
        self.loss_value = sum(share * value for share, value in zip(self._shares, values))
        self.unused = tuple(name for name in self._parameters if name not in used)
        self.infos = tuple(_noted(block.info, used) for block in self._blocks)
        self._used = tuple(not used.isdisjoint(info.parameters) for info in self.infos)

    def _differentiate(self, loss: Tensor, create_graph: bool) -> dict[str, Tensor]:
        """Gradient of the loss for every parameter that it depends on."""
        gradients = torch.autograd.grad(
            loss, list(self._parameters.values()), create_graph=create_graph, allow_unused=True
        )
        by_name = {name: g for name, g in zip(self._parameters, gradients) if g is not None}
        if create_graph and not self._graph_checked:
            _refuse_cut_graph(g.grad_fn for g in by_name.values())
            self._graph_checked = True
        return by_name

    def _gradients(self, index: int) -> dict[str, Tensor]:
        # Several batches' graphs would not fit together; rebuilding one costs a forward and a backward pass, against
        # one product for each of n_blocks x n_probes.
        if self._retained is not None:
            return self._retained
        loss, _ = self._loss(self._model, self._batches[index])
        return self._differentiate(loss, create_graph=True)

    def most_hvps(self, num_probes: int, num_steps: int) -> int:
        """The products that Lanczos needs if no recurrence ends early."""
        steps = sum(min(num_steps, dim) for dim, used in zip(self.dims, self._used) if used)
        return num_probes * steps * len(self._batches)

    def mark_finished(self, finished: Tensor) -> None:
        """Skip from now on the recurrences marked in a bool tensor (n_probes, n_blocks)."""
        self._finished = finished.tolist()

    def __call__(self, v: Tensor) -> Tensor:
        """Multiply every block of every vector by that block's Hessian.

        Args:
            v: (n_probes, sum(dims)).

        Returns:
            (n_probes, sum(dims)), zeros where a recurrence is finished or a block's Hessian is zero.
        """
        result = torch.zeros_like(v)
        columns = list(zip(torch.split(v, self.dims, dim=1), torch.split(result, self.dims, dim=1)))
        for index, share in enumerate(self._shares):
            gradients = self._gradients(index)
            for number, (block, (vectors, products)) in enumerate(zip(self._blocks, columns)):
                # A gradient that requires none is constant: the loss is linear in this parameter.
                live = [p.name in gradients and gradients[p.name].requires_grad for p in block.pieces]
                if not any(live):
                    continue
                for probe in range(v.shape[0]):
                    if self._finished is None or not self._finished[probe][number]:
                        _add_product(block, gradients, live, vectors[probe], products[probe], share)
                        self.hvps += 1
                        self.on_hvp()
            del gradients  # before the next batch's graph is built
        return result


def _check_repeatable(value: float, again: float) -> None:
    if abs(again - value) > 1e-5 * abs(value):
        raise ValueError(
            f"spectrum: loss_fn must give the same loss for the same batch, got {value:.9g}, then {again:.9g}: does "
            "the model draw random numbers in eval mode (functional dropout without training=self.training, noise, "
            "sampling), or change its own state?"
        )


def _add_product(
    block: Block, gradients: dict[str, Tensor], live: list[bool], vector: Tensor, product: Tensor, share: float
) -> None:
    """product += share * H_l vector, for one block and probe; `live` marks the pieces whose gradient varies."""
    sizes = [piece.of(piece.tensor).numel() for piece in block.pieces]
    outputs, directions = [], []
    for piece, varies, direction in zip(block.pieces, live, torch.split(vector, sizes)):
        if varies:
            outputs.append(piece.of(gradients[piece.name]))
            directions.append(direction.view(piece.shape).to(piece.tensor.dtype))
    inputs = {piece.name: piece.tensor for piece in block.pieces}
    try:
        rows = torch.autograd.grad(outputs, list(inputs.values()), directions, retain_graph=True, allow_unused=True)
    except RuntimeError as error:
        if "not implemented" in str(error) or "double backward" in str(error):
            raise NotImplementedError(
                f"spectrum: block {block.info.name!r} needs a second derivative that an operation of the model lacks "
                f"({str(error).splitlines()[0]}); write that operation in plain PyTorch"
            ) from error
        raise
    by_name = dict(zip(inputs, rows))
    for piece, target in zip(block.pieces, torch.split(product, sizes)):
        if (row := by_name[piece.name]) is not None:
            target.view(piece.shape).add_(piece.of(row), alpha=share)


# What autograd would silently differentiate wrongly, by the name of its node in the graph.
_NOT_TWICE_DIFFERENTIABLE = {
    "torch::autograd::Error": "an operation marked once_differentiable (a torch.autograd.Function), which has no "
    "second derivative; write that operation in plain PyTorch",
    "CheckpointFunctionBackward": "reentrant activation checkpointing, which hides parameters from autograd.grad; "
    "pass use_reentrant=False",
    "WeightNormInterfaceBackward0": "torch's fused weight norm, whose second derivative is wrong; write g v / |v| in "
    "plain PyTorch, or remove the parametrization",
}


def _refuse_cut_graph(roots: Iterable[Node | None]) -> None:
    """Find operations whose second derivative autograd silently leaves out or gets wrong."""
    waiting = list(roots)
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() in _NOT_TWICE_DIFFERENTIABLE:
            raise NotImplementedError(f"spectrum: the model has {_NOT_TWICE_DIFFERENTIABLE[node.name()]}")
        waiting.extend(edge[0] for edge in node.next_functions)


def _noted(info: BlockInfo, used: set[str]) -> BlockInfo:
    if not used.isdisjoint(info.parameters):
        return info
    return replace(info, note="; ".join(filter(None, ("unused", info.note))))
