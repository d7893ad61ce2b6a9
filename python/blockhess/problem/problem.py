"""The total loss as a function of the parameters in blocks.

    L(w) = sum_b share_b L_b(w),   share_b = weight_b / sum_b weight_b,  or 1 where the loss sums over samples

The constructor evaluates every batch once. It raises an error for a loss that is not finite, not reproducible or not
twice differentiable, if second derivatives are needed. The parameters of the model are only read.
"""

from __future__ import annotations

import contextlib
import copy
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from blockhess.problem import graph, shards
from blockhess.problem.batches import (
    Batch,
    batch_size,
    check_device,
    dense_parts,
    row_shapes,
    shapes,
    tensors,
    to_dtype,
)
from blockhess.problem.blocks import Block, with_note
from blockhess.problem.explain import explained
from blockhess.problem.losses import Loss, checked, checked_weight
from blockhess.problem.model_state import apply_max_norm, freeze_batch_statistics, setting
from blockhess.problem.ranks import SINGLE_PROCESS, ProcessGroup
from blockhess.problem.snapshot import Snapshot

T = TypeVar("T")

DIFFERENTIABLE = "have derivatives"


class Problem:
    """A model, a loss, batches and blocks.

    Args:
        model: in a fixed state (`model_state.fixed_state`) while the problem is in use.
        loss: from `losses.make_loss`.
        batches: from `batches.as_batches`.
        blocks: from `blocks.partition`.
        dtype: dtype of the computation; parameters and buffers of the model and of a criterion, and floating-point
            data, are converted to it. None: that of the parameters, or float32 for float16 and bfloat16 ones. float16
            and bfloat16 are accepted only if all parameters have that dtype.
        several: whether other ranks hold further batches, which `join` will combine with these.
        frozen_by: processes over whose batches the running statistics of BatchNorm are averaged first, if any.
        second_order: whether second derivatives of the loss are needed.

    Attributes:
        blocks, infos: the blocks and their BlockInfo, with the note "unused" where it applies.
        dims: their dimensions; block l is columns sum(dims[:l]) : sum(dims[:l + 1]) of a vector set.
        parameters: name -> tensor to differentiate with respect to, for every parameter in a block.
        dtype, device: of vector sets; dtype is the widest of the parameters, at least float32.
        batches, shares: the batches of positive weight, and the share of each in L.
        loss_value, weight, n_batches: L, the sum of the weights and the number of batches, of all ranks after `join`.
        loss_parameters: names of the trainable parameters of a criterion, which are constants.
        ranks: the processes that share the batches.
        is_sharded: whether this process holds shards of parameters; gradients are DTensors then, see shards.py.
        used, unused: names of parameters with and without a gradient in some batch.
        used_in_batches: names of those with a gradient, for every batch.
        lacking: why the loss has no second derivatives, or "", after `join` on any rank.
        graph_nodes: operations in the gradient of the first batch, or in its loss if second derivatives are not needed.
        graph_bytes: size of its graph, scaled to the largest batch.
        eps: largest machine epsilon of the operations between parameters and loss.
        forward_flops: FLOPs of matrix products and convolutions in the loss of the first batch.
        flops_by_factors: these FLOPs by what the factors depend on, see `graph.FlopCounter`; bits are `bits`.
        bits: name of a parameter -> its bit.
        forward_seconds: measured time of that loss, used only in displayed estimates.

    Raises:
        ValueError, TypeError: an invalid loss, weight or device, or a loss that depends on no block.
        NotImplementedError: an operation whose second derivative is needed, and missing or wrong.

    Example:
        >>> from blockhess.problem.blocks import partition
        >>> from blockhess.problem.losses import make_loss
        >>> model, data = torch.nn.Linear(3, 1), (torch.randn(8, 3), torch.randn(8, 1))
        >>> problem = Problem(model, make_loss(torch.nn.MSELoss()), [data], partition(model).blocks)
        >>> problem.dims, problem.weight
        ([3, 1], 8.0)
    """

    graph_bytes: int
    _sets_default = True

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Sequence[Batch],
        blocks: Sequence[Block],
        dtype: torch.dtype | None = None,
        several: bool = False,
        frozen_by: ProcessGroup | None = None,
        second_order: bool = True,
    ) -> None:
        self.model, self.loss, self.blocks = model, loss, tuple(blocks)
        self.second_order, self.lacking = second_order, ""
        self.ranks = SINGLE_PROCESS
        self.dims = [block.info.dim for block in blocks]
        self._wrapped = Computation(model, loss)
        self.is_sharded = shards.is_sharded(model)
        self._trainable = [p for p in self._wrapped.parameters() if p.requires_grad]
        own = {id(p) for p in model.parameters()}
        named = loss.module.named_parameters() if loss.module is not None else ()
        self.loss_parameters = [name for name, p in named if p.requires_grad and id(p) not in own]
        self.device = _one_device(self._pieces)
        if loss.calls_model:
            check_device(list(batches), self.device)
        self._convert(dtype)
        if frozen_by is not None:
            self._freeze_batch_statistics(batches, frozen_by)
            self._convert(dtype)
        self._start = Snapshot([self._wrapped], tensors=False)
        if apply_max_norm(self._wrapped, lambda: self._run(batches)):
            self._convert(dtype)
            self._start = Snapshot([self._wrapped], tensors=False)
        self._survey(batches, several)
        self._start.restore()  # nothing is left for another problem of this model

    @property
    def copy_bytes(self) -> int:
        """Size of the copy of the model from which it is restored, and of that in the dtype of the computation."""
        converted = {id(t): t for t in self._converted.values()}.values()
        own = map(shards.local, (*self._wrapped.parameters(), *self._wrapped.buffers()))
        return sum(part.nbytes for tensor in (*own, *converted) for part in dense_parts(tensor))

    @property
    def _pieces(self) -> dict[str, Tensor]:
        return {piece.name: piece.tensor for block in self.blocks for piece in block.pieces}

    def _convert(self, dtype: torch.dtype | None) -> None:
        """Set the parameters and the dtypes of vectors and data."""
        pieces, owned = self._pieces, _owned(self._wrapped)
        self._converted = _converted(self._wrapped, pieces, dtype)
        self._places = {name: owned[id(p)] for name, p in pieces.items()}
        self.parameters = {name: self._converted.get(self._places[name][0], p) for name, p in pieces.items()}
        self._data_dtype = next((t.dtype for t in self._converted.values()), dtype)
        self.dtype = max((p.dtype for p in self.parameters.values()), key=lambda d: d.itemsize)
        self.dtype = self.dtype if self.dtype.itemsize >= 4 else torch.float32

    def evaluate(self, batch: Batch, parameters: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of a batch, with some parameters replaced by name."""
        number = next(n for n, b in zip(self._numbers, self.batches) if b is batch)
        with self._explained(number, batch):
            loss: Tensor = self._call(self.loss, batch, parameters)[0]
        return loss

    def outputs(self, index: int) -> tuple[Tensor, Tensor]:
        """Return the model outputs of batch `index`, and the loss computed from them; see `Loss.with_outputs`."""
        with self.explained(index, "run on the data"):
            return self._call(self.loss.with_outputs, self.batches[index])

    def gradients(self, index: int, create_graph: bool) -> dict[str, Tensor]:
        """Return the gradient of the loss of batch `index` by name, for the parameters that it depends on."""
        with self.explained(index):
            return self._differentiate(self.evaluate(self.batches[index]), create_graph)

    def gradient(self) -> Tensor:
        """Return the gradient of L, over the batches of all ranks: (sum(dims),), block after block."""
        total = torch.zeros(sum(self.dims), dtype=self.dtype, device=self.device)
        for index, share in enumerate(self.shares):
            gradients = self.gradients(index, create_graph=False)
            for block, into in zip(self.blocks, torch.split(total, self.dims)):
                block.accumulate(gradients, into, share)
        sums = self.ranks.sums()
        sums.add(total)
        sums.finish(0)
        return total

    def sharded_gradient(self) -> dict[str, Tensor]:
        """Return the gradient of L as DTensors, by name, for the parameters that it depends on."""
        total: dict[str, Tensor] = {}
        for index, share in enumerate(self.shares):
            for name, gradient in self.gradients(index, create_graph=False).items():
                total[name] = total[name].add(gradient, alpha=share) if name in total else share * gradient
        return total

    def gradients_at(
        self, batch: Batch, parameters: Mapping[str, Tensor], gauss_newton: bool = False
    ) -> dict[str, Tensor]:
        """Return the gradient of the loss of a batch at other parameters, with its graph.

        Args:
            gauss_newton: return J^T dloss/dz with a constant Jacobian J of the model outputs z, whose derivative is the
                generalized Gauss-Newton matrix.
        """

        def differentiated(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            loss = self.loss(model, batch)[0]
            found = torch.autograd.grad(loss, list(parameters.values()), create_graph=True, allow_unused=True)
            return {name: g for name, g in zip(parameters, found) if g is not None}

        # The backward pass, in which activation checkpointing runs the model again, needs these parameters too.
        if not gauss_newton:
            return self._call(differentiated, batch, parameters)
        outputs, loss = self._call(self.loss.with_outputs, batch, parameters)
        (slope,) = torch.autograd.grad(loss, outputs, create_graph=True)
        fixed = {name: p.detach().requires_grad_() for name, p in parameters.items()}

        def pulled_back(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
            outputs = self.loss.with_outputs(model, batch)[0]
            found = torch.autograd.grad(outputs, list(fixed.values()), slope, create_graph=True, allow_unused=True)
            return {name: g for name, g in zip(fixed, found) if g is not None}

        return self._call(pulled_back, batch, fixed)

    def differentiate(self, outputs: Any, inputs: Any, directions: Any = None, **options: bool) -> tuple[Any, ...]:
        """Call torch.autograd.grad with allow_unused, and with the converted parameters in the model.

        Activation checkpointing runs the model again in the backward pass.
        """
        if self.is_sharded:
            return shards.backward(outputs, inputs, self._trainable)
        found = self._call(
            lambda *_: torch.autograd.grad(outputs, inputs, directions, allow_unused=True, **options), (), fresh=False
        )
        return tuple(g if g is None or g.layout == torch.strided else g.to_dense() for g in found)

    def in_dtype(self, dtype: torch.dtype, sets_default: bool = True) -> Problem:
        """Return the problem of the first batch in another dtype.

        Args:
            sets_default: evaluate with that as torch's default dtype, which other threads see too.
        """
        other = copy.copy(self)
        other._sets_default = sets_default
        other.ranks, other.batches, other.shares, other.n_batches = SINGLE_PROCESS, self.batches[:1], [1.0], 1
        other._convert(dtype)
        return other

    def restricted(self, numbers: Sequence[int]) -> Problem:
        """Return the problem of some blocks, whose engines differentiate with respect to their parameters only."""
        other = copy.copy(self)
        names = {name for number in numbers for name in self.blocks[number].parameters}
        other.parameters = {name: p for name, p in self.parameters.items() if name in names}
        return other

    def _call(
        self,
        compute: Callable[[nn.Module, Batch], T],
        batch: Batch,
        parameters: Mapping[str, Tensor] | None = None,
        fresh: bool = True,
    ) -> T:
        """Return compute(model, batch), with converted or replaced parameters in the model.

        Args:
            fresh: first restore the attributes of modules, in which the last evaluation may have counted or cached.
        """
        if fresh:
            if self.is_sharded:
                shards.reshard(self._wrapped)
            self._start.restore()
        swapped = dict(self._converted)
        for name, tensor in (parameters or {}).items():
            swapped |= dict.fromkeys(self._places[name], tensor)
        if self._data_dtype is not None:
            batch = to_dtype(batch, self._data_dtype)
        # Tensors that the model creates must match the converted parameters.
        dtype = self._data_dtype if self._sets_default and self._converted else None
        with setting(torch.get_default_dtype, torch.set_default_dtype, dtype or torch.get_default_dtype()):
            if not swapped:
                return compute(self.model, batch)
            # `_places` has the names of tied parameters, one per module, also where a module is registered twice.
            found: T = functional_call(self._wrapped, swapped, (compute, batch), tie_weights=False)
            return found

    def _run(self, batches: Sequence[Batch]) -> None:
        for index, batch in enumerate(batches):
            with self._explained(index, batch):
                self._call(self.loss, batch)

    def _freeze_batch_statistics(self, batches: Sequence[Batch], ranks: ProcessGroup) -> None:
        """Replace the running statistics of BatchNorm, in the dtype of the computation."""
        for name, module in self._wrapped.named_modules():
            for buffer in module._buffers:
                module._buffers[buffer] = self._converted.get(f"{name}.{buffer}", module._buffers[buffer])

        def evaluate(numbered: tuple[int, Batch]) -> None:
            with self._explained(*numbered):
                self._call(self.loss, numbered[1], fresh=False)

        freeze_batch_statistics(self._wrapped, evaluate, list(enumerate(batches)), ranks)

    def _survey(self, batches: Sequence[Batch], several: bool) -> None:
        """Evaluate every batch once: check the loss, and find its value, weight and the parameters it depends on."""
        weights: list[float] = []
        values: list[float] = []
        self.used_in_batches: list[list[str]] = []
        self.batches: list[Batch] = []
        self._numbers: list[int] = []  # of these batches in the data
        self._guesses: list[_Guess] = []
        for index, batch in enumerate(batches):
            flops = None if self.batches else graph.FlopCounter(self.parameters.values())
            with self._explained(index, batch):
                with flops or contextlib.nullcontext():
                    loss, raw_weight = self._call(self.loss, batch)
                loss = checked(loss, index)
                weight = 1.0
                if self.loss.averaged:
                    if raw_weight is None:
                        part = self.loss.averaged_over(batch)
                        raw_weight = batch_size(part)
                        self._guesses.append((raw_weight, shapes(part), row_shapes(part)))
                    weight = checked_weight(raw_weight, index, len(batches) + several)
                if weight == 0:  # all labels are ignored, so their mean is 0 / 0
                    continue
                value = loss.item()
                if not math.isfinite(value):
                    raise ValueError(f"spectrum: loss_fn must return a finite loss, got {value} for batch {index}")
            self.batches.append(batch)
            self._numbers.append(index)
            weights.append(weight)
            values.append(value)
            with self._explained(index, batch, DIFFERENTIABLE):
                if flops is None:
                    self.used_in_batches.append(list(self._differentiate(loss, create_graph=False)))
                    continue
                gradients = self._survey_first(loss, batch)
                self.forward_flops, self.flops_by_factors = flops.total, dict(flops.by_factors)
                self.bits = {name: 1 << i for i, name in enumerate(self.parameters)}
                del loss  # frees its graph before the next one is built
                self._check_repeatable(batch, index, value, gradients)
                self.used_in_batches.append(list(gradients))
                del gradients
        if not self.batches:
            raise ValueError(f"spectrum: data must have a batch of weight above 0, got {len(batches)} of weight 0")
        used = frozenset(name for names in self.used_in_batches for name in names)
        if not used:
            raise ValueError(
                "spectrum: loss_fn must depend on the parameters in blocks, got a loss that depends on none of "
                + ", ".join(list(self.parameters)[:5])
            )
        sizes = [sum(t.numel() for t in tensors(batch)) for batch in self.batches]
        self.graph_bytes = int(self.graph_bytes * max(sizes) / max(1, sizes[0]))
        self.weight, self.n_batches = sum(weights), len(self.batches)
        self.shares = [w / self.weight if self.loss.averaged else 1.0 for w in weights]
        self.loss_value = sum(share * value for share, value in zip(self.shares, values))
        self._use(used)

    def _survey_first(self, loss: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return the gradient of the first batch; check and measure its graph."""
        nodes = graph.differentiable_nodes([loss.grad_fn], self.second_order)
        self.eps = graph.largest_eps(nodes)
        if self.second_order:
            graph.refuse_third_derivatives(nodes)
            gradients = self._differentiate(loss, create_graph=True)
            nodes = graph.differentiable_nodes(g.grad_fn for g in gradients.values())
        self.graph_nodes = len(nodes)
        others = (*self.parameters.values(), *self.model.parameters(), *tensors(batch))
        self.graph_bytes = self._call(lambda *_: graph.saved_bytes(nodes, others), (), fresh=False)
        if not self.second_order:
            gradients = self._differentiate(loss, create_graph=False)
        return {name: g.detach() for name, g in gradients.items()}

    def explained(self, index: int, rule: str = DIFFERENTIABLE) -> contextlib.AbstractContextManager[None]:
        """Return a context in which errors of the model or loss on batch `index` are explained.

        Args:
            rule: what the loss must do.
        """
        return self._explained(self._numbers[index], self.batches[index], rule)

    def _explained(
        self, number: int, batch: Batch, rule: str = "run on the data"
    ) -> contextlib.AbstractContextManager[None]:
        like = next(iter(self.parameters.values()))

        def repeat() -> None:
            if not self.is_sharded:  # the other processes may not have failed, and not repeat it
                self._call(self.loss, batch)

        return explained(self.loss, self._wrapped, number, batch, repeat, like, rule)

    def _use(self, used: frozenset[str]) -> None:
        self.used = used
        self.unused = tuple(name for name in self.parameters if name not in used)
        self.infos = tuple(
            block.info if used & set(block.parameters) else with_note(block.info, "unused") for block in self.blocks
        )

    def join(self, ranks: ProcessGroup) -> None:
        """Combine the batches of all ranks that share the data. All of them must call it, once.

        Warns if weights were taken from the shapes of batches that do not determine them.
        """
        self.ranks = ranks
        if ranks.data_size == 1:
            _warn_of_guesses(self.loss, self._guesses)
            return
        _warn_of_guesses(self.loss, [guess for found in ranks.gather_data_ranks(self._guesses) for guess in found])
        counted = (self.graph_nodes, self.graph_bytes, self.forward_flops, self.flops_by_factors)
        own = (self.weight, self.loss_value, self.n_batches, self.used, counted, self.lacking)
        weights, values, numbers, used, counts, lacking = zip(*ranks.gather_data_ranks(own))
        self.lacking = next(filter(None, lacking), "")
        total = sum(weights)
        if self.loss.averaged:
            self.shares = [share * self.weight / total for share in self.shares]
            self.loss_value = sum(weight / total * value for weight, value in zip(weights, values))
        else:
            self.loss_value = sum(values)
        self.weight, self.n_batches = total, sum(numbers)
        self._use(frozenset().union(*used))
        nodes, nbytes, flops, by_factors = zip(*counts)
        self.graph_nodes, self.graph_bytes, self.forward_flops = max(nodes), max(nbytes), max(flops)
        self.flops_by_factors = by_factors[flops.index(self.forward_flops)]

    def is_used(self, number: int) -> bool:
        """Return whether the loss depends on a parameter of block `number`."""
        return not self.used.isdisjoint(self.infos[number].parameters)

    def locate(self, backward: str) -> tuple[str, str]:
        """Return where the operation with this backward function is called, as "in ... ", and what to use instead."""
        stem = backward.removesuffix("_backward")
        with graph.OperationRecorder(self.model) as operations, torch.no_grad():
            self.evaluate(self.batches[0])
        place = next((where for name, where in operations.places.items() if name.removesuffix("_forward") == stem), "")
        return f"in {place} " if place else "of the model ", graph.alternative(stem)

    def _differentiate(self, loss: Tensor, create_graph: bool) -> dict[str, Tensor]:
        gradients = self.differentiate(loss, list(self.parameters.values()), create_graph=create_graph)
        return {name: g for name, g in zip(self.parameters, gradients) if g is not None}

    def _check_repeatable(self, batch: Batch, index: int, value: float, gradients: dict[str, Tensor]) -> None:
        with graph.OperationRecorder(self.model) as operations:
            start = time.perf_counter()
            again = checked(self.evaluate(batch), index)
            _ = again.item()  # synchronizes with a GPU
            self.forward_seconds = time.perf_counter() - start
            others = self._differentiate(again, create_graph=False)
        if abs(again.item() - value) > 1e-5 * abs(value):
            raise ValueError(
                f"spectrum: loss_fn must give the same loss for the same batch, got {value:.9g}, then "
                f"{again.item():.9g}: {operations.randomness()}"
            )
        size = max((float(shards.whole(g).abs().max()) for g in gradients.values() if g.numel()), default=0.0)
        for name, gradient in gradients.items():
            difference = float(shards.whole(gradient - others[name]).abs().max()) if gradient.numel() else 0.0
            if difference > 1e-3 * max(size, 1e-30):
                raise ValueError(
                    f"spectrum: loss_fn must have the same gradient for the same batch, got one that differs by "
                    f"{difference:.3g} in {name!r}: {operations.randomness()}"
                )


# First dimension, shapes of the tensors, and shapes without the first dimension of what the loss averages over.
_Guess: TypeAlias = tuple[int | None, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...] | None]


def _warn_of_guesses(loss: Loss, guesses: Sequence[_Guess]) -> None:
    """Warn unless weights taken from shapes are in the right proportion: of equal batches, or of equal rows."""
    sizes, whole, rows = zip(*guesses) if guesses else ((), (), ())
    if len(set(whole)) > 1 and (None in rows or len(set(rows)) > 1):
        listed = ", ".join(map(str, sizes[:5])) + ", ..." * (len(sizes) > 5)
        warnings.warn(
            f"spectrum: batches are weighted by their first dimensions, {listed}, but their shapes do not tell what "
            f"{loss.name} averages over; pass loss_fn(model, batch) that returns (mean loss, weight of the batch), "
            "such as the number of elements in its mean",
            stacklevel=2,
        )


class Computation(nn.Module):
    """Holds the model, and the module of the loss if it has one; computes with them, for `functional_call`."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.criterion = loss.module
        self.training = False

    def forward(self, compute: Callable[[nn.Module, Batch], Any], batch: Batch) -> Any:
        return compute(self.model, batch)


def _one_device(parameters: Mapping[str, Tensor]) -> torch.device:
    (first, device), *others = ((name, shards.device_of(parameter)) for name, parameter in parameters.items())
    for name, other in others:
        if other != device:
            raise ValueError(
                f"spectrum: all parameters in blocks must be on one device, got {first!r} on {device} "
                f"and {name!r} on {other}"
            )
    return device


def _converted(model: nn.Module, pieces: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Return parameters and buffers in the dtype of the computation, by name; none if no conversion is needed."""
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
    for key, t in floating.items():
        for hook in (t._backward_hooks or {}).values() if t.requires_grad else ():
            converted[key].register_hook(hook)  # type: ignore[no-untyped-call]
    return {name: converted[key] for key, names in _owned(model).items() if key in converted for name in names}


def _owned(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter and buffer by id, one for each module that holds it."""
    names: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    return names
