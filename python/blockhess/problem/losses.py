"""The loss of a batch and its weight in the loss of all data.

    L(w) = sum_b weight_b L_b(w) / sum_b weight_b,   or  sum_b L_b(w)  where the loss sums over samples.

Promises: with the default weights a short last batch, and labels that are ignored, count as they would in one
large batch; a loss that is no real scalar, no number or constant is refused with the batch's index.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blockhess.problem.batches import Batch, batch_size

Weight = Tensor | float | int | None


class Loss(Protocol):
    """A loss ready to be evaluated on batches."""

    name: str
    pairs: bool  # batches are (inputs, targets)
    averaged: bool  # False: the loss of all data is the plain sum over batches
    calls_model: bool  # the batch goes to the model as it is, so it must be on the model's device

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        """Loss of the batch, and its weight or None if nothing tells it."""
        ...

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The model's outputs, and the loss that was computed from them.

        Raises:
            TypeError: the loss does not tell them apart.
        """
        ...


def make_loss(loss_fn: Callable[..., Any] | None) -> Loss:
    """Make a loss of what the user passes as `loss_fn`.

    Args:
        loss_fn: None: `model(**batch).loss` (Transformers); an nn.Module such as nn.CrossEntropyLoss() or a function
            of torch.nn.functional (also in functools.partial): `loss_fn(model(inputs), targets)`; any other
            callable: `loss_fn(model, batch)`, which returns the mean loss or (mean loss, weight).

    Returns:
        The loss, with the weights of its batches: what the callable says; for cross-entropy and negative
        log-likelihood the number of targets that are not ignored (or the sum of their class weights); for
        Transformers the number of labels the loss looks at; else the batch size, which is the length of the first
        tensor's first dimension. With reduction="sum" batches are added up without weights.

    Raises:
        TypeError: `loss_fn` is not callable.
        ValueError: a criterion with reduction="none".
    """
    if loss_fn is None:
        return TransformersLoss()
    if not callable(loss_fn):
        raise TypeError(f"spectrum: loss_fn must be callable or None, got {type(loss_fn).__name__}")
    function = loss_fn.func if isinstance(loss_fn, functools.partial) else loss_fn
    if isinstance(loss_fn, nn.Module):
        counts_targets = isinstance(loss_fn, nn.CrossEntropyLoss | nn.NLLLoss)
        options = vars(loss_fn) | dict(loss_fn.named_buffers())
        return CriterionLoss(loss_fn, type(loss_fn).__name__, options, counts_targets)
    if getattr(function, "__module__", None) == F.__name__:
        options = loss_fn.keywords if isinstance(loss_fn, functools.partial) else {}
        return CriterionLoss(loss_fn, function.__name__, options, function in (F.cross_entropy, F.nll_loss))
    return ClosureLoss(loss_fn)


class ClosureLoss:
    """`loss_fn(model, batch)` -> mean loss or (mean loss, weight)."""

    pairs = False
    averaged = True
    calls_model = False

    def __init__(self, loss_fn: Callable[..., Any]) -> None:
        self.name = getattr(loss_fn, "__qualname__", type(loss_fn).__name__)
        self._loss_fn = loss_fn

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        result = self._loss_fn(model, batch)
        if isinstance(result, tuple) and len(result) == 2:
            return result
        return result, batch_size(batch)

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Refused: nobody can look into a closure."""
        raise TypeError(
            f"spectrum: loss_fn must be a criterion such as nn.CrossEntropyLoss(), or None for a Transformers model, "
            f"where the model's outputs matter (engine='ggn'), got {self.name}"
        )


class CriterionLoss:
    """`criterion(model(inputs), targets)`, with the options that the criterion was given.

    `counts_targets`: its mean is over the targets that are not ignored, as that of cross-entropy.
    """

    pairs = True
    calls_model = True

    def __init__(
        self, criterion: Callable[..., Any], name: str, options: Mapping[str, Any], counts_targets: bool
    ) -> None:
        reduction = options.get("reduction", "mean")
        if reduction == "none":
            raise ValueError(f"spectrum: loss_fn must return one number, got {name} with reduction='none'")
        self.name = name
        self.averaged = reduction != "sum"
        self._criterion = criterion
        self._options = options
        self._counts_targets = counts_targets

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        inputs, targets = self._pair(batch)
        loss = self._criterion(model(inputs), targets)
        return loss, self._count(targets) if self._counts_targets else batch_size(batch)

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """As in `Loss`."""
        inputs, targets = self._pair(batch)
        outputs = model(inputs)
        if not isinstance(outputs, Tensor):
            raise TypeError(f"spectrum: model must return a tensor for engine='ggn', got {type(outputs).__name__}")
        return outputs, self._criterion(outputs, targets)

    def _pair(self, batch: Batch) -> tuple[Any, Any]:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(
                f"spectrum: data must hold pairs (inputs, targets) for {self.name}, got {_describe(batch)}; "
                "for other batches pass loss_fn(model, batch)"
            )
        inputs, targets = batch
        return inputs, targets

    def _count(self, targets: Tensor) -> Weight:
        """The denominator of the mean that cross-entropy takes."""
        if targets.is_floating_point():  # class probabilities (N, C, ...): every one of the N ... counts
            return targets.numel() // targets.shape[1 if targets.dim() > 1 else 0]
        kept = targets[targets != self._options.get("ignore_index", -100)]
        class_weights: Tensor | None = self._options.get("weight")
        return kept.numel() if class_weights is None else class_weights[kept].sum()


class TransformersLoss:
    """`model(**batch).loss`, the loss that Transformers models compute from `labels`."""

    name = "model(**batch).loss"
    pairs = False
    averaged = True
    calls_model = True

    def __init__(self) -> None:
        self._shifted: bool | None = None  # whether the model compares position t with label t + 1

    def __call__(self, model: nn.Module, batch: Batch) -> tuple[Any, Weight]:
        output, loss = self._run(model, batch)
        labels = batch.get("labels")
        if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
            return loss, batch_size(batch)
        if self._shifted is None and bool(labels.ne(-100).any()):  # labels that all are ignored cannot tell
            self._shifted = labels.dim() == 2 and _labels_are_shifted(output, labels)
        return loss, (labels[:, 1:] if self._shifted else labels).ne(-100).sum()

    def with_outputs(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """As in `Loss`; the outputs are the logits."""
        output, loss = self._run(model, batch)
        logits = getattr(output, "logits", None)
        if not isinstance(logits, Tensor):
            raise TypeError(f"spectrum: model must return logits for engine='ggn', got {type(output).__name__}")
        return logits, loss

    def _run(self, model: nn.Module, batch: Batch) -> tuple[Any, Tensor]:
        if not isinstance(batch, Mapping):
            raise ValueError(
                "spectrum: data must hold mappings for loss_fn=None, which means model(**batch).loss, got "
                f"{_describe(batch)}; pass loss_fn="
            )
        output = model(**batch)
        loss = getattr(output, "loss", None)
        if loss is None:
            raise ValueError(
                f"spectrum: loss_fn must be given where model(**batch) returns no loss; got {type(output).__name__} "
                f"from a batch with keys {sorted(batch)} (Transformers models need 'labels')"
            )
        return output, loss


def _labels_are_shifted(output: Any, labels: Tensor) -> bool:
    """Whether the loss ignores the logits at the last label of every run, as causal language models do.

    Asked of the gradient, since neither class names nor configurations tell it of every model.
    """
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != labels.shape or not logits.requires_grad:
        return False
    counted = labels != -100
    last = counted & ~F.pad(counted[:, 1:], (0, 1))
    (gradient,) = torch.autograd.grad(output.loss, logits, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(last.any()) and not bool(gradient[last].any())


def checked(loss: Any, batch: int) -> Tensor:
    """`loss`, if it is something that a Hessian can be taken of.

    Raises:
        TypeError: not a tensor.
        ValueError: not 0-dimensional, complex, or without a graph.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"spectrum: loss_fn must return a tensor, got {type(loss).__name__} for batch {batch}")
    if loss.dim() != 0:
        raise ValueError(
            f"spectrum: loss_fn must return a 0-dimensional tensor, got shape {tuple(loss.shape)} for batch {batch}; "
            "take the mean"
        )
    if not loss.is_floating_point():
        raise ValueError(f"spectrum: loss_fn must return a real number, got {loss.dtype} for batch {batch}")
    if not loss.requires_grad:
        raise ValueError(
            f"spectrum: loss_fn must depend on the parameters, got a loss that requires no gradient for batch {batch}; "
            "is there a detach(), item() or no_grad() on the way?"
        )
    return loss


def checked_weight(weight: Weight, batch: int, batches: int) -> float:
    """`weight` as a number; 1 where nothing tells it and there is only one batch.

    Raises:
        ValueError: negative, not finite, or unknown with several batches.
    """
    if weight is None:
        if batches > 1:
            raise ValueError(
                f"spectrum: loss_fn must return (mean loss, weight), since batch {batch} has no tensor that tells its "
                "size"
            )
        return 1.0
    try:
        value = float(weight)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"spectrum: loss_fn must return a number as weight, got {weight!r} for batch {batch}") from None
    if not 0 <= value < float("inf"):
        raise ValueError(f"spectrum: loss_fn must return a finite weight of at least 0, got {value} for batch {batch}")
    return value


def _describe(batch: Batch) -> str:
    length = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
    return f"a {type(batch).__name__}{length}"
