"""What a Hessian is taken of: a model, a loss, batches and blocks, looked through once before any product.

    L(w) = sum_b share_b L_b(w),   share_b = weight_b / sum_b weight_b,  or 1 where the loss sums over samples

Promises: what cannot be differentiated twice, does not repeat itself or is not finite is refused here, before any
work is spent; the model's own parameters are only read.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blockhess.problem.batches import Batch, check_device, map_tensors, tensors
from blockhess.problem.blocks import Block, with_note
from blockhess.problem.graph import (
    ALTERNATIVES,
    FlopCounter,
    OperationRecorder,
    differentiable_nodes,
    refuse_third_derivatives,
    saved_bytes,
)
from blockhess.problem.losses import Loss, checked, checked_weight
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup


class Problem:
    """A model, a loss and data, as the engines take them.

    Args:
        model: in a fixed state (`model_state.fixed_state`) for as long as the problem is used.
        loss: from `losses.make_loss`.
        batches: from `batches.as_batches`.
        blocks: from `blocks.partition`.
        dtype: what to compute in: None is the parameters' own, float32 for float16 and bfloat16 ones; otherwise all
            parameters, buffers and floating-point data are converted. float16 or bfloat16 itself is taken only if
            the parameters have it.
        several: whether other ranks have more batches, with which `join` will put these together.

    Attributes:
        blocks: as given. infos: their BlockInfo, with "unused" noted.
        dims: their dimensions; block l is columns sum(dims[:l]) : sum(dims[:l + 1]) of a vector set.
        parameters: name -> what is differentiated, of every parameter in a block.
        dtype, device: of the vector sets: the widest dtype among the parameters, at least float32.
        batches: those of weight above 0. shares: of each in the whole.
        loss_value: the loss of all data. weight: the sum of the batches' weights. n_batches: how many there are; after
            `join` these three, and what is used, are of all ranks.
        ranks: which hold the other batches.
        used: names of parameters that a gradient reaches in some batch. unused: the others.
        graph_nodes: operations in the first batch's gradient. graph_bytes: what its graph holds, scaled to the largest
            batch.
        forward_flops: of the loss of the first batch, in matrix products and convolutions. forward_seconds: what it
            took, for estimates that a person reads.

    Raises:
        ValueError, TypeError: a loss, weight or device that does not fit, or a loss that depends on no block.
        NotImplementedError: an operation that autograd would silently differentiate wrongly.

    Example:
        >>> from blockhess.problem.blocks import partition
        >>> from blockhess.problem.losses import make_loss
        >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> problem = Problem(model, make_loss(torch.nn.MSELoss()), [data], partition(model).blocks)
        >>> problem.dims, problem.weight
        ([3, 1], 8.0)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Batch],
        blocks: Sequence[Block],
        dtype: torch.dtype | None = None,
        several: bool = False,
    ) -> None:
        self.model, self.loss, self.blocks = model, loss, tuple(blocks)
        self.ranks = SINGLE_PROCESS
        self.dims = [block.info.dim for block in blocks]
        self._wrapped = _Computation(model)
        pieces = {piece.name: piece.tensor for block in blocks for piece in block.pieces}
        self.device = _one_device(pieces)
        if loss.calls_model:
            check_device(list(batches), self.device)
        self._converted = _converted(model, pieces, dtype)
        owned = _owned(model)
        self._places = {name: owned[id(p)] for name, p in pieces.items()}
        self.parameters = {name: self._converted.get(self._places[name][0], p) for name, p in pieces.items()}
        self._data_dtype = next((t.dtype for t in self._converted.values() if t.is_floating_point()), None)
        self.dtype = max((p.dtype for p in self.parameters.values()), key=lambda d: d.itemsize)
        if self.dtype.itemsize < 4:
            self.dtype = torch.float32
        self._survey(batches, several)

    def evaluate(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """The loss of a batch, at other parameters if some are given by name."""
        loss: Tensor = self._call(lambda model, batch: self.loss(model, batch)[0], batch, parameters)
        return loss

    def outputs(self, index: int) -> tuple[Tensor, Tensor]:
        """The model's outputs for batch `index`, and the loss computed from them; see `Loss.with_outputs`."""
        result: tuple[Tensor, Tensor] = self._call(self.loss.with_outputs, self.batches[index], None)
        return result

    def gradients(self, index: int, create_graph: bool) -> dict[str, Tensor]:
        """Name -> gradient of the loss of batch `index`, of every parameter that it depends on."""
        return self._differentiate(self.evaluate(self.batches[index]), create_graph)

    def gradients_at(self, batch: Batch, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> gradient of the loss of a batch at other parameters, with a graph of its own."""

        def differentiated(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            loss = self.loss(model, batch)[0]
            found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
            return {name: g for name, g in zip(parameters, found) if g is not None}

        # While the parameters are in place: activation checkpointing runs the model again in the backward pass.
        gradients: dict[str, Tensor] = self._call(differentiated, batch, parameters)
        return gradients

    def differentiate(self, outputs: Any, inputs: Any, directions: Any = None, **options: bool) -> tuple[Any, ...]:
        """As torch.autograd.grad, None for what is unused; activation checkpointing meets the converted parameters."""

        found: tuple[Any, ...] = self._call(
            lambda *_: torch.autograd.grad(outputs, inputs, directions, allow_unused=True, **options), (), None
        )
        return found

    def in_dtype(self, dtype: torch.dtype) -> Problem:
        """The same problem, first batch only, computed in another dtype."""
        return Problem(self.model, self.loss, self.batches[:1], self.blocks, dtype)

    def _call(
        self, compute: Callable[[nn.Module, Batch], Any], batch: Batch, parameters: Mapping[str, Tensor] | None
    ) -> Any:
        swapped = dict(self._converted)
        for name, tensor in (parameters or {}).items():
            swapped |= dict.fromkeys(self._places[name], tensor)
        if self._data_dtype is not None:
            batch = map_tensors(lambda t: t.to(self._data_dtype) if t.is_floating_point() else t, batch)
        with _default_dtype(self._data_dtype):
            if not swapped:
                return compute(self.model, batch)
            renamed = {f"model.{name}": tensor for name, tensor in swapped.items()}
            # Tied parameters are named one by one: a module that is registered twice must be changed once.
            return functional_call(self._wrapped, renamed, (compute, batch), tie_weights=False)

    def _survey(self, batches: Sequence[Batch], several: bool) -> None:
        """One pass over the data: checks, weights, the loss, and which parameters it depends on."""
        weights: list[float] = []
        values: list[float] = []
        used: set[str] = set()
        self.batches: list[Batch] = []
        for index, batch in enumerate(batches):
            with contextlib.ExitStack() as stack:
                if not self.batches:
                    flops = stack.enter_context(FlopCounter())
                loss, raw_weight = self._call(self.loss, batch, None)
            loss = checked(loss, index)
            weight = checked_weight(raw_weight, index, len(batches) + several) if self.loss.averaged else 1.0
            if weight == 0:  # all labels ignored: the mean over them is 0 / 0
                continue
            if not torch.isfinite(loss):
                raise ValueError(f"spectrum: loss_fn must return a finite loss, got {loss.item()} for batch {index}")
            value = loss.item()
            if self.batches:
                gradients = self._differentiate(loss, create_graph=False)
            else:
                refuse_third_derivatives(differentiable_nodes([loss.grad_fn]))
                gradients = self._differentiate(loss, create_graph=True)
                nodes = differentiable_nodes(g.grad_fn for g in gradients.values())
                self.graph_nodes = len(nodes)
                others = (*self.parameters.values(), *tensors(batch))
                self.graph_bytes: int = self._call(lambda *_: saved_bytes(nodes, others), (), None)  # noqa: B023
                del nodes
                self.forward_flops = flops.total
                gradients = {name: g.detach() for name, g in gradients.items()}
                del loss  # so that there is one graph at a time
                self._check_repeatable(batch, index, value, gradients)
            used.update(gradients)
            del gradients
            self.batches.append(batch)
            weights.append(weight)
            values.append(value)
        if self.batches:
            sizes = [sum(t.numel() for t in tensors(batch)) for batch in self.batches]
            self.graph_bytes = int(self.graph_bytes * max(sizes) / max(1, sizes[0]))
        self.weight, self.n_batches = sum(weights), len(self.batches)
        if not self.batches:
            raise ValueError(f"spectrum: data must have a batch of weight above 0, got {len(batches)} of weight 0")
        if not used:
            raise ValueError(
                "spectrum: loss_fn must depend on the parameters in blocks, got a loss that depends on none of "
                + ", ".join(list(self.parameters)[:5])
            )
        self.shares = [w / self.weight if self.loss.averaged else 1.0 for w in weights]
        self.loss_value = sum(share * value for share, value in zip(self.shares, values))
        self._use(frozenset(used))

    def _use(self, used: frozenset[str]) -> None:
        self.used = used
        self.unused = tuple(name for name in self.parameters if name not in used)
        self.infos = tuple(
            block.info if used & set(block.parameters) else with_note(block.info, "unused") for block in self.blocks
        )

    def join(self, ranks: ProcessGroup) -> None:
        """Make the data of all ranks that share it one: to be called by all of them, once."""
        self.ranks = ranks
        if ranks.data_size == 1:
            return
        counted = (self.graph_nodes, self.graph_bytes, self.forward_flops)
        found = ranks.row((self.weight, self.loss_value, self.n_batches, self.used, counted))
        weights, values, numbers, used, counts = zip(*found)
        total = sum(weights)
        if self.loss.averaged:
            self.shares = [share * self.weight / total for share in self.shares]
            self.loss_value = sum(weight / total * value for weight, value in zip(weights, values))
        else:
            self.loss_value = sum(values)
        self.weight, self.n_batches = total, sum(numbers)
        self._use(frozenset().union(*used))
        self.graph_nodes, self.graph_bytes, self.forward_flops = map(max, zip(*counts))

    def is_used(self, number: int) -> bool:
        """Whether the loss depends on some parameter of block `number`."""
        return not self.used.isdisjoint(self.infos[number].parameters)

    def without_second_derivative(self, backward: str) -> tuple[str, str]:
        """Where the operation with this backward pass is called, as "in ... ", and what to use instead."""
        stem = backward.removesuffix("_backward")
        with OperationRecorder(self.model) as operations, torch.no_grad():
            self.evaluate(self.batches[0])
        place = next((where for name, where in operations.places.items() if name.removesuffix("_forward") == stem), "")
        advice = next((advice for part, advice in ALTERNATIVES.items() if part in stem), "write it in plain PyTorch")
        return f"in {place} " if place else "of the model ", advice

    def _differentiate(self, loss: Tensor, create_graph: bool) -> dict[str, Tensor]:
        gradients = self.differentiate(loss, list(self.parameters.values()), create_graph=create_graph)
        return {name: g for name, g in zip(self.parameters, gradients) if g is not None}

    def _check_repeatable(self, batch: Batch, index: int, value: float, gradients: dict[str, Tensor]) -> None:
        with OperationRecorder(self.model) as operations:
            start = time.perf_counter()
            again = checked(self.evaluate(batch), index)
            _ = again.item()  # which waits for a GPU
            self.forward_seconds = time.perf_counter() - start
            others = self._differentiate(again, create_graph=False)
        if abs(again.item() - value) > 1e-5 * abs(value):
            raise ValueError(
                f"spectrum: loss_fn must give the same loss for the same batch, got {value:.9g}, then "
                f"{again.item():.9g}: {operations.randomness()}"
            )
        size = max((float(g.abs().max()) for g in gradients.values() if g.numel()), default=0.0)
        for name, gradient in gradients.items():
            difference = float((gradient - others[name]).abs().max()) if gradient.numel() else 0.0
            if difference > 1e-3 * max(size, 1e-30):
                raise ValueError(
                    f"spectrum: loss_fn must have the same gradient for the same batch, got one that differs by "
                    f"{difference:.3g} in {name!r}: {operations.randomness()}"
                )


class _Computation(nn.Module):
    """What is computed with a model, as a module whose parameters can be exchanged."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False

    def forward(self, compute: Callable[[nn.Module, Batch], Any], batch: Batch) -> Any:
        return compute(self.model, batch)


def _one_device(parameters: Mapping[str, Tensor]) -> torch.device:
    first, *others = parameters.items()
    for name, parameter in others:
        if parameter.device != first[1].device:
            raise ValueError(
                f"spectrum: all parameters in blocks must be on one device, got {first[0]!r} on {first[1].device} "
                f"and {name!r} on {parameter.device}"
            )
    return first[1].device


def _converted(model: nn.Module, pieces: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Name in the model -> the parameter or buffer in the dtype to compute in; empty where nothing needs converting."""
    own = {p.dtype for p in pieces.values()}
    if dtype is None:
        if all(d.itemsize >= 4 for d in own):
            return {}
        dtype = torch.float32
    if dtype.itemsize < 4:
        if own != {dtype}:
            raise ValueError(
                f"spectrum: dtype must be float32 or float64 for parameters of {', '.join(map(str, own))}, got {dtype}"
            )
        return {}
    floating = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    if all(t.dtype == dtype for t in floating.values()):
        return {}
    converted = {key: t.detach().to(dtype).requires_grad_(t.requires_grad) for key, t in floating.items()}
    return {name: converted[key] for key, names in _owned(model).items() if key in converted for name in names}


def _owned(model: nn.Module) -> dict[int, list[str]]:
    """id of every parameter and buffer -> its names, one for each module that holds it."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    return names


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Iterator[None]:
    """So that what a model makes by itself (torch.zeros) fits the converted parameters."""
    if dtype is None:
        yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
